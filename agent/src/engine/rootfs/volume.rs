//! Volumes that the agent mounts for one container: images, which are read-only layers, stacked where there are several;
//! and parts of volumes in memory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::mount::MsFlags;

use super::layers::{Layer, LayerMount};
use super::memory::MemoryVolume;
use super::{mount_layers, places, stack, unmount};
use crate::engine::error::EngineError;
use crate::engine::init::resolve::Tree;
use crate::engine::{paths, sys};

/// An image that a container has as a volume.
#[derive(Debug, Clone, Default)]
pub struct ImageVolume {
    /// EROFS images, lowest first.
    pub layers: Vec<Layer>,
    /// The directory or file of the image that is the volume; empty: all of it.
    pub sub_path: String,
}

/// A volume that is mounted as long as this lives.
#[derive(Debug)]
pub(super) struct VolumeMount {
    /// Where the container's mount finds it.
    place: PathBuf,
    /// Where several layers are one.
    stack: PathBuf,
    layers: Vec<LayerMount>,
}

impl VolumeMount {
    /// Mounts the volume of this number.
    pub fn mount(
        id: &str,
        number: usize,
        volume: &ImageVolume,
        ids: Option<BorrowedFd<'_>>,
    ) -> Result<Self, EngineError> {
        let directory = paths::get().volumes.join(id);
        let mounted = Self {
            place: directory.join(number.to_string()),
            stack: directory.join(format!("{number}.stack")),
            layers: mount_layers(&volume.layers, ids)?,
        };
        let what = || format!("mount the image volume {}", mounted.place.display());
        // From here on, dropping it undoes what was done.
        let root = mounted
            .root(ids.is_some())
            .map_err(|error| EngineError::system(what(), error))?;
        let part = root
            .open(&volume.sub_path, OFlag::O_PATH)
            .map_err(|error| {
                EngineError::Argument(format!(
                    "the image volume has no {:?}: {error}",
                    volume.sub_path
                ))
            })?;
        mounted
            .attach(part, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV)
            .map_err(|error| EngineError::system(what(), error))?;
        Ok(mounted)
    }

    /// Mounts what the container has of a volume in memory.
    pub fn of_memory(id: &str, number: usize, volume: &MemoryVolume) -> Result<Self, EngineError> {
        let directory = paths::get().volumes.join(id);
        let mounted = Self {
            place: directory.join(format!("m{number}")),
            stack: directory.join(format!("m{number}.stack")),
            layers: Vec::new(),
        };
        let part = volume.open()?;
        mounted
            .attach(part, libc::MOUNT_ATTR_NODEV)
            .map_err(|error| {
                let what = format!("mount the memory volume {}", volume.name);
                EngineError::system(what, error)
            })?;
        Ok(mounted)
    }

    /// The image's root directory.
    fn root(&self, mapped: bool) -> io::Result<Tree> {
        let lower = places(&self.layers, mapped);
        let root = match lower[..] {
            [only] => File::open(only)?,
            _ => {
                fs::create_dir_all(&self.stack)?;
                stack(&lower, "", &self.stack, MsFlags::MS_RDONLY)?;
                File::open(&self.stack)?
            }
        };
        Ok(Tree::new(root.into()))
    }

    fn attach(&self, part: OwnedFd, flags: u64) -> io::Result<()> {
        let copy = sys::clone_tree(part.as_fd(), c"", false)?;
        let kind = File::from(part).metadata()?.file_type();
        if let Some(parent) = self.place.parent() {
            fs::create_dir_all(parent)?;
        }
        if kind.is_dir() {
            fs::create_dir(&self.place)?;
        } else if kind.is_file() {
            File::create_new(&self.place)?;
        } else {
            return Err(io::Error::other("it is neither a directory nor a file"));
        }
        let mut attributes = sys::no_attributes();
        attributes.attr_set = flags;
        sys::set_attributes(copy.as_fd(), false, &attributes)?;
        let place = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(&self.place)?;
        sys::attach(copy.as_fd(), place.as_fd())
    }
}

impl Drop for VolumeMount {
    fn drop(&mut self) {
        unmount(&self.place);
        unmount(&self.stack);
        // Of the first two one is there, a file or a directory; the container's own goes with its last volume.
        let _ = fs::remove_file(&self.place);
        let _ = fs::remove_dir(&self.place);
        let _ = fs::remove_dir(&self.stack);
        if let Some(parent) = self.place.parent() {
            let _ = fs::remove_dir(parent);
        }
    }
}
