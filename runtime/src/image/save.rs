//! Images as an archive, which other tools load too.
//!
//! The archive is an OCI layout in a tar file with Docker's manifest.json beside it, as `docker save` writes it.
//! The compressed layers of the registry are not kept, so the archive has the layers' tar streams: with the same diff IDs,
//! hence the same image ID, and a manifest of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};

use serde_json::{Value, json};

use super::digest::{DiffId, Digest, Hasher};
use super::error::ImageError;
use super::images::{Images, Shared, find};
use super::reference::Reference;
use super::store::Record;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

impl Images {
    /// Writes images to `to` as an OCI archive: those that `names` mean, each under the tag by which it is named, or
    /// under all its tags if it is named otherwise. Every layer is verified as it is written, so an error may come late: what
    /// was written is of no use then.
    ///
    /// # Errors
    /// [`ImageError::NotFound`]; [`ImageError::Corrupt`] for a layer that the disk has changed; [`ImageError::Disk`], also
    /// for `to`.
    pub async fn save(
        &self,
        names: &[String],
        to: impl Write + Send + 'static,
    ) -> Result<(), ImageError> {
        let names = names.to_vec();
        self.blocking(move |shared| {
            let mut chosen: Vec<(Record, BTreeSet<String>)> = Vec::new();
            let mut held = Vec::new();
            for name in &names {
                let mut tags = BTreeSet::new();
                let found = shared.store.hold(|records| {
                    let Some((record, named)) = find(&records, name)? else {
                        return Ok(None);
                    };
                    match named.filter(|name| name.is_tag) {
                        Some(name) => tags.insert(name.full),
                        None => {
                            tags.extend(record.tags.iter().cloned());
                            true
                        }
                    };
                    Ok(Some(record.clone()))
                })?;
                let (record, pins) = found.ok_or_else(|| ImageError::NotFound {
                    what: name.clone(),
                    place: "the image store".to_owned(),
                })?;
                held.push(pins);
                match chosen.iter_mut().find(|(other, _)| other.id == record.id) {
                    Some((_, all)) => all.extend(tags),
                    None => chosen.push((record, tags)),
                }
            }
            write(shared, &chosen, to)
        })
        .await
    }
}

fn write(
    shared: &Shared,
    images: &[(Record, BTreeSet<String>)],
    to: impl Write,
) -> Result<(), ImageError> {
    let mut archive = Archive {
        tar: tar::Builder::new(to),
        blobs: BTreeSet::new(),
    };
    let mut sizes: BTreeMap<DiffId, u64> = BTreeMap::new();
    let (mut entries, mut docker): (Vec<Value>, Vec<Value>) = (Vec::new(), Vec::new());
    for (record, tags) in images {
        for layer in &record.layers {
            if sizes.contains_key(layer) {
                continue;
            }
            let size = shared.store.tar_again(layer)?.length();
            let size = size.map_err(|error| changed(layer, &error.to_string()))?;
            archive.layer(layer, size, shared.store.tar_again(layer)?)?;
            sizes.insert(*layer, size);
        }
        let config = shared.store.read_blob(&record.id)?;
        archive.blob(&record.id, &config)?;
        let layers: Vec<Value> = record
            .layers
            .iter()
            .map(|layer| json!({"mediaType": LAYER, "digest": layer, "size": sizes.get(layer)}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": record.id, "size": config.len()},
            "layers": layers,
        })
        .to_string()
        .into_bytes();
        let digest = Digest::of(&manifest);
        archive.blob(&digest, &manifest)?;
        let entry = json!({"mediaType": MANIFEST, "digest": digest, "size": manifest.len()});
        for tag in tags {
            let mut entry = entry.clone();
            let short = tag.parse::<Reference>()?;
            entry["annotations"] = json!({
                "io.containerd.image.name": tag,
                "org.opencontainers.image.ref.name": short.tag(),
            });
            entries.push(entry);
        }
        if tags.is_empty() {
            entries.push(entry);
        }
        let paths: Vec<String> = record.layers.iter().map(blob_path).collect();
        docker.push(json!({"Config": blob_path(&record.id), "RepoTags": tags, "Layers": paths}));
    }
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries});
    archive.file("index.json", index.to_string().as_bytes())?;
    archive.file("manifest.json", Value::from(docker).to_string().as_bytes())?;
    archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut to = archive.tar.into_inner().map_err(failed)?;
    to.flush().map_err(failed)
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn failed(error: io::Error) -> ImageError {
    ImageError::disk("write", "the archive".as_ref(), error)
}

fn changed(layer: &DiffId, reason: &str) -> ImageError {
    ImageError::corrupt(
        format!("layer {} on the disk", layer.short()),
        format!("{reason}; remove its image and pull it again"),
    )
}

struct Archive<W: Write> {
    tar: tar::Builder<W>,
    blobs: BTreeSet<Digest>,
}

impl<W: Write> Archive<W> {
    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        let mut header = header(bytes.len() as u64);
        self.tar
            .append_data(&mut header, name, bytes)
            .map_err(failed)
    }

    /// A document, once.
    fn blob(&mut self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        if self.blobs.insert(*digest) {
            self.file(&blob_path(digest), bytes)?;
        }
        Ok(())
    }

    /// A layer, whose content must be what its name says.
    fn layer(&mut self, layer: &DiffId, size: u64, from: impl Read) -> Result<(), ImageError> {
        let mut verified = Verified {
            inner: from,
            hasher: Hasher::default(),
            failure: None,
        };
        let mut header = header(size);
        let result = self
            .tar
            .append_data(&mut header, blob_path(layer), &mut verified);
        if let Some(reason) = verified.failure {
            return Err(changed(layer, &reason));
        }
        result.map_err(failed)?;
        let found = verified.hasher.finish();
        if found != *layer {
            return Err(changed(layer, &format!("it has the content of {found}")));
        }
        Ok(())
    }
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header
}

/// A stream that is hashed; its own failures are told apart from those of where it goes.
struct Verified<R> {
    inner: R,
    hasher: Hasher,
    failure: Option<String>,
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self
            .inner
            .read(buffer)
            .inspect_err(|error| self.failure = Some(error.to_string()))?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}
