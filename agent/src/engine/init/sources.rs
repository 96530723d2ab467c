//! Sources of bind mounts that the second stage could not open: the host's files, for an agent that runs there, and
//! whatever a container with a user namespace gets.
//!
//! The agent sees next to nothing of the host, so that nothing of it is held by the pod's mount namespace. What a
//! container is to get is taken from the host's own mount namespace at that moment; a copy of a shared mount is a peer
//! of it, so that mounts propagate to and from the host as the container's options ask.
//!
//! The root of a user namespace is nobody outside of it: it may not pass through every directory of the agent's, and
//! cannot map the IDs of a mount.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::AT_FDCWD;
use nix::sched::{CloneFlags, setns};

use super::mount_options::Options;
use super::{During, Step};
use crate::engine::paths::HOST;
use crate::engine::spec::{NamespaceKind, Spec};
use crate::engine::sys;

/// Detached copies of mounts, by the number of the mount in the spec.
pub(super) type Sources = BTreeMap<usize, OwnedFd>;

/// A source to open.
struct Wanted<'a> {
    number: usize,
    path: &'a str,
    recursive: bool,
}

/// Opens them all. Needs a process of one thread, which leaves its mount namespace meanwhile, and no user namespace:
/// `user_namespace` is the container's, if the spec has one.
pub(super) fn open(
    spec: &Spec,
    host: OwnedFd,
    user_namespace: BorrowedFd<'_>,
) -> Result<Sources, Step> {
    let linux = spec.linux();
    let mapped = linux
        .namespaces
        .iter()
        .any(|namespace| namespace.kind == NamespaceKind::User);
    let (mut of_host, mut of_agent) = (Vec::new(), Vec::new());
    for (number, mount) in spec.mounts.iter().enumerate() {
        let options = Options::parse(&mount.options)
            .map_err(|reason| Step::other(format!("mount {}", mount.destination), reason))?;
        if options.remount || !(options.bind || mount.kind == "bind") {
            continue;
        }
        let wanted = |path| Wanted {
            number,
            path,
            recursive: options.bind_recursive,
        };
        match mount.source.strip_prefix(HOST) {
            Some(path) if path.starts_with('/') => of_host.push(wanted(path)),
            _ if mapped && mount.source.starts_with('/') => of_agent.push(wanted(&mount.source)),
            _ => {}
        }
    }
    let mut sources = Sources::new();
    for one in of_agent {
        let copy = copy(&one).during(|| format!("take {}", one.path))?;
        // As it would be in the container's mount namespace.
        let mut slave = sys::no_attributes();
        slave.propagation = libc::MS_SLAVE;
        sys::set_attributes(copy.as_fd(), true, &slave)
            .during(|| format!("detach {} from the agent's mounts", one.path))?;
        sources.insert(one.number, copy);
    }
    if !of_host.is_empty() {
        let own = File::open("/proc/self/ns/mnt").during(|| "open its mount namespace".into())?;
        setns(host.as_fd(), CloneFlags::CLONE_NEWNS)
            .during(|| "enter the host's mount namespace".into())?;
        for one in of_host {
            let copy = copy(&one).during(|| format!("take {} of the host", one.path))?;
            sources.insert(one.number, copy);
        }
        setns(own, CloneFlags::CLONE_NEWNS).during(|| "return to its mount namespace".into())?;
    }
    for (number, mount) in spec.mounts.iter().enumerate() {
        if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
            continue;
        }
        let what = || format!("map the IDs of {} (mounts[{number}])", mount.destination);
        match sources.get(&number) {
            Some(source) => map_ids(source, user_namespace).during(what)?,
            None => return Err(Step::other(what(), "it is no bind mount of a path")),
        }
    }
    Ok(sources)
}

fn copy(wanted: &Wanted<'_>) -> io::Result<OwnedFd> {
    sys::clone_tree(AT_FDCWD, &CString::new(wanted.path)?, wanted.recursive)
}

/// Maps the IDs of the mount at the top; those below keep their owners, as the specification has it for `idmap`.
fn map_ids(mount: &OwnedFd, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let mut change = sys::no_attributes();
    change.attr_set = libc::MOUNT_ATTR_IDMAP;
    change.userns_fd = namespace.as_raw_fd() as u64;
    sys::set_attributes(mount.as_fd(), false, &change).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => io::Error::other(
            "its file system cannot do that in this kernel (tmpfs can from Linux 6.3 on)",
        ),
        _ => error,
    })
}
