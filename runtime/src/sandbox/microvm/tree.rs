//! Detached copies of mounts: what becomes of a volume before the pod sees it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::libc;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::namespace::identity;
use crate::sandbox::VolumeOptions;
use crate::sandbox::ids::{self, UserIds};

/// A copy of a file's or directory's mount that is mounted nowhere yet.
pub struct Tree {
    mount: File,
    meta: fs::Metadata,
}

impl Tree {
    /// A volume: a file, or a directory with all that is mounted below.
    pub fn of_volume(path: &Path, options: VolumeOptions) -> io::Result<Self> {
        let tree = Self::open(path, OpenTreeFlags::AT_RECURSIVE)?;
        let propagation = match options.follows_host {
            true => libc::MS_SLAVE,
            false => libc::MS_PRIVATE,
        };
        let below = match options.recursive_read_only {
            true => libc::MOUNT_ATTR_RDONLY,
            false => 0,
        };
        tree.set(true, below, propagation)?;
        if options.read_only {
            tree.set(false, libc::MOUNT_ATTR_RDONLY, 0)?;
        }
        if let Some(ids) = &options.ids {
            tree.map(ids)?;
        }
        Ok(tree)
    }

    /// Maps the owners of the mount at the top.
    fn map(&self, ids: &UserIds) -> io::Result<()> {
        let namespace = ids::user_namespace(ids)
            .map_err(|e| io::Error::other(format!("no user namespace can be made for it: {e}")))?;
        let mapped = self.change(
            false,
            libc::mount_attr {
                attr_set: libc::MOUNT_ATTR_IDMAP,
                attr_clr: 0,
                propagation: 0,
                userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?,
            },
        );
        mapped.map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => io::Error::other(
                "its file system cannot map IDs in this kernel (tmpfs can from Linux 6.3 on)",
            ),
            _ => error,
        })
    }

    fn open(path: &Path, flags: OpenTreeFlags) -> io::Result<Self> {
        let flags = flags | OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let mount = File::from(open_tree(CWD, path, flags)?);
        let meta = mount.metadata()?;
        if meta.file_type().is_socket() {
            return Err(io::Error::other(
                "it is a socket, and a socket of the host cannot be reached from a virtual machine",
            ));
        }
        if !meta.is_dir() && !meta.is_file() {
            return Err(io::Error::other("it is neither a file nor a directory"));
        }
        Ok(Self { mount, meta })
    }

    /// mount_setattr(2). No program of a volume gets privileges by its owner, and no node is a device.
    fn set(&self, recursive: bool, more: u64, propagation: u64) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | more,
            attr_clr: 0,
            propagation,
            userns_fd: 0,
        };
        self.change(recursive, attributes)
    }

    fn change(&self, recursive: bool, attributes: libc::mount_attr) -> io::Result<()> {
        let flags = match recursive {
            true => libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            false => libc::AT_EMPTY_PATH,
        };
        // SAFETY: the path is a NUL-terminated string, and the kernel reads `size_of` bytes of the structure, which
        // lives until the call returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.mount.as_raw_fd(),
                c"".as_ptr(),
                flags,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Makes an empty file or directory to mount this on, unless there is one.
    pub fn make_point(&self, point: &Path) -> io::Result<()> {
        let made = if self.meta.is_dir() {
            fs::create_dir(point)
        } else {
            File::create_new(point).map(drop)
        };
        match made {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Mounts it there, unless it is mounted there already.
    pub fn attach(&self, point: &Path) -> io::Result<()> {
        if identity(&fs::symlink_metadata(point)?) == identity(&self.meta) {
            return Ok(());
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.mount, "", CWD, point, flags)?)
    }
}
