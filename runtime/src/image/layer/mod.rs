//! Layers: from a (compressed) tar stream to an EROFS image, verified on the way.

mod apply;
mod decompress;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod recipe;
pub(crate) mod tar;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::digest::{DiffId, Digest, Hasher};
use super::erofs::data::DataWriter;
use super::erofs::{BLOCK, image};
use super::error::ImageError;
use apply::{Applier, Prepared};
pub use decompress::{Compression, UnpackLimits};
pub(crate) use recipe::Again;
use recipe::Recorder;
use tar::{Entry, Stream, TarReader};

/// What is known of a layer before it is read.
#[derive(Debug, Clone)]
pub(crate) struct LayerSpec {
    /// Digest and size of the blob, where a manifest states them.
    pub blob: Option<(Digest, u64)>,
    /// How the blob is compressed; `None` to find out from its first bytes.
    pub compression: Option<Compression>,
    /// Digest of the tar stream, from the image's configuration.
    pub diff_id: DiffId,
}

impl LayerSpec {
    pub(crate) fn what(&self) -> String {
        format!("layer {}", self.diff_id.short())
    }
}

/// Lets others watch a conversion, and end it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watch {
    /// Bytes of the blob that were read.
    pub read: Arc<AtomicU64>,
    /// Bytes that came out, of all the image's layers together.
    pub unpacked: Arc<AtomicU64>,
    pub cancelled: Arc<AtomicBool>,
}

/// The empty files that a conversion writes.
pub(crate) struct Outputs<'a> {
    /// Becomes the EROFS image.
    pub image: File,
    /// Where that is, for messages.
    pub path: &'a Path,
    /// Becomes the recipe, by which [`Again`] makes the tar stream again.
    pub recipe: File,
    /// Scratch space.
    pub spool: File,
}

/// Reads a layer's blob to its end and writes its EROFS image and recipe, both on the disk at the end.
/// They may be used only if this returns without an error: size, digest and diff ID are right then.
///
/// # Errors
/// [`ImageError::Corrupt`] for content that is not what it should be, [`ImageError::TooLarge`] for a bomb,
/// [`ImageError::DiskFull`] and [`ImageError::Disk`] for the image's file, and what the reader gives.
pub(crate) fn convert(
    spec: &LayerSpec,
    blob: impl Read + Send,
    outputs: Outputs<'_>,
    limits: &UnpackLimits,
    watch: &Watch,
) -> Result<(), ImageError> {
    let what = spec.what();
    let path = outputs.path;
    let disk = |error| ImageError::disk("write", path, error);
    let recorder = Recorder::new(outputs.recipe).map_err(disk)?;
    let content = |error| ImageError::content(&what, error);
    let mut head = [0; 4];
    let mut raw = BlobReader {
        inner: blob,
        hasher: Hasher::default(),
        size: 0,
        limit: spec.blob.map_or(u64::MAX, |(_, size)| size),
        what: &what,
        watch,
    };
    let mut filled = 0;
    while filled < head.len() {
        match raw.read(&mut head[filled..]).map_err(content)? {
            0 => break,
            count => filled += count,
        }
    }
    let head = &head[..filled];
    let compression = spec.compression.unwrap_or_else(|| Compression::sniff(head));
    let (image, found) = {
        let plain = compression.reader(head.chain(&mut raw)).map_err(content)?;
        let mut tar = PlainReader {
            inner: plain,
            hasher: Hasher::default(),
            size: 0,
            limits,
            what: &what,
            path,
            watch,
            recorder: &recorder,
        };
        let writer = DataWriter::new(outputs.image, outputs.spool).map_err(disk)?;
        let image = unpack(spec, &mut tar, writer, &recorder, path, limits)?;
        // What follows the archive's end counts for the diff ID too.
        io::copy(&mut tar, &mut io::sink()).map_err(content)?;
        (image, tar.hasher.finish())
    };
    io::copy(&mut raw, &mut io::sink()).map_err(content)?;
    if let Some((digest, size)) = &spec.blob {
        if raw.size != *size {
            return Err(ImageError::corrupt(
                &*what,
                format!(
                    "its blob has {} bytes, and the manifest says {size}",
                    raw.size
                ),
            ));
        }
        let found = raw.hasher.finish();
        if found != *digest {
            return Err(ImageError::corrupt(
                &*what,
                format!("its blob has the digest {found}, and the manifest says {digest}"),
            ));
        }
    }
    if found != spec.diff_id {
        return Err(ImageError::corrupt(
            &*what,
            format!(
                "its content has the diff ID {found}, and the image's configuration says {}",
                spec.diff_id
            ),
        ));
    }
    let recipe = recorder.finish().map_err(disk)?;
    recipe
        .sync_all()
        .and_then(|()| image.sync_all())
        .map_err(|error| ImageError::disk("sync", path, error))
}

fn unpack(
    spec: &LayerSpec,
    tar: &mut impl Read,
    mut writer: DataWriter,
    recorder: &Recorder,
    path: &Path,
    limits: &UnpackLimits,
) -> Result<File, ImageError> {
    let what = spec.what();
    let content = |error| ImageError::content(&what, error);
    let disk = |error| ImageError::disk("write", path, error);
    let mut applier = Applier::new(&spec.diff_id);
    let mut reader = TarReader::new(Stream(tar));
    let mut buffer = vec![0; 256 << 10];
    while let Some(entry) = reader.next().map_err(content)? {
        let Prepared::File { parent, name, size } = applier.prepare(&entry)? else {
            continue;
        };
        // A sparse file costs the stream nothing, and the image its whole size.
        if size.saturating_add(writer.position()) > limits.max_bytes.saturating_add(BLOCK) {
            return Err(ImageError::too_large(
                &*what,
                format!(
                    "it unpacks to more than {} bytes; raise images.max_unpacked_gib if it is to be trusted",
                    limits.max_bytes
                ),
            ));
        }
        let mut file = writer.begin(size);
        for (hole, length) in segments(&entry, size) {
            writer.zeros(&mut file, hole).map_err(disk)?;
            if let Some(place) = writer.place(&file).filter(|_| length > 0) {
                recorder.range(place, length).map_err(disk)?;
            }
            let mut left = length;
            while left > 0 {
                let want = buffer
                    .len()
                    .min(usize::try_from(left).unwrap_or(usize::MAX));
                let count = reader.read_data(&mut buffer[..want]).map_err(content)?;
                if count == 0 {
                    return Err(ImageError::corrupt(&*what, "a file's data ends too early"));
                }
                writer.write(&mut file, &buffer[..count]).map_err(disk)?;
                left -= count as u64;
            }
        }
        let data = writer.end(file).map_err(disk)?;
        applier.file(&entry, parent, &name, data)?;
    }
    let found = image::finish(&applier.tree, writer);
    found.map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => ImageError::content(&what, error),
        _ => disk(error),
    })
}

/// A file as a list of (hole before it, length of stored data).
fn segments(entry: &Entry, size: u64) -> Vec<(u64, u64)> {
    let Some(map) = &entry.sparse else {
        return vec![(0, size)];
    };
    let mut segments = Vec::with_capacity(map.len() + 1);
    let mut end = 0;
    for (offset, length) in map {
        segments.push((offset - end, *length));
        end = offset + length;
    }
    segments.push((size - end, 0));
    segments
}

/// The blob as it comes: counted and hashed. More than the manifest's size ends it.
struct BlobReader<'a, R> {
    inner: R,
    hasher: Hasher,
    size: u64,
    limit: u64,
    what: &'a str,
    watch: &'a Watch,
}

impl<R: Read> Read for BlobReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.watch.cancelled.load(Ordering::Relaxed) {
            return Err(ImageError::Cancelled {
                what: self.what.to_owned(),
            }
            .into());
        }
        let count = self.inner.read(buffer)?;
        self.size += count as u64;
        if self.size > self.limit {
            let reason = format!(
                "its blob has more than the {} bytes that the manifest says",
                self.limit
            );
            return Err(ImageError::corrupt(self.what, reason).into());
        }
        self.hasher.update(&buffer[..count]);
        self.watch.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// The tar stream: counted, bounded, hashed and recorded.
struct PlainReader<'a, R> {
    inner: R,
    hasher: Hasher,
    size: u64,
    limits: &'a UnpackLimits,
    what: &'a str,
    /// The image's, for messages.
    path: &'a Path,
    watch: &'a Watch,
    recorder: &'a Recorder,
}

impl<R: Read> Read for PlainReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.size += count as u64;
        let image = self
            .watch
            .unpacked
            .fetch_add(count as u64, Ordering::Relaxed)
            + count as u64;
        let packed = self.watch.read.load(Ordering::Relaxed);
        self.limits.check(self.what, packed, self.size, image)?;
        self.hasher.update(&buffer[..count]);
        self.recorder
            .passed(&buffer[..count])
            .map_err(|error| ImageError::disk("write", self.path, error))?;
        Ok(count)
    }
}

#[cfg(test)]
pub(crate) mod tests;
