//! As whom the file server's thread acts.
//!
//! The thread's file system IDs (`setfsuid(2)`) are root's. To create something for another user of the guest
//! it takes that user's for one call, so that the owner is right from the start. The guest's kernel has
//! checked the user's permissions, among them those of groups that a FUSE request does not name; the thread
//! therefore keeps its capabilities meanwhile, which the kernel would take away.

use std::io;
use std::marker::PhantomData;

use caps::{CapSet, CapsHashSet};

/// No user or group has this ID; setting it changes nothing and tells the present one.
const NOBODY: u32 = u32::MAX;

/// The user for whom this thread creates files, until dropped.
pub struct Identity {
    /// Not to be sent: IDs are a thread's.
    thread: PhantomData<*const ()>,
}

impl Identity {
    /// Gives this thread the file system IDs of root, once and for all.
    ///
    /// # Errors
    /// `PermissionDenied` where it lacks `CAP_SETUID` or `CAP_SETGID`.
    pub fn take_root() -> io::Result<()> {
        let before = effective()?;
        if set_group(0) && set_user(0) {
            restore(&before)
        } else {
            Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "serving files as the guest's users needs CAP_SETUID and CAP_SETGID",
            ))
        }
    }

    /// Acts as this user and group until dropped. The thread's own IDs must be root's.
    ///
    /// # Errors
    /// `EINVAL` for IDs that none can have.
    pub fn assume(user: u32, group: u32) -> io::Result<Self> {
        // From here on, dropping undoes what was done.
        let identity = Self {
            thread: PhantomData,
        };
        if user == 0 && group == 0 {
            return Ok(identity);
        }
        let before = effective()?;
        if user == NOBODY || group == NOBODY || !set_group(group) || !set_user(user) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        restore(&before)?;
        Ok(identity)
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        // Setting root's again gives the capabilities back, too; these calls succeeded in take_root.
        set_user(0);
        set_group(0);
    }
}

fn effective() -> io::Result<CapsHashSet> {
    caps::read(None, CapSet::Effective).map_err(io::Error::other)
}

fn restore(capabilities: &CapsHashSet) -> io::Result<()> {
    caps::set(None, CapSet::Effective, capabilities).map_err(io::Error::other)
}

/// Sets this thread's file system user ID; whether it is set.
fn set_user(id: u32) -> bool {
    // SAFETY: both calls take a number and change this thread's credentials alone. The C library's setfsuid
    // is that system call, without its usual care for all threads.
    unsafe {
        libc::setfsuid(id);
        libc::setfsuid(NOBODY) as u32 == id
    }
}

/// Sets this thread's file system group ID; whether it is set.
fn set_group(id: u32) -> bool {
    // SAFETY: as for the user.
    unsafe {
        libc::setfsgid(id);
        libc::setfsgid(NOBODY) as u32 == id
    }
}
