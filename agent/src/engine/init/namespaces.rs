//! The process that new user namespaces, and those that they own, begin with.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns, unshare};

use super::{During, Step};

/// Of linux/nsfs.h: the user namespace that owns a namespace.
const NS_GET_USERNS: libc::Ioctl = 0xb701;

/// Enters a new user namespace; for a pod with new network, IPC and UTS namespaces that it owns. A network namespace that
/// another user namespace owns was made for the pod: it stays, and so does its owner.
pub(super) fn make(pod: bool) -> Result<(), Step> {
    let mut new = CloneFlags::CLONE_NEWUSER;
    if pod {
        new = CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
        match owner_of_network().during(|| "find out whose the network namespace is".into())? {
            Some(owner) => setns(owner, CloneFlags::CLONE_NEWUSER)
                .during(|| "join the user namespace of the pod's network".into())?,
            None => new |= CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET,
        }
    }
    unshare(new).during(|| "make a user namespace".into())
}

/// The user namespace that owns this process's network namespace; `None` if it is the process's own, or one above.
fn owner_of_network() -> io::Result<Option<File>> {
    let network = File::open("/proc/self/ns/net")?;
    // SAFETY: this request takes no argument and returns a descriptor or an error.
    let owner = unsafe { libc::ioctl(network.as_raw_fd(), NS_GET_USERNS) };
    if owner < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EPERM) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: the call succeeded and returned a new descriptor that nobody else owns.
    let owner = File::from(unsafe { OwnedFd::from_raw_fd(owner) });
    let own = File::open("/proc/self/ns/user")?.metadata()?;
    let found = owner.metadata()?;
    Ok(((own.dev(), own.ino()) != (found.dev(), found.ino())).then_some(owner))
}
