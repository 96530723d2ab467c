//! What can go wrong with an image. Each message is one sentence: what failed, on what, what to do.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An error of the image service.
///
/// It can be cloned, so that requests that were merged into one download all get its outcome.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// The text is not an image reference, a digest or an image ID.
    #[error(
        "{reference:?} is not an image reference: {reason}; write NAME[:TAG] or NAME@sha256:DIGEST"
    )]
    InvalidReference {
        /// What was given.
        reference: String,
        /// Which rule it breaks.
        reason: String,
    },
    /// There is no such image, neither here nor (for a pull) in its registry.
    #[error("{what} was not found in {place}; check its name")]
    NotFound {
        /// The image or blob that was asked for.
        what: String,
        /// Where it was looked for.
        place: String,
    },
    /// The registry refuses, with the credentials that were given or without.
    #[error(
        "registry {registry} refuses access to {what}: {reason}; check the name and the credentials"
    )]
    Unauthorized {
        /// Host of the registry.
        registry: String,
        /// Repository that was asked for.
        what: String,
        /// What the registry said.
        reason: String,
    },
    /// Content is malformed, or is not what its digest, diff ID or size says.
    #[error("{what} is corrupt: {reason}; build or push the image again")]
    Corrupt {
        /// Which content.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Content is larger than a limit.
    #[error("{what} is too large: {reason}")]
    TooLarge {
        /// Which content.
        what: String,
        /// Which limit it passes, and which configuration key raises it if one does.
        reason: String,
    },
    /// Content is well-formed, and uses something that Caisson has not got.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// Which content.
        what: String,
        /// Which feature, and what to use instead.
        reason: String,
    },
    /// A file that says how a registry is to be reached is wrong.
    #[error("the registry configuration {} cannot be used: {reason}; mend it", path.display())]
    Hosts {
        /// The file, or the host.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The configuration demands a signature, and there is none that is right.
    #[error(
        "SignatureValidationFailed: {what} is refused by images.policy: {reason}; sign it with the configured key"
    )]
    Untrusted {
        /// The image.
        what: String,
        /// What is wrong with its signature.
        reason: String,
    },
    /// A layer's file is not the one that was stored, by its fs-verity digest.
    #[error(
        "the layer {} cannot be used: {reason}; pull its image again", path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: &'static str,
    },
    /// The file system under the image store has no space or no inodes left.
    #[error("the disk that holds {} is full; free space there or remove images, and try again", path.display())]
    DiskFull {
        /// File that was written.
        path: PathBuf,
    },
    /// A file of the store, or one to load from, cannot be read or written.
    #[error("{action} {} failed: {source}", path.display())]
    Disk {
        /// What was done ("write", "open").
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why the system refused.
        source: Arc<io::Error>,
    },
    /// The registry cannot be reached, or breaks its protocol.
    #[error("registry {registry} failed: {reason}; check that it runs and can be reached")]
    Registry {
        /// Host of the registry.
        registry: String,
        /// What happened.
        reason: String,
    },
    /// Nothing (or next to nothing) arrived for too long.
    #[error(
        "registry {registry} sent nothing of {what} for {seconds} s; try again, or use a mirror"
    )]
    Stalled {
        /// Host of the registry.
        registry: String,
        /// What was read.
        what: String,
        /// The time-out that passed, in seconds.
        seconds: u64,
    },
    /// The database of image records refuses.
    #[error("the image database {} failed: {reason}; check the disk", path.display())]
    Database {
        /// The database's file.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
    /// A prefix of an image ID that several images share.
    #[error("image ID {prefix} is ambiguous: {count} images begin with it; give more digits")]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// How many images match.
        count: usize,
    },
    /// The caller went away, or the daemon is shutting down.
    #[error("the work on {what} was cancelled; ask again if it is still wanted")]
    Cancelled {
        /// What was being done.
        what: String,
    },
    /// A bug in this program.
    #[error("internal error in the image service: {reason}; please report it")]
    Internal {
        /// What was found.
        reason: String,
    },
}

impl ImageError {
    /// An I/O error on `path`. An [`ImageError`] that travelled inside the I/O error comes out as it was.
    pub(crate) fn disk(action: &'static str, path: &Path, source: io::Error) -> Self {
        if let Some(inner) = Self::inside(&source) {
            return inner;
        }
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull {
                path: path.to_owned(),
            },
            _ => Self::Disk {
                action,
                path: path.to_owned(),
                source: Arc::new(source),
            },
        }
    }

    /// An error while the content `what` was read: from its own reader, or because it is malformed.
    pub(crate) fn content(what: &str, source: io::Error) -> Self {
        if let Some(inner) = Self::inside(&source) {
            return inner;
        }
        let reason = match source.kind() {
            io::ErrorKind::UnexpectedEof => "it ends too early".to_owned(),
            _ => source.to_string(),
        };
        Self::Corrupt {
            what: what.to_owned(),
            reason,
        }
    }

    pub(crate) fn corrupt(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Corrupt {
            what: what.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn too_large(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::TooLarge {
            what: what.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            what: what.into(),
            reason: reason.into(),
        }
    }

    fn inside(error: &io::Error) -> Option<Self> {
        error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<Self>())
            .cloned()
    }
}

/// Lets the error pass through a chain of readers; [`ImageError::disk`] and [`ImageError::content`] take it out again.
impl From<ImageError> for io::Error {
    fn from(error: ImageError) -> Self {
        io::Error::other(error)
    }
}
