//! Bringing images in: pull and load.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};

use super::digest::Digest;
use super::error::ImageError;
use super::images::{Image, Images, Shared};
use super::layer::{self, LayerSpec, Outputs, Watch};
use super::policy::policy_for;
use super::reference::Reference;
use super::source::registry::{Activity, Auth, EndOnDrop, Session};
use super::source::{self, Found, Location, Source};
use super::store::Record;

/// How often progress is reported.
const TICK: Duration = Duration::from_millis(100);

/// How far a part of a pull is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The image's name, or 12 digits of a layer's diff ID.
    pub item: String,
    /// Bytes that have moved.
    pub done: u64,
    /// Bytes in all; 0 if that is not known.
    pub total: u64,
    /// What is being done.
    pub status: Status,
}

/// What is being done with a [`Progress::item`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The manifest is being looked for.
    Resolving,
    /// The layer waits for its turn, or for another pull that fetches it.
    Waiting,
    /// The layer is being fetched, verified and written, all at once.
    Pulling,
    /// The layer was here.
    Exists,
    /// The layer is complete; or, for the image, everything is.
    Done,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Resolving => "resolving",
            Self::Waiting => "waiting",
            Self::Pulling => "pulling",
            Self::Exists => "exists",
            Self::Done => "done",
        })
    }
}

/// Where progress goes.
type Report<'a> = &'a (dyn Fn(Progress) + Send + Sync);

impl Images {
    /// Fetches an image from its registry, or its registry's mirrors, and names it. Only layers that are not here move.
    ///
    /// Dropping the future ends the work and leaves nothing behind.
    ///
    /// # Errors
    /// All of [`ImageError`].
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<Image, ImageError> {
        let reference: Reference = reference.parse()?;
        let what = reference.to_string();
        progress(Progress {
            item: what.clone(),
            done: 0,
            total: 0,
            status: Status::Resolving,
        });
        let activity = Arc::new(Activity::default());
        let _end = EndOnDrop(&activity);
        let limit = Duration::from_secs(self.0.config.progress_timeout_seconds);
        tokio::select! {
            result = self.fetch(&reference, auth.as_ref(), activity.clone(), &progress) => result,
            () = activity.stalled(limit) => Err(ImageError::Stalled {
                registry: reference.host().to_owned(),
                what,
                seconds: limit.as_secs(),
            }),
        }
    }

    async fn fetch(
        &self,
        reference: &Reference,
        auth: Option<&Auth>,
        activity: Arc<Activity>,
        progress: Report<'_>,
    ) -> Result<Image, ImageError> {
        let what = reference.to_string();
        let asked = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let config = &self.0.config;
        let session = Session::open(reference, auth, config, activity)?;
        let (digest, manifest) = session.manifest(&asked).await?;
        // Before anything is fetched by what the manifest says.
        let key = match policy_for(&config.policies, reference) {
            None => None,
            Some(policy) => {
                policy.verify(&session, reference, &digest).await?;
                Some(policy.key_id())
            }
        };
        let source = Source::Registry(session);
        let found = source
            .resolve(&what, digest, manifest, config.foreign_layers)
            .await?;
        let names = std::slice::from_ref(reference);
        self.bring(source.into(), found, names, key, progress).await
    }

    /// Loads the images of an OCI layout (a directory), an OCI archive or a `docker save` archive, which may be
    /// compressed. `name` names the image; without it, the names in the layout or archive count.
    ///
    /// # Errors
    /// All of [`ImageError`] but those of registries.
    pub async fn load(
        &self,
        path: &Path,
        name: Option<&str>,
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<Vec<Image>, ImageError> {
        let name: Option<Reference> = name.map(str::parse).transpose()?;
        if let Some(name) = name.as_ref().filter(|name| name.digest().is_some()) {
            return Err(ImageError::InvalidReference {
                reference: name.to_string(),
                reason: "an image that is loaded can be given a tag, and its digest is its own"
                    .to_owned(),
            });
        }
        name.as_ref().map_or(Ok(()), |name| self.may_load(name))?;
        let (path, wanted) = (path.to_owned(), name.clone());
        let (files, oci, docker) = self
            .blocking(move |shared| {
                let files = source::open_files(&path, shared.config.max_unpacked_bytes, || shared.store.scratch())?;
                let oci = source::oci_images(&files, wanted.as_ref())?;
                let docker = match oci {
                    None => source::docker_images(&files)?,
                    Some(_) => None,
                };
                if oci.is_none() && docker.is_none() {
                    let reason = "it is no OCI layout and no archive of images: it has neither oci-layout nor manifest.json";
                    return Err(ImageError::unsupported(path.display().to_string(), reason));
                }
                Ok((files, oci, docker))
            })
            .await?;
        let in_oci = oci.iter().flatten().filter_map(|(_, name)| name.as_ref());
        let in_docker = docker.iter().flatten().flat_map(|(_, names)| names);
        for found in in_oci.chain(in_docker) {
            self.may_load(found)?;
        }
        let source = Arc::new(Source::Files(files));
        let mut images = Vec::new();
        for (entry, reference) in oci.into_iter().flatten() {
            let what = reference
                .as_ref()
                .map_or_else(|| entry.digest.to_string(), Reference::to_string);
            let bytes = source.top(&what, &entry).await?;
            let found = source.resolve(&what, entry.digest, bytes, true).await?;
            let names: Vec<Reference> = reference.into_iter().collect();
            images.push(
                self.bring(source.clone(), found, &names, None, &progress)
                    .await?,
            );
        }
        let docker = docker.unwrap_or_default();
        if name.is_some() && docker.len() > 1 {
            let reason =
                "it has several images, which one name cannot name; load it without a name";
            return Err(ImageError::unsupported("the archive", reason));
        }
        for (found, names) in docker {
            let names = name.clone().map_or(names, |name| vec![name]);
            images.push(
                self.bring(source.clone(), found, &names, None, &progress)
                    .await?,
            );
        }
        Ok(images)
    }

    /// A file brings no signature, so what is loaded cannot have a name for which one is demanded.
    fn may_load(&self, name: &Reference) -> Result<(), ImageError> {
        match policy_for(&self.0.config.policies, name) {
            None => Ok(()),
            Some(_) => Err(ImageError::Untrusted {
                what: name.to_string(),
                reason: "a file has no signature; pull it, or load it under another name"
                    .to_owned(),
            }),
        }
    }

    /// Brings in what is missing of an image, and then records it; with the key that its names were verified with.
    async fn bring(
        &self,
        source: Arc<Source>,
        found: Found,
        names: &[Reference],
        key: Option<Digest>,
        progress: Report<'_>,
    ) -> Result<Image, ImageError> {
        let layers: Vec<Digest> = found.document.diff_ids.clone();
        let manifests: Vec<Digest> = found.manifests.iter().map(|(digest, _)| *digest).collect();
        // From here to the record, nobody removes what this image needs.
        let needed = layers
            .iter()
            .chain(&manifests)
            .chain([&found.config.0])
            .copied()
            .collect();
        let pins = self.0.store.pin(needed);
        let unpacked = Arc::default();
        let mut work: FuturesUnordered<_> = found
            .layers
            .iter()
            .map(|(spec, location)| {
                let watch = Watch {
                    unpacked: Arc::clone(&unpacked),
                    ..Watch::default()
                };
                self.layer(
                    source.clone(),
                    spec.clone(),
                    location.clone(),
                    watch,
                    progress,
                )
            })
            .collect();
        while let Some(result) = work.next().await {
            result?;
        }
        let tags: Vec<String> = names.iter().filter_map(Reference::tagged).collect();
        let digests: Vec<String> = names
            .iter()
            .filter_map(|name| found.digest.map(|digest| name.with_digest(&digest)))
            .collect();
        let verified = key.map_or_else(BTreeMap::new, |key| {
            let names = tags.iter().chain(&digests);
            names.map(|name| (name.clone(), key)).collect()
        });
        let record = Record {
            id: found.config.0,
            tags,
            digests,
            manifests,
            layers,
            size: 0,
            defaults: found.document.defaults,
            verified,
        };
        let blobs: Vec<(Digest, Vec<u8>)> =
            found.manifests.into_iter().chain([found.config]).collect();
        let image = self
            .blocking(move |shared| record_image(shared, &blobs, record))
            .await?;
        drop(pins);
        progress(Progress {
            item: found.what,
            done: image.size,
            total: image.size,
            status: Status::Done,
        });
        Ok(image)
    }

    /// Makes a layer, unless it is here or somebody else makes it.
    async fn layer(
        &self,
        source: Arc<Source>,
        spec: LayerSpec,
        location: Location,
        watch: Watch,
        progress: Report<'_>,
    ) -> Result<(), ImageError> {
        let total = source::stated_size(&source, &location);
        let item = spec.diff_id.short();
        let report = |done, status| {
            progress(Progress {
                item: item.clone(),
                done,
                total,
                status,
            })
        };
        if total > self.0.config.max_unpacked_bytes {
            let limit = self.0.config.max_unpacked_bytes;
            let reason = format!("it has {total} bytes, and the limit is {limit}");
            return Err(ImageError::too_large(spec.what(), reason));
        }
        report(0, Status::Waiting);
        let lock = self.0.layer_lock(&spec.diff_id).lock_owned().await;
        if self.0.store.has_usable_layer(&spec.diff_id)? {
            report(total, Status::Exists);
            return Ok(());
        }
        let worker = self.0.workers.clone().acquire_owned().await;
        let worker = worker.map_err(|_| ImageError::Cancelled { what: spec.what() })?;
        report(0, Status::Pulling);
        let _cancel = CancelOnDrop(watch.clone());
        let read = watch.read.clone();
        let work = self.blocking(move |shared| {
            // The layer is this task's until it ends, even if nobody waits for it any more.
            let _held = (lock, worker);
            make_layer(shared, &source, &spec, &location, &watch)
        });
        tokio::pin!(work);
        loop {
            tokio::select! {
                result = &mut work => {
                    result?;
                    report(total, Status::Done);
                    return Ok(());
                }
                () = tokio::time::sleep(TICK) => report(read.load(Ordering::Relaxed), Status::Pulling),
            }
        }
    }
}

/// Ends the conversion when the future that waits for it is dropped.
struct CancelOnDrop(Watch);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }
}

fn make_layer(
    shared: &Shared,
    source: &Source,
    spec: &LayerSpec,
    location: &Location,
    watch: &Watch,
) -> Result<(), ImageError> {
    let blob = source.open(location)?;
    let image = shared.store.partial_layer()?;
    let recipe = shared.store.partial()?;
    let outputs = Outputs {
        image: image.file,
        path: &image.path,
        recipe: recipe.file,
        spool: shared.store.scratch()?,
    };
    layer::convert(spec, blob, outputs, &shared.limits(), watch)?;
    shared
        .store
        .publish_layer(&spec.diff_id, image.path, recipe.path)
}

/// Writes the documents, then the record; names move here from images that had them.
fn record_image(
    shared: &Shared,
    blobs: &[(Digest, Vec<u8>)],
    record: Record,
) -> Result<Image, ImageError> {
    for (digest, bytes) in blobs {
        shared.store.write_blob(digest, bytes)?;
    }
    let image = shared.store.update(|records| {
        let mut record = record.clone();
        for other in records.iter_mut() {
            other.tags.retain(|tag| !record.tags.contains(tag));
            other.verified.retain(|name, _| !record.tags.contains(name));
        }
        if let Some(at) = records.iter().position(|other| other.id == record.id) {
            let old = records.swap_remove(at);
            let merge = |to: &mut Vec<_>, from: Vec<_>| {
                to.extend(from);
                to.sort();
                to.dedup();
            };
            merge(&mut record.tags, old.tags);
            merge(&mut record.digests, old.digests);
            record.manifests.extend(old.manifests);
            record.manifests.sort();
            record.manifests.dedup();
            let mut verified = old.verified;
            verified.append(&mut record.verified);
            record.verified = verified;
        }
        record.size = shared.store.size_of(&record);
        records.push(record.clone());
        Ok(record)
    })?;
    Ok(shared.image(&image))
}
