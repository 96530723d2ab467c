//! What is kept of images: blobs and layers as files, records in a database.
//!
//! ```text
//! images.redb                 records of images
//! blobs/sha256/HEX            manifests and configurations
//! layers/HEX.erofs            layers, by diff ID
//! layers/HEX.recipe           how to make a layer's tar stream again
//! tmp/                        what is being written; emptied when the store is opened
//! ```
//!
//! A file gets its name only when it is complete, verified and on the disk; a record is written after its files and
//! deleted before them. A crash at any point leaves at most files that no record needs, which [`Store::collect`]
//! removes. Compressed layers are not kept.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use tempfile::{NamedTempFile, TempPath};

use super::digest::{DiffId, Digest};
use super::document::{ContainerDefaults, MAX_CONFIG};
use super::error::ImageError;
use super::layer::Again;
use crate::usage::{self, Usage};

/// Image ID (hexadecimal) to a [`Record`] in JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// Diff ID (hexadecimal) to the fs-verity digest of the layer's image, where it has one.
pub(super) const SEALS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("seals");

/// What is remembered of an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub id: Digest,
    /// Full tagged names.
    pub tags: Vec<String>,
    /// Full names with digests.
    pub digests: Vec<String>,
    /// Manifest blobs that are kept.
    pub manifests: Vec<Digest>,
    /// Lowest first.
    pub layers: Vec<DiffId>,
    /// Bytes on disk of all its layers and blobs.
    pub size: u64,
    pub defaults: ContainerDefaults,
    /// Names under which its signature was verified, with the key that did it.
    #[serde(default)]
    pub verified: BTreeMap<String, Digest>,
}

/// The store. All methods block on the disk.
pub(super) struct Store {
    root: PathBuf,
    /// Whether layers get fs-verity.
    pub(super) verity: bool,
    /// `None` after a failure of the disk: redb takes nothing more then, until the file is opened anew.
    database: RwLock<Option<Database>>,
    /// Layers that requests under way need, with how many do. Held while files are removed, so that none of them is
    /// one that a request has just found to be there.
    pins: Arc<Mutex<HashMap<Digest, usize>>>,
}

/// A file that is being written and has no name in the store yet; removed when dropped.
pub(super) struct Partial {
    pub file: File,
    pub path: TempPath,
}

/// Keeps layers and blobs from being collected while it lives.
pub(super) struct Pins {
    pins: Arc<Mutex<HashMap<Digest, usize>>>,
    held: Vec<Digest>,
}

impl Store {
    /// Opens the store in `root`, makes it if it is not there, and removes what a crash has left.
    pub(super) fn open(root: &Path, verity: bool) -> Result<Self, ImageError> {
        for directory in ["blobs/sha256", "layers", "tmp"] {
            let path = root.join(directory);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|error| ImageError::disk("create", &path, error))?;
        }
        let tmp = root.join("tmp");
        for entry in fs::read_dir(&tmp).map_err(|error| ImageError::disk("read", &tmp, error))? {
            let path = entry
                .map_err(|error| ImageError::disk("read", &tmp, error))?
                .path();
            fs::remove_file(&path).map_err(|error| ImageError::disk("remove", &path, error))?;
        }
        let store = Self {
            root: root.to_owned(),
            verity,
            database: RwLock::new(None),
            pins: Arc::default(),
        };
        store.reopen()?;
        store.forget_incomplete()?;
        Ok(store)
    }

    /// Opens the database, anew if it was open.
    fn reopen(&self) -> Result<(), ImageError> {
        let slot = self.database.write();
        let mut slot = slot.unwrap_or_else(PoisonError::into_inner);
        // Closed first: the file is locked as long as it is open.
        *slot = None;
        let database = self.db(Database::create(self.root.join("images.redb")))?;
        let transaction = self.db(database.begin_write())?;
        self.db(transaction.open_table(IMAGES).map(drop))?;
        self.db(transaction.open_table(SEALS).map(drop))?;
        self.db(transaction.commit())?;
        *slot = Some(database);
        Ok(())
    }

    /// Works with the database; once more on the file opened anew if the disk failed.
    pub(super) fn with<T>(
        &self,
        mut work: impl FnMut(&Database) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let mut once = || match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => work(database),
            None => Err(self.failed("the disk failed before")),
        };
        match once() {
            Err(
                ImageError::Database { .. } | ImageError::Disk { .. } | ImageError::DiskFull { .. },
            ) => {
                self.reopen()?;
                once()
            }
            result => result,
        }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn layer_path(&self, layer: &DiffId) -> PathBuf {
        self.root
            .join("layers")
            .join(format!("{}.erofs", layer.hex()))
    }

    fn recipe_path(&self, layer: &DiffId) -> PathBuf {
        self.root
            .join("layers")
            .join(format!("{}.recipe", layer.hex()))
    }

    fn blob_path(&self, blob: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(blob.hex())
    }

    /// Whether the layer is complete here.
    pub(super) fn has_layer(&self, layer: &DiffId) -> bool {
        self.layer_path(layer).is_file()
    }

    /// A file in `tmp/`.
    pub(super) fn partial(&self) -> Result<Partial, ImageError> {
        let tmp = self.root.join("tmp");
        let file = NamedTempFile::new_in(&tmp)
            .map_err(|error| ImageError::disk("create a file in", &tmp, error))?;
        let (file, path) = file.into_parts();
        Ok(Partial { file, path })
    }

    /// A file in `tmp/` that has no name at all.
    pub(super) fn scratch(&self) -> Result<File, ImageError> {
        let tmp = self.root.join("tmp");
        tempfile::tempfile_in(&tmp)
            .map_err(|error| ImageError::disk("create a file in", &tmp, error))
    }

    /// A file for a layer. Anybody may read it, as the pod processes have users of their own; that only those get to
    /// it that are shown it is the store's directory's part, which only root may enter.
    pub(super) fn partial_layer(&self) -> Result<Partial, ImageError> {
        let partial = self.partial()?;
        partial
            .file
            .set_permissions(fs::Permissions::from_mode(0o444))
            .map_err(|error| ImageError::disk("set the mode of", &partial.path, error))?;
        Ok(partial)
    }

    /// Gives a complete, synced layer its name; its recipe first, as the layer is there when its image is.
    pub(super) fn publish_layer(
        &self,
        layer: &DiffId,
        image: TempPath,
        recipe: TempPath,
    ) -> Result<(), ImageError> {
        if self.verity {
            self.seal(layer, &image)?;
        }
        self.publish(recipe, &self.recipe_path(layer))?;
        self.publish(image, &self.layer_path(layer))
    }

    /// A layer's tar stream, made again. What the disk did to it, its digest tells.
    pub(super) fn tar_again(&self, layer: &DiffId) -> Result<Again, ImageError> {
        let open = |path: PathBuf| {
            File::open(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => ImageError::unsupported(
                    format!("layer {}", layer.short()),
                    format!(
                        "{} is missing; remove the image and pull it again",
                        path.display()
                    ),
                ),
                _ => ImageError::disk("open", &path, error),
            })
        };
        let recipe = open(self.recipe_path(layer))?;
        let image = open(self.layer_path(layer))?;
        Again::new(recipe, image)
            .map_err(|error| ImageError::disk("read", &self.recipe_path(layer), error))
    }

    /// A blob that is kept, verified.
    pub(super) fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let path = self.blob_path(digest);
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_CONFIG + 1).read_to_end(&mut bytes))
            .map_err(|error| ImageError::disk("read", &path, error))?;
        if Digest::of(&bytes) != *digest {
            let reason = "its content has changed; remove the image and pull it again";
            return Err(ImageError::corrupt(path.display().to_string(), reason));
        }
        Ok(bytes)
    }

    /// Keeps a blob whose digest was checked.
    pub(super) fn write_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        let target = self.blob_path(digest);
        if target.is_file() {
            return Ok(());
        }
        let mut partial = self.partial()?;
        partial
            .file
            .write_all(bytes)
            .and_then(|()| partial.file.sync_all())
            .map_err(|error| ImageError::disk("write", &target, error))?;
        self.publish(partial.path, &target)
    }

    fn publish(&self, path: TempPath, target: &Path) -> Result<(), ImageError> {
        path.persist(target)
            .map_err(|error| ImageError::disk("name", target, error.error))?;
        let directory = target.parent().unwrap_or(&self.root);
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| ImageError::disk("sync", directory, error))
    }

    /// Bytes on disk of what `record` names.
    pub(super) fn size_of(&self, record: &Record) -> u64 {
        let layers: HashSet<PathBuf> = record
            .layers
            .iter()
            .flat_map(|layer| [self.layer_path(layer), self.recipe_path(layer)])
            .collect();
        let blobs = record
            .manifests
            .iter()
            .chain([&record.id])
            .map(|blob| self.blob_path(blob));
        layers
            .into_iter()
            .chain(blobs)
            .filter_map(|path| fs::metadata(path).ok())
            .map(|file| file.blocks() * 512)
            .sum()
    }

    /// Keeps `digests` from being collected while the result lives.
    pub(super) fn pin(&self, digests: Vec<Digest>) -> Pins {
        self.pin_in(&mut lock(&self.pins), digests)
    }

    fn pin_in(&self, pins: &mut HashMap<Digest, usize>, digests: Vec<Digest>) -> Pins {
        for digest in &digests {
            *pins.entry(*digest).or_default() += 1;
        }
        Pins {
            pins: self.pins.clone(),
            held: digests,
        }
    }

    /// The record that `find` chooses, with its layers kept from being collected.
    pub(super) fn hold(
        &self,
        find: impl FnOnce(Vec<Record>) -> Result<Option<Record>, ImageError>,
    ) -> Result<Option<(Record, Pins)>, ImageError> {
        // No layer goes between the look and the pin.
        let mut pins = lock(&self.pins);
        let Some(record) = find(self.records()?)? else {
            return Ok(None);
        };
        let held = self.pin_in(&mut pins, record.layers.clone());
        Ok(Some((record, held)))
    }

    /// All records, by image ID.
    pub(super) fn records(&self) -> Result<Vec<Record>, ImageError> {
        self.with(|database| {
            let transaction = self.db(database.begin_read())?;
            let table = self.db(transaction.open_table(IMAGES))?;
            let mut records = Vec::new();
            for row in self.db(table.iter())? {
                let (_, value) = self.db(row)?;
                records.push(self.parse(value.value())?);
            }
            Ok(records)
        })
    }

    /// Changes records in one transaction: what `change` makes of all of them is what is stored. It may be asked twice.
    pub(super) fn update<T>(
        &self,
        mut change: impl FnMut(&mut Vec<Record>) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        self.with(|database| {
            let transaction = self.db(database.begin_write())?;
            let result;
            {
                let mut table = self.db(transaction.open_table(IMAGES))?;
                let mut old = HashMap::new();
                let mut records = Vec::new();
                for row in self.db(table.iter())? {
                    let (key, value) = self.db(row)?;
                    old.insert(key.value().to_owned(), value.value().to_vec());
                    records.push(self.parse(value.value())?);
                }
                result = change(&mut records)?;
                for record in &records {
                    let key = record.id.hex();
                    let value = serde_json::to_vec(record).map_err(|error| self.failed(error))?;
                    if old.remove(&key).as_ref() != Some(&value) {
                        self.db(table.insert(key.as_str(), value.as_slice()))?;
                    }
                }
                for key in old.keys() {
                    self.db(table.remove(key.as_str()))?;
                }
            }
            self.db(transaction.commit())?;
            Ok(result)
        })
    }

    /// Removes files that no record, no request and nothing `in_use` needs. Returns how many bytes that freed. Whoever
    /// takes a layer into use holds it (see [`Store::hold`]) until `in_use` tells of it.
    pub(super) fn collect(
        &self,
        in_use: impl FnOnce() -> HashSet<DiffId>,
    ) -> Result<u64, ImageError> {
        let pins = lock(&self.pins);
        let mut needed = in_use();
        needed.extend(pins.keys().copied());
        for record in self.records()? {
            needed.insert(record.id);
            needed.extend(record.manifests);
            needed.extend(record.layers);
        }
        let (mut freed, mut gone) = (0, Vec::new());
        for (directory, suffix) in [
            ("blobs/sha256", ""),
            // A recipe without its layer is no harm.
            ("layers", ".erofs"),
            ("layers", ".recipe"),
        ] {
            let directory = self.root.join(directory);
            let read = |error| ImageError::disk("read", &directory, error);
            for entry in fs::read_dir(&directory).map_err(read)? {
                let entry = entry.map_err(read)?;
                let name = entry.file_name();
                let digest = name
                    .to_str()
                    .and_then(|name| name.strip_suffix(suffix))
                    .and_then(Digest::from_hex);
                if let Some(digest) = digest.filter(|digest| !needed.contains(digest)) {
                    let path = entry.path();
                    freed += entry.metadata().map_or(0, |file| file.blocks() * 512);
                    fs::remove_file(&path)
                        .map_err(|error| ImageError::disk("remove", &path, error))?;
                    if self.verity && suffix == ".erofs" {
                        gone.push(digest);
                    }
                }
            }
        }
        self.forget_seals(&gone)?;
        Ok(freed)
    }

    /// Bytes and inodes that the store takes, its own directories included.
    pub(super) fn usage(&self) -> Usage {
        usage::below(&[&self.root])
    }

    /// A record whose files are not all there (a disk that was damaged, a file deleted by hand) is no image.
    fn forget_incomplete(&self) -> Result<(), ImageError> {
        self.update(|records| {
            records.retain(|record| {
                let blobs = record
                    .manifests
                    .iter()
                    .chain([&record.id])
                    .all(|blob| self.blob_path(blob).is_file());
                let whole = blobs && record.layers.iter().all(|layer| self.has_layer(layer));
                if !whole {
                    tracing::warn!(image = %record.id, "image forgotten: files of it are missing");
                }
                whole
            });
            Ok(())
        })
    }

    fn parse(&self, value: &[u8]) -> Result<Record, ImageError> {
        serde_json::from_slice(value).map_err(|error| self.failed(error))
    }

    pub(super) fn db<T, E: Into<redb::Error>>(
        &self,
        result: Result<T, E>,
    ) -> Result<T, ImageError> {
        result.map_err(|error| match error.into() {
            redb::Error::Io(error) => {
                ImageError::disk("write", &self.root.join("images.redb"), error)
            }
            other => self.failed(other),
        })
    }

    fn failed(&self, error: impl std::fmt::Display) -> ImageError {
        ImageError::Database {
            path: self.root.join("images.redb"),
            reason: error.to_string(),
        }
    }
}

/// Counts stay right whatever panicked.
fn lock(pins: &Mutex<HashMap<Digest, usize>>) -> MutexGuard<'_, HashMap<Digest, usize>> {
    pins.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut pins = lock(&self.pins);
        for digest in &self.held {
            if let Some(count) = pins.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(digest);
                }
            }
        }
    }
}
