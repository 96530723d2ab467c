//! What is kept of images: blobs and layers as files, records in a database.
//!
//! ```text
//! images.redb                 records of images
//! blobs/sha256/HEX            manifests and configurations
//! layers/HEX.erofs            layers, by diff ID
//! tmp/                        what is being written; emptied when the store is opened
//! ```
//!
//! A file gets its name only when it is complete, verified and on the disk; a record is written after its files and
//! deleted before them. A crash at any point leaves at most files that no record needs, which [`Store::collect`]
//! removes. Compressed layers are not kept.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use tempfile::{NamedTempFile, TempPath};

use super::digest::{DiffId, Digest};
use super::document::ContainerDefaults;
use super::error::ImageError;

/// Image ID (hexadecimal) to a [`Record`] in JSON.
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");

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
    pub pinned: bool,
    pub defaults: ContainerDefaults,
}

/// The store. All methods block on the disk.
pub(super) struct Store {
    root: PathBuf,
    database: Database,
    /// Layers that requests under way need, with how many do. Held while files are removed, so that none of them is
    /// one that a request has just found to be there.
    pins: Mutex<HashMap<Digest, usize>>,
}

/// A file that is being written and has no name in the store yet; removed when dropped.
pub(super) struct Partial {
    pub file: File,
    pub path: TempPath,
}

/// Keeps layers and blobs from being collected while it lives.
pub(super) struct Pins<'a> {
    store: &'a Store,
    held: Vec<Digest>,
}

impl Store {
    /// Opens the store in `root`, makes it if it is not there, and removes what a crash has left.
    pub(super) fn open(root: &Path) -> Result<Self, ImageError> {
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
        let file = root.join("images.redb");
        let database = Database::create(&file).map_err(|error| ImageError::Database {
            path: file.clone(),
            reason: error.to_string(),
        })?;
        let store = Self {
            root: root.to_owned(),
            database,
            pins: Mutex::default(),
        };
        let transaction = store.db(store.database.begin_write())?;
        store.db(transaction.open_table(IMAGES).map(drop))?;
        store.db(transaction.commit())?;
        store.forget_incomplete()?;
        Ok(store)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn layer_path(&self, layer: &DiffId) -> PathBuf {
        self.root
            .join("layers")
            .join(format!("{}.erofs", layer.hex()))
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

    /// Gives a complete, synced layer its name.
    pub(super) fn publish_layer(&self, layer: &DiffId, path: TempPath) -> Result<(), ImageError> {
        self.publish(path, &self.layer_path(layer))
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
            .map(|layer| self.layer_path(layer))
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
    pub(super) fn pin(&self, digests: Vec<Digest>) -> Pins<'_> {
        let mut pins = self.pins();
        for digest in &digests {
            *pins.entry(*digest).or_default() += 1;
        }
        Pins {
            store: self,
            held: digests,
        }
    }

    fn pins(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        // Counts stay right whatever panicked.
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All records, by image ID.
    pub(super) fn records(&self) -> Result<Vec<Record>, ImageError> {
        let transaction = self.db(self.database.begin_read())?;
        let table = self.db(transaction.open_table(IMAGES))?;
        let mut records = Vec::new();
        for row in self.db(table.iter())? {
            let (_, value) = self.db(row)?;
            records.push(self.parse(value.value())?);
        }
        Ok(records)
    }

    /// Changes records in one transaction: what `change` makes of all of them is what is stored.
    pub(super) fn update<T>(
        &self,
        change: impl FnOnce(&mut Vec<Record>) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let transaction = self.db(self.database.begin_write())?;
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
    }

    /// Removes files that no record, no request and none of `in_use` needs. Returns how many bytes that freed.
    pub(super) fn collect(&self, in_use: &HashSet<DiffId>) -> Result<u64, ImageError> {
        let pins = self.pins();
        let mut needed: HashSet<Digest> = pins.keys().chain(in_use).copied().collect();
        for record in self.records()? {
            needed.insert(record.id);
            needed.extend(record.manifests);
            needed.extend(record.layers);
        }
        let mut freed = 0;
        for (directory, suffix) in [("blobs/sha256", ""), ("layers", ".erofs")] {
            let directory = self.root.join(directory);
            let read = |error| ImageError::disk("read", &directory, error);
            for entry in fs::read_dir(&directory).map_err(read)? {
                let entry = entry.map_err(read)?;
                let name = entry.file_name();
                let digest = name
                    .to_str()
                    .and_then(|name| name.strip_suffix(suffix))
                    .and_then(Digest::from_hex);
                if digest.is_some_and(|digest| !needed.contains(&digest)) {
                    let path = entry.path();
                    freed += entry.metadata().map_or(0, |file| file.blocks() * 512);
                    fs::remove_file(&path)
                        .map_err(|error| ImageError::disk("remove", &path, error))?;
                }
            }
        }
        Ok(freed)
    }

    /// Bytes and inodes that the store takes.
    pub(super) fn usage(&self) -> Result<(u64, u64), ImageError> {
        let (mut bytes, mut inodes) = (0, 0);
        for directory in ["", "blobs/sha256", "layers", "tmp"] {
            let directory = self.root.join(directory);
            let read = |error| ImageError::disk("read", &directory, error);
            for entry in fs::read_dir(&directory).map_err(read)? {
                match entry.map_err(read)?.metadata() {
                    Ok(file) => {
                        bytes += file.blocks() * 512;
                        inodes += 1;
                    }
                    // It went away meanwhile.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(read(error)),
                }
            }
        }
        Ok((bytes, inodes))
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

    fn db<T, E: Into<redb::Error>>(&self, result: Result<T, E>) -> Result<T, ImageError> {
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

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        let mut pins = self.store.pins();
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
