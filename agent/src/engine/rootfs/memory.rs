//! Volumes in memory: a tmpfs each, which the containers of a pod share (Documentation/filesystems/tmpfs.rst of the
//! kernel). What is written there counts as memory of the container that writes it, and of the guest.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sys::sysinfo::sysinfo;

use crate::engine::error::EngineError;
use crate::engine::init::resolve::Tree;
use crate::engine::paths;

/// A volume in memory, or a part of one.
#[derive(Debug, Clone, Default)]
pub struct MemoryVolume {
    /// What it is called among the pod's.
    pub name: String,
    /// The most bytes in it; 0, or as many as the machine has: half of the memory.
    pub size: u64,
    /// Its root directory, when it is made.
    pub root: Directory,
    /// The directory or file of it that the container has; empty: all of it.
    pub sub_path: String,
    /// The directory at `sub_path`, if it has to be made.
    pub sub: Directory,
}

/// Attributes of a directory to make.
#[derive(Debug, Clone, Copy, Default)]
pub struct Directory {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Held while a volume is made or a directory in it, so that one container does it and the others find it whole.
static MAKING: Mutex<()> = Mutex::new(());

impl MemoryVolume {
    /// Opens the part that the container has; makes the volume, or the directory in it, if it is not there.
    pub(super) fn open(&self) -> Result<OwnedFd, EngineError> {
        self.check()?;
        let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |error| {
            EngineError::system(
                format!(
                    "open {:?} of the memory volume {}",
                    self.sub_path, self.name
                ),
                error,
            )
        };
        let place = self.make().map_err(|error| {
            EngineError::system(format!("make the memory volume {}", self.name), error)
        })?;
        let root = Tree::new(File::open(place).map_err(failed)?.into());
        match root.open(&self.sub_path, OFlag::O_PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make_sub(&root).map_err(failed)
            }
            part => part.map_err(failed),
        }
    }

    fn check(&self) -> Result<(), EngineError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        let good = self.name.len() <= 253
            && self.name.bytes().all(plain)
            && self
                .name
                .bytes()
                .next()
                .is_some_and(|byte| byte.is_ascii_alphanumeric());
        if good {
            return Ok(());
        }
        Err(EngineError::Argument(format!(
            "{:?} is not the name of a memory volume: 1 to 253 of A-Z, a-z, 0-9, _, . and -",
            self.name
        )))
    }

    /// The tmpfs. Its directory is there if and only if it is mounted.
    fn make(&self) -> io::Result<PathBuf> {
        let all = &paths::get().memory;
        let place = all.join(&self.name);
        if place.try_exists()? {
            return Ok(place);
        }
        fs::create_dir_all(all)?;
        fs::create_dir(&place)?;
        let Directory { mode, uid, gid } = self.root;
        let mut options = format!("mode={:o},uid={uid},gid={gid}", mode & 0o7777);
        let memory = sysinfo()?.ram_total();
        // More than there is would be no limit: a full volume would end processes instead of refusing to write.
        if self.size > 0 && self.size < memory {
            options.push_str(&format!(",size={}", self.size));
        }
        let tmpfs = Some("tmpfs");
        let mounted = mount(
            tmpfs,
            &place,
            tmpfs,
            MsFlags::MS_NODEV,
            Some(options.as_str()),
        );
        if let Err(error) = mounted {
            let _ = fs::remove_dir(&place);
            return Err(error.into());
        }
        Ok(place)
    }

    fn make_sub(&self, root: &Tree) -> io::Result<OwnedFd> {
        let made = root.directory(&self.sub_path)?;
        // By its descriptor: a container may have put something else at the path.
        let path = format!("/proc/self/fd/{}", made.as_raw_fd());
        chown(&path, Some(self.sub.uid), Some(self.sub.gid))?;
        fs::set_permissions(&path, Permissions::from_mode(self.sub.mode & 0o7777))?;
        Ok(made)
    }
}
