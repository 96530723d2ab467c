//! System calls that nix has no wrapper for.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes over a descriptor the kernel has just returned.
fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let number = check(result)?;
    // SAFETY: the call succeeded and returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
}

/// open_tree(2): a detached copy of the mount at `path` (relative to `base`; empty: `base` itself).
pub(crate) fn clone_tree(
    base: BorrowedFd<'_>,
    path: &CStr,
    recursive: bool,
) -> io::Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE
        | libc::OPEN_TREE_CLOEXEC
        | libc::AT_EMPTY_PATH as libc::c_uint
        | libc::AT_NO_AUTOMOUNT as libc::c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as libc::c_uint;
    }
    // SAFETY: `path` is a string that ends in NUL; the call returns a descriptor or an error.
    descriptor(unsafe {
        libc::syscall(libc::SYS_open_tree, base.as_raw_fd(), path.as_ptr(), flags)
    })
}

/// move_mount(2): attaches the detached mount `mount` on `target`.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    const F_EMPTY_PATH: libc::c_uint = 0x4;
    const T_EMPTY_PATH: libc::c_uint = 0x40;
    let empty = c"".as_ptr();
    // SAFETY: both paths are the empty string; the descriptors are open for the length of the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            empty,
            target.as_raw_fd(),
            empty,
            F_EMPTY_PATH | T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// mount_setattr(2) on the mount that `mount` is the root of.
pub(crate) fn set_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: &libc::mount_attr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `attributes` is a struct mount_attr, passed with its size; the path is the empty string.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// A struct mount_attr that changes nothing.
pub(crate) fn no_attributes() -> libc::mount_attr {
    libc::mount_attr {
        attr_set: 0,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    }
}

/// fsopen(2), fsconfig(2) and fsmount(2): a file system being made.
pub(crate) struct NewFileSystem(OwnedFd);

impl NewFileSystem {
    /// Opens the type.
    pub fn open(kind: &CStr) -> io::Result<Self> {
        const CLOEXEC: libc::c_uint = 1;
        // SAFETY: `kind` is a string that ends in NUL; the call returns a descriptor or an error.
        descriptor(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOEXEC) }).map(Self)
    }

    /// Sets a parameter; without a value it is a flag.
    pub fn set(&self, key: &CStr, value: Option<&CStr>) -> io::Result<()> {
        const SET_FLAG: libc::c_uint = 0;
        const SET_STRING: libc::c_uint = 1;
        let (command, value) = match value {
            Some(value) => (SET_STRING, value.as_ptr()),
            None => (SET_FLAG, std::ptr::null()),
        };
        // SAFETY: key and value are strings that end in NUL, or the value is null as the command wants it.
        let result = check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                key.as_ptr(),
                value,
                0,
            )
        });
        self.explained(result).map(drop)
    }

    /// Makes the file system and a detached mount of it.
    pub fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        const CREATE: libc::c_uint = 6;
        const CLOEXEC: libc::c_uint = 1;
        let null = std::ptr::null::<libc::c_char>();
        // SAFETY: this command takes neither key nor value.
        let result = check(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                CREATE,
                null,
                null,
                0,
            )
        });
        self.explained(result)?;
        // SAFETY: takes only numbers, returns a descriptor or an error.
        descriptor(unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                CLOEXEC,
                attributes as libc::c_uint,
            )
        })
    }

    /// Adds what the kernel has to say about an error, if anything.
    fn explained<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            let mut text = [0u8; 512];
            match nix::unistd::read(&self.0, &mut text) {
                Ok(length) if length > 2 => {
                    let text = String::from_utf8_lossy(&text[2..length]);
                    io::Error::new(error.kind(), format!("{} ({error})", text.trim_end()))
                }
                _ => error,
            }
        })
    }
}

/// Which side of a [`clone3`] this is.
pub(crate) enum Side {
    /// The new process.
    Child,
    /// The caller.
    Parent {
        /// The new process.
        pid: i32,
        /// A descriptor of it.
        pidfd: OwnedFd,
    },
}

/// clone3(2): a process beside the caller (a child of the caller's parent), in the control group `cgroup` and in new
/// namespaces as of `flags`.
///
/// # Safety
/// The caller must have one thread, or the child's copies of locks may be held for ever.
pub(crate) unsafe fn clone3(flags: u64, cgroup: BorrowedFd<'_>) -> io::Result<Side> {
    // libc's constant has a type that it does not fit into.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    // SAFETY: a struct of integers, for which zero means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PARENT as u64 | libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
    args.pidfd = &raw mut pidfd as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM the child has its own copy of everything and returns on its own copy of this stack;
    // the caller has one thread, so nothing that the child needs is half-changed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    };
    match check(result)? {
        0 => Ok(Side::Child),
        pid => Ok(Side::Parent {
            pid: pid as i32,
            // SAFETY: the kernel stored a new descriptor there for us.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// pidfd_send_signal(2).
pub(crate) fn signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no signal information is passed; the rest are numbers.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// close_range(2): marks every descriptor from `first` up to be closed by exec.
pub(crate) fn close_on_exec_from(first: libc::c_uint) -> io::Result<()> {
    // SAFETY: changes only a flag of descriptors.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
    .map(drop)
}

/// The other end of a pseudo-terminal (`TIOCGPTPEER`), found without a path.
pub(crate) fn terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: this request takes open flags and returns a descriptor or an error.
    descriptor(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())
}

/// Unlocks a pseudo-terminal (`TIOCSPTLCK`).
pub(crate) fn unlock_terminal(master: BorrowedFd<'_>) -> io::Result<()> {
    let unlocked: libc::c_int = 0;
    // SAFETY: this request reads one int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) }.into())
        .map(drop)
}

/// Sets the size of a terminal (`TIOCSWINSZ`).
pub(crate) fn set_terminal_size(
    terminal: BorrowedFd<'_>,
    rows: u16,
    columns: u16,
) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: this request reads one struct winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into())
        .map(drop)
}

/// Makes a terminal the controlling one of the calling session leader (`TIOCSCTTY`).
pub(crate) fn take_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this request takes a number.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// Sets a resource limit of the calling process.
pub(crate) fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: reads one struct rlimit64; the old limit is not asked for.
    check(unsafe { libc::prlimit64(0, resource, &raw const limit, std::ptr::null_mut()) }.into())
        .map(drop)
}
