//! Bind mounts of the host's files, for an agent that runs there.
//!
//! The agent sees next to nothing of the host, so that nothing of it is held by the pod's mount namespace. What a
//! container is to get is taken from the host's own mount namespace at that moment; a copy of a shared mount is a peer
//! of it, so that mounts propagate to and from the host as the container's options ask.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::AT_FDCWD;
use nix::sched::{CloneFlags, setns};

use super::mount_options::Options;
use super::{During, Step};
use crate::engine::paths::HOST;
use crate::engine::spec::Mount;
use crate::engine::sys;

/// Detached copies of mounts of the host, by the number of the mount in the spec.
pub(super) type Sources = BTreeMap<usize, OwnedFd>;

/// Opens all sources that are the host's. Needs a process of one thread, which leaves its mount namespace meanwhile.
pub(super) fn open(mounts: &[Mount], namespace: OwnedFd) -> Result<Sources, Step> {
    let mut wanted = Vec::new();
    for (number, mount) in mounts.iter().enumerate() {
        let Some(path) = mount.source.strip_prefix(HOST) else {
            continue;
        };
        let options = Options::parse(&mount.options)
            .map_err(|reason| Step::other(format!("mount {}", mount.destination), reason))?;
        if path.starts_with('/') && (options.bind || mount.kind == "bind") {
            wanted.push((number, path, options.bind_recursive));
        }
    }
    let mut sources = Sources::new();
    if wanted.is_empty() {
        return Ok(sources);
    }
    let own = File::open("/proc/self/ns/mnt").during(|| "open its mount namespace".into())?;
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS)
        .during(|| "enter the host's mount namespace".into())?;
    for (number, path, recursive) in wanted {
        let opened = CString::new(path)
            .map_err(std::io::Error::from)
            .and_then(|path| sys::clone_tree(AT_FDCWD, &path, recursive));
        sources.insert(
            number,
            opened.during(|| format!("take {path} of the host"))?,
        );
    }
    setns(own, CloneFlags::CLONE_NEWNS).during(|| "return to its mount namespace".into())?;
    Ok(sources)
}
