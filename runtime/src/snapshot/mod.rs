//! A pod in a directory: what `caisson snapshot` writes and `caisson restore` reads.
//!
//! | file | what |
//! |---|---|
//! | `memory` | the guest's memory, with holes for what is zero |
//! | `state` | all else of its machine, for the pod process alone |
//! | `scratch.img` | the disk of its writable layers, where it has one |
//! | `manifest.json` | the [`Manifest`]: what the others must be, and what is known of the pod |
//!
//! The directory is root's alone, since the memory is in it. The manifest comes last and by a rename, so a directory without
//! one is half a snapshot. What is read is checked before anything is made of it: that nobody else could have
//! changed it, that it is of these programs and this processor, that no byte of a file is another.

mod dependencies;
mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod manifest;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use dependencies::Dependencies;
pub use files::FileCheck;
pub use manifest::{Machine, Manifest, PlacedLayer, is_settled, volume};

use files::{MEMORY, SCRATCH, STATE};

/// The most image layers of a pod that can be written: each is a descriptor in the message that starts its machine.
pub const MOST_LAYERS: usize = 48;
const MANIFEST: &str = "manifest.json";
/// The most bytes of a manifest.
const MOST_MANIFEST: u64 = 16 << 20;

/// Why a snapshot cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is something already.
    #[error("{0} exists already; name a directory that does not, in one that does")]
    Exists(PathBuf),
    /// The system refused something.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What the pod process sends is not what it is to send.
    #[error("the pod process sends something else than its machine: {0}")]
    Stream(String),
    /// It has no manifest.
    #[error(
        "{0} is not a whole snapshot: it has no {MANIFEST}, which is written last; name a directory that `caisson snapshot` has finished"
    )]
    Incomplete(PathBuf),
    /// Others could have changed it.
    #[error(
        "{0} is not root's alone; make it so (chown root, chmod go=) if you know who has changed it"
    )]
    Open(PathBuf),
    /// A file is not as it was written.
    #[error("{path} is damaged: {reason}; use another copy of the snapshot")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In what way.
        reason: String,
    },
    /// It is of another version of this format.
    #[error("the snapshot has format {0}, and this release reads format {FORMAT}; restore it with the release that wrote it", FORMAT = Manifest::FORMAT)]
    Format(u32),
    /// It is of other programs, or another processor.
    #[error(
        "the snapshot was made with another {0}; restore it where it was made, with the release that made it"
    )]
    Other(&'static str),
}

pub(crate) fn failed<'a>(
    what: &'static str,
    path: &'a Path,
) -> impl Fn(io::Error) -> SnapshotError + 'a {
    move |source| SnapshotError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

/// A snapshot that is being written. One that is dropped before its end is removed.
pub struct Writing {
    dir: PathBuf,
    complete: bool,
}

impl Writing {
    /// Makes the directory. Blocks.
    ///
    /// # Errors
    /// [`SnapshotError::Exists`], [`SnapshotError::File`].
    pub fn begin(dir: &Path) -> Result<Self, SnapshotError> {
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => Ok(Self {
                dir: dir.to_owned(),
                complete: false,
            }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(SnapshotError::Exists(dir.to_owned()))
            }
            Err(error) => Err(failed("make", dir)(error)),
        }
    }

    /// Writes what the pod process sends, of a machine with at most so many bytes of memory, until it has sent all. Blocks.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn take_machine(&self, from: OwnedFd, most: u64) -> Result<(), SnapshotError> {
        let memory = create(&self.dir.join(MEMORY))?;
        let state = create(&self.dir.join(STATE))?;
        files::receive(File::from(from), most, &memory, &state)
    }

    /// Copies the disk of a machine that is parked. Blocks.
    ///
    /// # Errors
    /// [`SnapshotError::File`].
    pub fn copy_disk(&self, from: &Path) -> Result<(), SnapshotError> {
        let to = self.dir.join(SCRATCH);
        drop(create(&to)?);
        files::copy(from, &to)
    }

    /// Notes what the files are in a manifest, and writes that. From here on the snapshot is one. Blocks.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn finish(mut self, mut manifest: Manifest) -> Result<(), SnapshotError> {
        let memory = self.dir.join(MEMORY);
        let bytes = u64::from(manifest.machine.memory_mib) << 20;
        let file = open(&memory, OpenOptions::new().read(true).write(true))?;
        // Its end may be a hole.
        file.set_len(bytes).map_err(failed("write", &memory))?;
        manifest.memory = self.seal(MEMORY)?;
        manifest.state = self.seal(STATE)?;
        manifest.scratch = match self.dir.join(SCRATCH).exists() {
            true => Some(self.seal(SCRATCH)?),
            false => None,
        };
        let (new, path) = (self.dir.join("manifest.new"), self.dir.join(MANIFEST));
        let text = serde_json::to_vec_pretty(&manifest).map_err(io::Error::other);
        let written = text.and_then(|text| {
            let mut file = create_file(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.dir)?.sync_all()
        });
        written.map_err(failed("write", &path))?;
        self.complete = true;
        Ok(())
    }

    /// Sees that a file is on the disk, and says what it is.
    fn seal(&self, name: &str) -> Result<FileCheck, SnapshotError> {
        let path = self.dir.join(name);
        let file = open(&path, OpenOptions::new().read(true))?;
        file.sync_all().map_err(failed("write", &path))?;
        FileCheck::of(&file).map_err(failed("read", &path))
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.complete
            && let Err(error) = fs::remove_dir_all(&self.dir)
        {
            tracing::warn!(%error, dir = %self.dir.display(), "half a snapshot is left; remove it");
        }
    }
}

/// A snapshot that was read and checked.
pub struct Snapshot {
    /// What it says.
    pub manifest: Manifest,
    /// The guest's memory.
    pub memory: File,
    /// All else of its machine.
    pub state: File,
    /// The disk of its writable layers.
    pub scratch: Option<PathBuf>,
}

impl Snapshot {
    /// Reads a snapshot that is to go on here. Blocks, for as long as it takes to read all of it.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn open(dir: &Path, here: &Dependencies) -> Result<Self, SnapshotError> {
        check_owner(dir)?;
        let manifest = read_manifest(dir)?;
        manifest.depends.check(here)?;
        let memory_bytes = u64::from(manifest.machine.memory_mib) << 20;
        if manifest.memory.bytes != memory_bytes {
            return Err(SnapshotError::Damaged {
                path: dir.join(MANIFEST),
                reason: "its memory has another size than its machine".into(),
            });
        }
        let memory = checked(&dir.join(MEMORY), &manifest.memory)?;
        let state = checked(&dir.join(STATE), &manifest.state)?;
        let scratch = match &manifest.scratch {
            Some(check) => {
                checked(&dir.join(SCRATCH), check)?;
                Some(dir.join(SCRATCH))
            }
            None => None,
        };
        Ok(Self {
            manifest,
            memory,
            state,
            scratch,
        })
    }
}

/// Whoever can write a snapshot decides what runs, and who may read it sees the pod's secrets.
fn check_owner(dir: &Path) -> Result<(), SnapshotError> {
    let meta = fs::symlink_metadata(dir).map_err(failed("read", dir))?;
    let own = meta.uid() == nix::unistd::geteuid().as_raw();
    match meta.is_dir() && own && meta.mode() & 0o077 == 0 {
        true => Ok(()),
        false => Err(SnapshotError::Open(dir.to_owned())),
    }
}

fn read_manifest(dir: &Path) -> Result<Manifest, SnapshotError> {
    let path = dir.join(MANIFEST);
    let file = match open(&path, OpenOptions::new().read(true)) {
        Err(SnapshotError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Err(SnapshotError::Incomplete(dir.to_owned()));
        }
        file => file?,
    };
    let mut text = Vec::new();
    let read = file.take(MOST_MANIFEST + 1).read_to_end(&mut text);
    read.map_err(failed("read", &path))?;
    let damaged = |reason: String| SnapshotError::Damaged {
        path: path.clone(),
        reason,
    };
    if text.len() as u64 > MOST_MANIFEST {
        return Err(damaged(format!("it has more than {MOST_MANIFEST} bytes")));
    }
    Manifest::parse(&text, damaged)
}

fn checked(path: &Path, check: &FileCheck) -> Result<File, SnapshotError> {
    let file = open(path, OpenOptions::new().read(true))?;
    let found = FileCheck::of(&file).map_err(failed("read", path))?;
    if found != *check {
        let reason = match found.bytes == check.bytes {
            true => "its content is not what was written".to_owned(),
            false => format!("it has {} bytes and not {}", found.bytes, check.bytes),
        };
        return Err(SnapshotError::Damaged {
            path: path.to_owned(),
            reason,
        });
    }
    Ok(file)
}

/// Opens a regular file; no link is followed.
fn open(path: &Path, options: &mut OpenOptions) -> Result<File, SnapshotError> {
    // A pipe in its place must not hold us.
    let options = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path).map_err(failed("open", path))?;
    match file.metadata() {
        Ok(meta) if meta.is_file() => Ok(file),
        Ok(_) => Err(failed("open", path)(io::Error::other(
            "it is not a regular file",
        ))),
        Err(error) => Err(failed("open", path)(error)),
    }
}

fn create(path: &Path) -> Result<File, SnapshotError> {
    create_file(path).map_err(failed("make", path))
}

fn create_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    options.mode(0o600).open(path)
}

#[cfg(test)]
mod tests;
