//! The image service as the rest of the daemon sees it.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Semaphore;

use super::config::ImageConfig;
use super::digest::{DiffId, Digest};
use super::document::ContainerDefaults;
use super::error::ImageError;
use super::layer::UnpackLimits;
use super::policy::policy_for;
use super::reference::Reference;
use super::store::{Pins, Record, Store};

/// Fewest digits of an image ID that name an image.
const MIN_PREFIX: usize = 3;

/// An image that is here with all its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// `sha256:` and the digest of its configuration.
    pub id: String,
    /// Full names with tags: `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// Full names with digests: `docker.io/library/busybox@sha256:…`.
    pub repo_digests: Vec<String>,
    /// Bytes that it takes on the disk. Layers that it shares with others are counted.
    pub size: u64,
    /// What its containers start with.
    pub config: ContainerDefaults,
    /// Diff IDs of its layers, the lowest first.
    pub layers: Vec<DiffId>,
    /// Whether garbage collection must leave it alone (CRI `Image.pinned`).
    pub pinned: bool,
    /// Keeps its layers from being collected, if it is about to be used.
    held: Held,
}

/// Pins behind an [`Image`] and its clones; no part of what it is.
#[derive(Clone, Default)]
struct Held(Option<Arc<Pins>>);

impl PartialEq for Held {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Held {}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Held" } else { "-" })
    }
}

/// What [`Images::remove`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that are gone.
    pub names: Vec<String>,
    /// ID of the image, if it is gone and did not only lose a name.
    pub image: Option<String>,
    /// Bytes that became free on the disk.
    pub freed: u64,
}

/// What [`Images::prune`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// IDs of the images that are gone.
    pub images: Vec<String>,
    /// Bytes that became free on the disk.
    pub freed: u64,
}

/// What the store takes of the disk (CRI `ImageFsInfo`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes.
    pub used_bytes: u64,
    /// Files.
    pub inodes: u64,
}

/// The images of a node. Clones share everything.
#[derive(Clone)]
pub struct Images(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub store: Store,
    pub config: ImageConfig,
    /// How many layers are worked on at once.
    pub workers: Arc<Semaphore>,
    /// A lock for each layer that is being made, so that it is made once.
    layers: Mutex<HashMap<DiffId, Weak<tokio::sync::Mutex<()>>>>,
}

impl Shared {
    /// The lock of a layer.
    pub(super) fn layer_lock(&self, layer: &DiffId) -> Arc<tokio::sync::Mutex<()>> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = layers.get(layer).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        layers.insert(*layer, Arc::downgrade(&lock));
        lock
    }

    pub(super) fn limits(&self) -> UnpackLimits {
        UnpackLimits {
            max_bytes: self.config.max_unpacked_bytes,
            max_ratio: self.config.max_unpack_ratio.max(1),
        }
    }

    /// An image as the rest of the daemon sees it.
    pub(super) fn image(&self, record: &Record) -> Image {
        let named = |pinned: &Reference| {
            let name = pinned.to_string();
            record.tags.contains(&name) || record.digests.contains(&name)
        };
        Image {
            id: record.id.to_string(),
            repo_tags: record.tags.clone(),
            repo_digests: record.digests.clone(),
            size: record.size,
            config: record.defaults.clone(),
            layers: record.layers.clone(),
            pinned: self.config.pinned.iter().any(named),
            held: Held::default(),
        }
    }

    /// Whether the image may be used under this full name of it: if a signature is demanded, it was verified for the name,
    /// with the key that is configured now.
    fn may_use(&self, record: &Record, name: &str) -> bool {
        let policies = &self.config.policies;
        let Ok(reference) = name.parse::<Reference>() else {
            return policies.is_empty();
        };
        policy_for(policies, &reference)
            .is_none_or(|policy| record.verified.get(name) == Some(&policy.key_id()))
    }

    /// Whether it may be used by its ID: under any of its names, or without one.
    fn may_use_by_id(&self, record: &Record) -> bool {
        let mut names = record.tags.iter().chain(&record.digests).peekable();
        names.peek().is_none() || names.any(|name| self.may_use(record, name))
    }
}

impl Images {
    /// Opens the store in `<root>/images`, and makes it if it is not there. It blocks on the disk.
    ///
    /// # Errors
    /// [`ImageError::Disk`] and [`ImageError::Database`], the latter also if another process has the store open.
    pub fn open(root: &Path, config: ImageConfig) -> Result<Self, ImageError> {
        let store = Store::open(&root.join("images"), config.verity)?;
        let workers = Arc::new(Semaphore::new(config.parallel_layers.clamp(1, 64)));
        Ok(Self(Arc::new(Shared {
            store,
            config,
            workers,
            layers: Mutex::default(),
        })))
    }

    /// The image that `name` means: a reference, an image ID, or the beginning of one. `None` if it is not here, and also
    /// if its name demands a signature that was not verified: it has to be pulled then. While the result or a clone
    /// of it lives, the image's layers are not collected.
    ///
    /// # Errors
    /// [`ImageError::InvalidReference`], [`ImageError::Ambiguous`], [`ImageError::Database`].
    pub async fn get(&self, name: &str) -> Result<Option<Image>, ImageError> {
        let name = name.to_owned();
        self.blocking(move |shared| {
            let held = shared.store.hold(|records| {
                let usable = find(&records, &name)?.filter(|(record, named)| match named {
                    Some(name) => shared.may_use(record, &name.full),
                    None => shared.may_use_by_id(record),
                });
                Ok(usable.map(|(record, _)| record.clone()))
            })?;
            Ok(held.map(|(record, pins)| Image {
                held: Held(Some(Arc::new(pins))),
                ..shared.image(&record)
            }))
        })
        .await
    }

    /// As [`Images::get`], but whether or not the image may be used: to see it, and to remove it.
    ///
    /// # Errors
    /// Those of [`Images::get`].
    pub async fn find(&self, name: &str) -> Result<Option<Image>, ImageError> {
        let name = name.to_owned();
        self.blocking(move |shared| {
            let records = shared.store.records()?;
            Ok(find(&records, &name)?.map(|(record, _)| shared.image(record)))
        })
        .await
    }

    /// The configuration (OCI "config.md") of an image that is here.
    ///
    /// # Errors
    /// [`ImageError::Disk`], [`ImageError::Corrupt`].
    pub async fn configuration(&self, image: &Image) -> Result<serde_json::Value, ImageError> {
        let id: Digest = image.id.parse()?;
        self.blocking(move |shared| {
            let bytes = shared.store.read_blob(&id)?;
            serde_json::from_slice(&bytes)
                .map_err(|error| ImageError::corrupt(id.to_string(), error.to_string()))
        })
        .await
    }

    /// All images.
    ///
    /// # Errors
    /// [`ImageError::Database`].
    pub async fn list(&self) -> Result<Vec<Image>, ImageError> {
        self.blocking(|shared| {
            Ok(shared
                .store
                .records()?
                .iter()
                .map(|record| shared.image(record))
                .collect())
        })
        .await
    }

    /// Removes a tag and, with its last tag, the image; an image that is named by its ID or by a digest goes with
    /// all its names. Layers that other images have, and those in `in_use` by containers, stay.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] if it is not here (for CRI that is success), and those of [`Images::get`].
    pub async fn remove(
        &self,
        name: &str,
        in_use: impl FnOnce() -> HashSet<DiffId> + Send + 'static,
    ) -> Result<Removed, ImageError> {
        let name = name.to_owned();
        self.blocking(move |shared| {
            let mut removed = shared.store.update(|records| {
                let Some((record, named)) = find(records, &name)? else {
                    return Err(ImageError::NotFound {
                        what: name.clone(),
                        place: "the image store".to_owned(),
                    });
                };
                let id = record.id;
                let tag = named.filter(|name| name.is_tag && record.tags.len() > 1);
                if let Some(tag) = tag.map(|name| name.full) {
                    for record in records.iter_mut().filter(|record| record.id == id) {
                        record.tags.retain(|other| *other != tag);
                        record.verified.remove(&tag);
                    }
                    return Ok(Removed {
                        names: vec![tag],
                        ..Removed::default()
                    });
                }
                let names = record.tags.iter().chain(&record.digests).cloned().collect();
                records.retain(|record| record.id != id);
                Ok(Removed {
                    names,
                    image: Some(id.to_string()),
                    freed: 0,
                })
            })?;
            removed.freed = shared.store.collect(in_use)?;
            Ok(removed)
        })
        .await
    }

    /// Removes images that have no tag or, with `all`, every image; but none that is pinned, and none with a
    /// container: `used` has their IDs, and `in_use` their layers.
    ///
    /// # Errors
    /// [`ImageError::Disk`], [`ImageError::Database`].
    pub async fn prune(
        &self,
        all: bool,
        used: HashSet<String>,
        in_use: impl FnOnce() -> HashSet<DiffId> + Send + 'static,
    ) -> Result<Pruned, ImageError> {
        self.blocking(move |shared| {
            let images = shared.store.update(|records| {
                let mut gone = Vec::new();
                records.retain(|record| {
                    let image = shared.image(record);
                    let wanted = !all && !record.tags.is_empty();
                    let stays = wanted || image.pinned || used.contains(&image.id);
                    if !stays {
                        gone.push(image.id);
                    }
                    stays
                });
                Ok(gone)
            })?;
            Ok(Pruned {
                images,
                freed: shared.store.collect(in_use)?,
            })
        })
        .await
    }

    /// Removes files that no image needs and that are not `in_use`: what a crash, or the end of a container whose
    /// image had been removed, left. Returns the bytes that became free.
    ///
    /// # Errors
    /// [`ImageError::Disk`], [`ImageError::Database`].
    pub async fn gc(
        &self,
        in_use: impl FnOnce() -> HashSet<DiffId> + Send + 'static,
    ) -> Result<u64, ImageError> {
        self.blocking(move |shared| shared.store.collect(in_use))
            .await
    }

    /// What the store takes of the disk.
    ///
    /// # Errors
    /// [`ImageError::Disk`].
    pub async fn fs_info(&self) -> Result<FsInfo, ImageError> {
        self.blocking(|shared| {
            let usage = shared.store.usage();
            Ok(FsInfo {
                path: shared.store.root().to_owned(),
                used_bytes: usage.bytes,
                inodes: usage.inodes,
            })
        })
        .await
    }

    /// The EROFS files of an image's layers, the lowest first, to be used now: with `images.verity` each is checked.
    ///
    /// # Errors
    /// [`ImageError::Changed`], [`ImageError::Disk`], [`ImageError::Database`].
    pub async fn layers_to_use(&self, image: &Image) -> Result<Vec<PathBuf>, ImageError> {
        self.files_to_use(image.layers.clone()).await
    }

    /// The same of these layers, whatever image they belong to.
    ///
    /// # Errors
    /// See [`Images::layers_to_use`].
    pub async fn files_to_use(&self, layers: Vec<DiffId>) -> Result<Vec<PathBuf>, ImageError> {
        self.blocking(move |shared| {
            shared.store.check_seals(&layers)?;
            let paths = layers.iter().map(|layer| shared.store.layer_path(layer));
            Ok(paths.collect())
        })
        .await
    }

    /// The EROFS files of an image's layers, the lowest first.
    pub fn layer_paths(&self, image: &Image) -> Vec<PathBuf> {
        image
            .layers
            .iter()
            .map(|layer| self.layer_path(layer))
            .collect()
    }

    /// The EROFS file of a layer.
    pub fn layer_path(&self, layer: &DiffId) -> PathBuf {
        self.0.store.layer_path(layer)
    }

    /// Runs work that blocks on the disk beside the runtime's threads.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let shared = self.0.clone();
        match tokio::task::spawn_blocking(move || work(&shared)).await {
            Ok(result) => result,
            Err(error) => Err(ImageError::Internal {
                reason: error.to_string(),
            }),
        }
    }
}

/// The name by which an image was found.
pub(super) struct Named {
    /// In full.
    pub full: String,
    /// Whether it has a tag; else it has a digest.
    pub is_tag: bool,
}

/// Finds what `name` means among `records`, with its full name if it is not an ID.
pub(super) fn find<'a>(
    records: &'a [Record],
    name: &str,
) -> Result<Option<(&'a Record, Option<Named>)>, ImageError> {
    if name.starts_with("sha256:") {
        let id: Digest = name.parse()?;
        let record = records.iter().find(|record| record.id == id);
        return Ok(record.map(|record| (record, None)));
    }
    let is_hex = |text: &str| {
        text.bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let reference = name.parse::<Reference>();
    if let Ok(reference) = &reference {
        let named = match (reference.tagged(), reference.digest()) {
            (Some(full), _) => Some(Named { full, is_tag: true }),
            (None, Some(digest)) => Some(Named {
                full: reference.with_digest(digest),
                is_tag: false,
            }),
            (None, None) => None,
        };
        if let Some(named) = named
            && let Some(record) = records.iter().find(|record| {
                record.tags.contains(&named.full) || record.digests.contains(&named.full)
            })
        {
            return Ok(Some((record, Some(named))));
        }
    }
    if (MIN_PREFIX..=64).contains(&name.len()) && is_hex(name) {
        let mut matching = records
            .iter()
            .filter(|record| record.id.hex().starts_with(name));
        return match (matching.next(), matching.count()) {
            (None, _) => Ok(None),
            (Some(record), 0) => Ok(Some((record, None))),
            (Some(_), more) => Err(ImageError::Ambiguous {
                prefix: name.to_owned(),
                count: more + 1,
            }),
        };
    }
    reference.map(|_| None)
}

#[cfg(test)]
mod tests;
