//! Image layers: EROFS images, each mounted once in the guest for all containers that use it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::disk::{self, DiskRange};
use super::loopdev;
use crate::engine::sys::{self, NewFileSystem};
use crate::engine::{error::EngineError, paths};

/// Mounted layers. The mount points have short numbers for names, because all of a container's have to fit into one
/// page of overlay options.
static MOUNTED: Mutex<BTreeMap<u32, Mount>> = Mutex::new(BTreeMap::new());

struct Mount {
    /// The image; none for a view of one with a container's own ids.
    image: Option<Layer>,
    users: usize,
}

/// Where an EROFS image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layer {
    /// A file.
    File(PathBuf),
    /// A part of a disk.
    Disk(DiskRange),
}

impl From<PathBuf> for Layer {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Disk(range) => range.fmt(f),
        }
    }
}

/// A layer that is mounted as long as this lives.
#[derive(Debug)]
pub(super) struct LayerMount {
    number: u32,
    /// Where.
    pub path: PathBuf,
}

fn mounted() -> MutexGuard<'static, BTreeMap<u32, Mount>> {
    MOUNTED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn directory(number: u32) -> PathBuf {
    paths::get().layers.join(number.to_string())
}

impl LayerMount {
    /// Mounts an image, or takes part in its mount.
    pub fn of_image(image: &Layer) -> Result<Self, EngineError> {
        let what = || format!("mount the layer {image}");
        let mut table = mounted();
        let found = table
            .iter_mut()
            .find(|(_, mount)| mount.image.as_ref() == Some(image));
        if let Some((&number, mount)) = found {
            mount.users += 1;
            return Ok(Self {
                number,
                path: directory(number),
            });
        }
        let detached = open_image(image).map_err(|error| EngineError::system(what(), error))?;
        Self::attach(&mut table, &detached, Some(image))
            .map_err(|error| EngineError::system(what(), error))
    }

    /// A view of this layer with ids as of a user namespace.
    pub fn with_ids_of(&self, namespace: BorrowedFd<'_>) -> Result<Self, EngineError> {
        let view = || -> io::Result<Self> {
            let path = CString::new(self.path.as_os_str().as_bytes())?;
            let detached = sys::clone_tree(nix::fcntl::AT_FDCWD, &path, false)?;
            let mut attributes = sys::no_attributes();
            attributes.attr_set = libc::MOUNT_ATTR_IDMAP;
            attributes.userns_fd = namespace.as_raw_fd() as u64;
            sys::set_attributes(detached.as_fd(), false, &attributes)?;
            Self::attach(&mut mounted(), &detached, None)
        };
        view().map_err(|error| {
            EngineError::system(
                format!("map the ids of the layer at {}", self.path.display()),
                error,
            )
        })
    }

    fn attach(
        table: &mut BTreeMap<u32, Mount>,
        detached: &OwnedFd,
        image: Option<&Layer>,
    ) -> io::Result<Self> {
        let number = (0..u32::MAX)
            .find(|number| !table.contains_key(number))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let path = directory(number);
        fs::create_dir_all(&path)?;
        let place: OwnedFd = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(&path)?
            .into();
        sys::attach(detached.as_fd(), place.as_fd())?;
        table.insert(
            number,
            Mount {
                image: image.cloned(),
                users: 1,
            },
        );
        Ok(Self { number, path })
    }
}

impl Drop for LayerMount {
    fn drop(&mut self) {
        let mut table = mounted();
        let Some(mount) = table.get_mut(&self.number) else {
            return;
        };
        mount.users -= 1;
        if mount.users > 0 {
            return;
        }
        // If somebody still looks at it, the kernel unmounts it when they are done. The number is free in either case.
        super::unmount(&self.path);
        let _ = fs::remove_dir(&self.path);
        table.remove(&self.number);
    }
}

/// A detached mount of an EROFS image.
fn open_image(image: &Layer) -> io::Result<OwnedFd> {
    match image {
        Layer::File(path) => open_file(path),
        Layer::Disk(range) => {
            let device = disk::device(range)?;
            let mount = mount_device(&device.path)?;
            disk::read_ahead(device);
            Ok(mount)
        }
    }
}

fn open_file(image: &Path) -> io::Result<OwnedFd> {
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(image)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    mount_device(&loopdev::attach(&file, loopdev::Part::default())?.path)
}

fn mount_device(device: &Path) -> io::Result<OwnedFd> {
    let new = NewFileSystem::open(c"erofs")?;
    let source = CString::new(device.as_os_str().as_bytes())?;
    new.set(c"source", Some(&source))?;
    new.set(c"ro", None)?;
    new.mount(libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => io::Error::other("it is not an EROFS image"),
            _ => error,
        })
}
