//! Where images come from: a registry, an OCI layout, an OCI archive or a `docker save` archive.

pub(super) mod archive;
mod docker;
mod files;
mod oci;
pub(super) mod registry;

use std::io::Read;

use super::digest::Digest;
use super::document::{
    Descriptor, Document, ImageDocument, MAX_INDEX_DEPTH, MAX_MANIFEST, Manifest, compression,
    is_foreign, select,
};
use super::error::ImageError;
use super::layer::LayerSpec;
use archive::Archive;
pub(super) use docker::docker_images;
use files::Files;
pub(super) use oci::oci_images;
use registry::Session;

/// Something that has blobs.
pub(super) enum Source {
    /// A repository in a registry.
    Registry(Session),
    /// A directory or an archive.
    Files(Files),
}

/// An image that was found in a source: what to fetch, not yet the layers.
pub(super) struct Found {
    /// The name for messages.
    pub what: String,
    /// Digest that the image is known by in its registry: of the index, if there is one.
    pub digest: Option<Digest>,
    /// Manifest and indexes, to keep.
    pub manifests: Vec<(Digest, Vec<u8>)>,
    /// The configuration; its digest is the image's ID.
    pub config: (Digest, Vec<u8>),
    pub document: ImageDocument,
    /// Lowest first, with where each is.
    pub layers: Vec<(LayerSpec, Location)>,
}

/// Where a layer is in its source.
#[derive(Debug, Clone)]
pub(super) enum Location {
    /// A blob.
    Blob(Digest, u64),
    /// A blob that the registry may not have: it is at one of these addresses.
    Foreign(Digest, u64, Vec<String>),
    /// A member of a `docker save` archive.
    Member(String),
}

impl Source {
    /// A small blob, in memory; size and digest are checked.
    pub(super) async fn small(
        &self,
        what: &str,
        blob: &Descriptor,
        limit: u64,
    ) -> Result<Vec<u8>, ImageError> {
        if blob.size > limit {
            return Err(ImageError::too_large(
                what,
                format!(
                    "a document has {} bytes, and {limit} is the limit",
                    blob.size
                ),
            ));
        }
        let bytes = match self {
            Self::Registry(session) => session.small(blob).await?,
            Self::Files(files) => files.small(&blob.digest, blob.size)?,
        };
        let found = Digest::of(&bytes);
        if bytes.len() as u64 != blob.size {
            return Err(ImageError::corrupt(
                what,
                format!(
                    "{} has {} bytes, and {} are stated",
                    blob.digest,
                    bytes.len(),
                    blob.size
                ),
            ));
        }
        if found != blob.digest {
            return Err(ImageError::corrupt(
                what,
                format!("{} has the content of {found}", blob.digest),
            ));
        }
        Ok(bytes)
    }

    /// A manifest or an index, by its descriptor.
    async fn manifest(&self, what: &str, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        match self {
            Self::Registry(session) => {
                let (digest, bytes) = session.manifest(&descriptor.digest.to_string()).await?;
                if digest != descriptor.digest {
                    return Err(ImageError::corrupt(
                        what,
                        format!("{} has the content of {digest}", descriptor.digest),
                    ));
                }
                Ok(bytes)
            }
            Self::Files(_) => self.small(what, descriptor, MAX_MANIFEST).await,
        }
    }

    /// Follows a manifest or index to the image for linux/amd64, and reads its configuration. `foreign`: whether its
    /// layers may be elsewhere.
    pub(super) async fn resolve(
        &self,
        what: &str,
        digest: Digest,
        bytes: Vec<u8>,
        foreign: bool,
    ) -> Result<Found, ImageError> {
        let mut manifests = vec![(digest, bytes)];
        for _ in 0..=MAX_INDEX_DEPTH {
            let (_, bytes) = &manifests[manifests.len() - 1];
            match Document::parse(what, bytes)? {
                Document::Index(entries) => {
                    let chosen = select(what, &entries)?;
                    let bytes = self.manifest(what, &chosen).await?;
                    manifests.push((chosen.digest, bytes));
                }
                Document::Manifest(manifest) => {
                    if !foreign && let Some(layer) = manifest.layers.iter().find(|l| is_foreign(l))
                    {
                        let reason = format!(
                            "the layer {} is not distributed by registries; set images.foreign_layers = true to fetch such layers from where the manifest says",
                            layer.digest
                        );
                        return Err(ImageError::unsupported(what, reason));
                    }
                    return self.found(what, digest, manifests, manifest).await;
                }
            }
        }
        Err(ImageError::too_large(
            what,
            format!("its indexes are nested more than {MAX_INDEX_DEPTH} deep"),
        ))
    }

    async fn found(
        &self,
        what: &str,
        digest: Digest,
        manifests: Vec<(Digest, Vec<u8>)>,
        manifest: Manifest,
    ) -> Result<Found, ImageError> {
        // The types are checked before anything large moves.
        let compressions: Result<Vec<_>, _> = manifest
            .layers
            .iter()
            .map(|layer| compression(what, layer))
            .collect();
        let config = self
            .small(what, &manifest.config, super::document::MAX_CONFIG)
            .await?;
        let document = ImageDocument::parse(what, &config, manifest.layers.len())?;
        let layers = manifest
            .layers
            .iter()
            .zip(&document.diff_ids)
            .zip(compressions?)
            .map(|((layer, diff_id), compression)| {
                let blob = Some((layer.digest, layer.size));
                let spec = LayerSpec {
                    blob,
                    compression: Some(compression),
                    diff_id: *diff_id,
                };
                let location = match &layer.urls {
                    Some(urls) if is_foreign(layer) && !urls.is_empty() => {
                        Location::Foreign(layer.digest, layer.size, urls.clone())
                    }
                    _ => Location::Blob(layer.digest, layer.size),
                };
                (spec, location)
            })
            .collect();
        let config = (manifest.config.digest, config);
        Ok(Found {
            what: what.to_owned(),
            digest: Some(digest),
            manifests,
            config,
            document,
            layers,
        })
    }

    /// The content of a layer, from its beginning. Reading it blocks.
    pub(super) fn open(&self, location: &Location) -> Result<Box<dyn Read + Send>, ImageError> {
        match (self, location) {
            (Self::Registry(session), Location::Blob(digest, size)) => {
                Ok(Box::new(session.stream(*digest, *size, &[])?))
            }
            (Self::Registry(session), Location::Foreign(digest, size, urls)) => {
                Ok(Box::new(session.stream(*digest, *size, urls)?))
            }
            (
                Self::Files(files),
                Location::Blob(digest, size) | Location::Foreign(digest, size, _),
            ) => files.open(digest, *size),
            (Self::Files(Files::Archive(archive)), Location::Member(name)) => archive.open(name),
            _ => Err(ImageError::Internal {
                reason: "a layer's place does not fit its source".to_owned(),
            }),
        }
    }
}

/// Bytes that the source says a layer has, for progress; 0 if it does not say.
pub(super) fn stated_size(source: &Source, location: &Location) -> u64 {
    match (source, location) {
        (_, Location::Blob(_, size) | Location::Foreign(_, size, _)) => *size,
        (Source::Files(Files::Archive(archive)), Location::Member(name)) => {
            archive.size(name).unwrap_or(0)
        }
        _ => 0,
    }
}

/// Opens a directory or an archive to load images from. `scratch` makes a file for an archive that is compressed.
pub(super) fn open_files(
    path: &std::path::Path,
    limit: u64,
    scratch: impl FnOnce() -> Result<std::fs::File, ImageError>,
) -> Result<Files, ImageError> {
    let kind = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => ImageError::NotFound {
            what: path.display().to_string(),
            place: "the file system".to_owned(),
        },
        _ => ImageError::disk("open", path, error),
    })?;
    if kind.is_dir() {
        return Ok(Files::Layout(path.to_owned()));
    }
    if !kind.is_file() {
        return Err(ImageError::unsupported(
            path.display().to_string(),
            "it is neither a directory nor a regular file",
        ));
    }
    Archive::open_file(path, limit, scratch).map(Files::Archive)
}
