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
use super::reference::Reference;
use super::store::{Record, Store};

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
    /// Whether kubelet's garbage collection must leave it alone (CRI `Image.pinned`).
    pub pinned: bool,
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
}

impl Images {
    /// Opens the store in `<root>/images`, and makes it if it is not there. It blocks on the disk.
    ///
    /// # Errors
    /// [`ImageError::Disk`] and [`ImageError::Database`], the latter also if another process has the store open.
    pub fn open(root: &Path, config: ImageConfig) -> Result<Self, ImageError> {
        let store = Store::open(&root.join("images"))?;
        let workers = Arc::new(Semaphore::new(config.parallel_layers.clamp(1, 64)));
        Ok(Self(Arc::new(Shared {
            store,
            config,
            workers,
            layers: Mutex::default(),
        })))
    }

    /// The image that `name` means: a reference, an image ID, or the beginning of one. `None` if it is not here.
    ///
    /// # Errors
    /// [`ImageError::InvalidReference`], [`ImageError::Ambiguous`], [`ImageError::Database`].
    pub async fn get(&self, name: &str) -> Result<Option<Image>, ImageError> {
        let name = name.to_owned();
        self.blocking(move |shared| {
            Ok(find(&shared.store.records()?, &name)?.map(|(record, _)| record.into()))
        })
        .await
    }

    /// All images.
    ///
    /// # Errors
    /// [`ImageError::Database`].
    pub async fn list(&self) -> Result<Vec<Image>, ImageError> {
        self.blocking(|shared| Ok(shared.store.records()?.iter().map(Image::from).collect()))
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
        in_use: &HashSet<DiffId>,
    ) -> Result<Removed, ImageError> {
        let (name, in_use) = (name.to_owned(), in_use.clone());
        self.blocking(move |shared| {
            let mut removed = shared.store.update(|records| {
                let Some((record, tag)) = find(records, &name)? else {
                    return Err(ImageError::NotFound {
                        what: name,
                        place: "the image store".to_owned(),
                    });
                };
                let id = record.id;
                if let Some(tag) = tag.filter(|_| record.tags.len() > 1) {
                    for record in records.iter_mut().filter(|record| record.id == id) {
                        record.tags.retain(|other| *other != tag);
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
            removed.freed = shared.store.collect(&in_use)?;
            Ok(removed)
        })
        .await
    }

    /// Removes files that no image needs and that are not `in_use`: what a crash, or the end of a container whose
    /// image had been removed, left. Returns the bytes that became free.
    ///
    /// # Errors
    /// [`ImageError::Disk`], [`ImageError::Database`].
    pub async fn gc(&self, in_use: &HashSet<DiffId>) -> Result<u64, ImageError> {
        let in_use = in_use.clone();
        self.blocking(move |shared| shared.store.collect(&in_use))
            .await
    }

    /// Marks an image as pinned, or not.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], and those of [`Images::get`].
    pub async fn set_pinned(&self, name: &str, pinned: bool) -> Result<(), ImageError> {
        let name = name.to_owned();
        self.blocking(move |shared| {
            shared.store.update(|records| {
                let Some((record, _)) = find(records, &name)? else {
                    return Err(ImageError::NotFound {
                        what: name,
                        place: "the image store".to_owned(),
                    });
                };
                let id = record.id;
                records
                    .iter_mut()
                    .filter(|record| record.id == id)
                    .for_each(|record| record.pinned = pinned);
                Ok(())
            })
        })
        .await
    }

    /// What the store takes of the disk.
    ///
    /// # Errors
    /// [`ImageError::Disk`].
    pub async fn fs_info(&self) -> Result<FsInfo, ImageError> {
        self.blocking(|shared| {
            let (used_bytes, inodes) = shared.store.usage()?;
            Ok(FsInfo {
                path: shared.store.root().to_owned(),
                used_bytes,
                inodes,
            })
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

impl From<&Record> for Image {
    fn from(record: &Record) -> Self {
        Self {
            id: record.id.to_string(),
            repo_tags: record.tags.clone(),
            repo_digests: record.digests.clone(),
            size: record.size,
            config: record.defaults.clone(),
            layers: record.layers.clone(),
            pinned: record.pinned,
        }
    }
}

/// Finds what `name` means among `records`, with the tag if it was named by one.
fn find<'a>(
    records: &'a [Record],
    name: &str,
) -> Result<Option<(&'a Record, Option<String>)>, ImageError> {
    if name.starts_with("sha256:") {
        let id: Digest = name.parse()?;
        return Ok(records
            .iter()
            .find(|record| record.id == id)
            .map(|record| (record, None)));
    }
    let is_hex = |text: &str| {
        text.bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let reference = name.parse::<Reference>();
    if let Ok(reference) = &reference {
        let found = match (reference.tagged(), reference.digest()) {
            (Some(tag), _) => records
                .iter()
                .find(|record| record.tags.contains(&tag))
                .map(|record| (record, Some(tag))),
            (None, Some(digest)) => {
                let full = reference.with_digest(digest);
                records
                    .iter()
                    .find(|record| record.digests.contains(&full))
                    .map(|record| (record, None))
            }
            (None, None) => None,
        };
        if found.is_some() {
            return Ok(found);
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
