//! The shared directory: fuse-backend-rs' passthrough file system behind the checks that a hostile guest makes
//! necessary.
//!
//! What is added: names are single components, and never `.` or `..`; sizes that the guest states are bounded
//! before memory is taken for them; descriptors are counted; what is created belongs to the guest's user
//! (see [`super::identity`]; the passthrough's own way takes a process that runs as root for granted);
//! extended attributes are not offered. The passthrough reaches them through a `/proc` that a jailed process
//! does not see, and a guest that has them asks for `security.capability` before every write.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};

use super::ledger::Ledger;
use super::{FsError, ShareRoot};

/// How long the guest may take a name or attribute for true without asking: a ConfigMap's update is a symbolic
/// link that is replaced on the host, and shows within this time.
const VALID: Duration = Duration::from_secs(1);
/// Descriptors that are kept for the rest of the machine; at most half of all.
const RESERVED: u64 = 4096;
/// A shared directory.
pub struct Share {
    pub(super) files: PassthroughFs,
    pub(super) ledger: Ledger,
    /// Holds the descriptor that the root's path names; there is none where the process pivots into it.
    pub(super) root: Option<OwnedFd>,
}

impl Share {
    /// Prepares the server; see the order in the device's module.
    pub fn new(root: ShareRoot) -> Result<Self, FsError> {
        let (path, root) = match root {
            ShareRoot::Pivoted => ("/".to_owned(), None),
            // The dot makes it the directory, not the link to it.
            ShareRoot::Directory(fd) => (format!("/proc/self/fd/{}/.", fd.as_raw_fd()), Some(fd)),
        };
        let files = PassthroughFs::new(Config {
            root_dir: path,
            entry_timeout: VALID,
            attr_timeout: VALID,
            cache_policy: CachePolicy::Auto,
            writeback: false,
            xattr: false,
            // We import the root ourselves, once, and negotiate ourselves.
            do_import: false,
            ..Config::default()
        })
        .map_err(|source| FsError::SetUp {
            what: "opening /proc/self/fd and /proc/self/mountinfo",
            source,
        })?;
        if root.is_none() {
            for fd in files.keep_fds() {
                cut_off(fd).map_err(|source| FsError::SetUp {
                    what: "detaching /proc/self/fd",
                    source,
                })?;
            }
        }
        Ok(Self {
            files,
            ledger: Ledger::new(descriptors()),
            root,
        })
    }

    /// Opens the root.
    pub fn open_root(&self) -> Result<(), FsError> {
        self.files.import().map_err(FsError::Root)?;
        let (stat, _) = self
            .files
            .getattr(&root(), ROOT_ID, None)
            .map_err(FsError::Root)?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
            Ok(())
        } else {
            Err(FsError::Root(io::ErrorKind::NotADirectory.into()))
        }
    }

    /// Notes a lookup that was answered, or takes it back where there is no room.
    pub(super) fn looked_up(&self, entry: Entry) -> io::Result<Entry> {
        if self.ledger.look_up(entry.inode) {
            Ok(entry)
        } else {
            self.files.forget(&root(), entry.inode, 1);
            Err(full())
        }
    }

    /// Makes a hard link where the passthrough's own way, `AT_EMPTY_PATH`, is not allowed: that takes
    /// `CAP_DAC_READ_SEARCH` over the host. Paths can change while they are used, but in the jail they lead
    /// to nothing but the share, and what was linked is looked at afterwards.
    pub(super) fn link_by_path(
        &self,
        inode: u64,
        newparent: u64,
        newname: &CStr,
    ) -> io::Result<Entry> {
        let path = |inode, below: &[u8]| {
            let mut bytes = self
                .files
                .readlinkat_proc_file(inode)?
                .into_os_string()
                .into_vec();
            bytes.extend_from_slice(below);
            CString::new(bytes).map_err(io::Error::from)
        };
        let from = path(inode, b"")?;
        let to = path(newparent, &[b"/", newname.to_bytes()].concat())?;
        let (wanted, _) = self.files.getattr(&root(), inode, None)?;
        // SAFETY: two valid C strings.
        let linked = unsafe {
            libc::linkat(
                libc::AT_FDCWD,
                from.as_ptr(),
                libc::AT_FDCWD,
                to.as_ptr(),
                0,
            )
        };
        if linked != 0 {
            return Err(io::Error::last_os_error());
        }
        let entry = self.files.lookup(&root(), newparent, newname)?;
        if (entry.attr.st_dev, entry.attr.st_ino) == (wanted.st_dev, wanted.st_ino) {
            return Ok(entry);
        }
        self.files.forget(&root(), entry.inode, 1);
        self.files.unlink(&root(), newparent, newname)?;
        Err(io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// Opens a file with these flags where there is room for a handle, and notes it.
    pub(super) fn opened<T>(
        &self,
        inode: u64,
        flags: u32,
        open: impl FnOnce() -> io::Result<(Option<u64>, T)>,
    ) -> io::Result<(Option<u64>, T)> {
        if !self.ledger.has_room() {
            return Err(full());
        }
        let (handle, rest) = open()?;
        if let Some(handle) = handle {
            self.ledger.open(handle, inode, flags);
        }
        Ok((handle, rest))
    }

    /// The handle by which to write to what the guest has open, and the flags of that. It is another one where
    /// the guest has changed `O_APPEND` since (F_SETFL), or writes pages of its cache at their places: the file
    /// is then opened once more. The passthrough would change the flags of the handle, and where the kernel
    /// refuses that, as it does for a file that may only be appended to, close its descriptor and go on using it.
    pub(super) fn writer(&self, handle: u64, flags: u32) -> io::Result<(u64, u32)> {
        const APPEND: u32 = libc::O_APPEND as u32;
        let opened = self.ledger.opened(handle).ok_or_else(closed)?;
        if (opened.flags ^ flags) & APPEND == 0 {
            return Ok((handle, opened.flags));
        }
        // What happens once, at the first opening.
        let once = (libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC) as u32;
        let flags = (opened.flags ^ APPEND) & !once;
        if let Some(twin) = opened.twin {
            return Ok((twin, flags));
        }
        let open = || {
            let (twin, ..) = self.files.open(&root(), opened.inode, flags, 0)?;
            Ok((twin, ()))
        };
        let twin = self
            .opened(opened.inode, flags, open)?
            .0
            .ok_or_else(closed)?;
        self.ledger.pair(handle, twin);
        Ok((twin, flags))
    }

    /// Notes that a handle was released, and releases the one that [`Self::writer`] opened beside it.
    pub(super) fn released(&self, inode: u64, handle: u64) {
        let Some(twin) = self.ledger.release(handle) else {
            return;
        };
        // The guest may have guessed its number and released it itself.
        let _ = self
            .files
            .release(&root(), inode, 0, twin, false, false, None);
        self.ledger.release(twin);
    }
}

/// Replaces a descriptor of a directory by one of a detached copy of its mount whose root it is: there is
/// nothing above it, and `..` stays.
fn cut_off(fd: i32) -> io::Result<()> {
    const OPEN_TREE_CLONE: libc::c_ulong = 1;
    let flags =
        OPEN_TREE_CLONE | libc::AT_EMPTY_PATH as libc::c_ulong | libc::O_CLOEXEC as libc::c_ulong;
    // SAFETY: the path is a valid C string, and the descriptor that comes back is ours alone.
    let tree = unsafe {
        let tree = libc::syscall(libc::SYS_open_tree, fd, c"".as_ptr(), flags);
        if tree < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(tree as i32)
    };
    // SAFETY: takes numbers only. The passthrough goes on with its descriptor, which now is of the copy.
    if unsafe { libc::dup3(tree.as_raw_fd(), fd, libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// How many descriptors the guest may hold.
fn descriptors() -> usize {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call fills the structure that it is given. Where it failed, the limit would be 0.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    let reserved = RESERVED.min(limit.rlim_cur / 2);
    usize::try_from(limit.rlim_cur - reserved).unwrap_or(usize::MAX)
}

/// The passthrough is told that everything is root's: whose it is, [`Identity`] has settled.
pub(super) fn root() -> Context {
    Context::default()
}

pub(super) fn full() -> io::Error {
    io::Error::from_raw_os_error(libc::ENFILE)
}

/// Nothing is open by that handle.
pub(super) fn closed() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

#[cfg(test)]
mod tests {
    use super::*;

    // must-test: FUSE: the file server run without its sandbox: no descriptor may lead out of it
    #[test]
    fn nothing_is_above_the_kept_descriptor() {
        let share = match Share::new(ShareRoot::Pivoted) {
            Ok(share) => share,
            Err(FsError::SetUp { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
                println!("skipped: detaching a mount needs CAP_SYS_ADMIN");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let fd = share.files.keep_fds()[0];
        let identity = |path: &CStr| {
            // SAFETY: a valid descriptor, C string and structure.
            unsafe {
                let mut stat: libc::stat = std::mem::zeroed();
                assert_eq!(libc::fstatat(fd, path.as_ptr(), &raw mut stat, 0), 0);
                (stat.st_dev, stat.st_ino)
            }
        };
        assert_eq!(identity(c"."), identity(c".."));
        assert_eq!(identity(c"."), identity(c"../../../.."));
        // And it still does what it is kept for.
        let file = tempfile::tempfile().unwrap();
        let name = std::ffi::CString::new(file.as_raw_fd().to_string()).unwrap();
        let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
        assert_eq!(identity(&name).1, inode);
    }
}
