//! Blobs in a directory or in an archive (OCI "image-layout.md").

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::archive::Archive;
use crate::image::digest::Digest;
use crate::image::error::ImageError;

/// A layout as a directory, or any archive.
pub(in crate::image) enum Files {
    Layout(PathBuf),
    Archive(Archive),
}

impl Files {
    /// The name for messages.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Layout(path) => path,
            Self::Archive(archive) => archive.path(),
        }
    }

    /// A blob that must have `size` bytes at most.
    pub(super) fn small(&self, digest: &Digest, size: u64) -> Result<Vec<u8>, ImageError> {
        self.read(&blob(digest), size)?
            .ok_or_else(|| self.missing(&blob(digest)))
    }

    /// A file by its path in the layout, up to `limit` bytes; `None` if there is none.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, ImageError> {
        let what = format!("{} in {}", name, self.path().display());
        let reader: Box<dyn Read> = match self {
            Self::Layout(root) => match open_regular(&root.join(name)) {
                Ok(file) => Box::new(file),
                Err(ImageError::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(error),
            },
            Self::Archive(archive) if archive.size(name).is_none() => return Ok(None),
            Self::Archive(archive) => archive.open(name)?,
        };
        let mut bytes = Vec::new();
        reader
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| ImageError::content(&what, error))?;
        if bytes.len() as u64 > limit {
            return Err(ImageError::too_large(
                what,
                format!("it has more than {limit} bytes"),
            ));
        }
        Ok(Some(bytes))
    }

    pub(super) fn open(
        &self,
        digest: &Digest,
        _size: u64,
    ) -> Result<Box<dyn Read + Send>, ImageError> {
        match self {
            Self::Layout(root) => Ok(Box::new(open_regular(&root.join(blob(digest)))?)),
            Self::Archive(archive) => archive.open(&blob(digest)),
        }
    }

    pub(super) fn missing(&self, name: &str) -> ImageError {
        ImageError::corrupt(
            self.path().display().to_string(),
            format!("it has no {name}"),
        )
    }
}

fn blob(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Opens a file that must be a regular one: a FIFO would never end.
fn open_regular(path: &Path) -> Result<File, ImageError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => ImageError::NotFound {
            what: path.display().to_string(),
            place: "the file system".to_owned(),
        },
        _ => ImageError::disk("open", path, error),
    };
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(ImageError::corrupt(
            path.display().to_string(),
            "it is not a regular file",
        ));
    }
    File::open(path).map_err(failed)
}
