//! The namespaces of a pod whose IDs are mapped: its containers' user namespace, and those of network, IPC and hostname
//! that belong to it, so that a container's root can do in them what root can.
//!
//! The agent stays outside, with all of its rights. For what is the pod's and not the agent's it goes [`inside`].

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{fs, io};

use nix::sched::{CloneFlags, setns};

use super::plan::UserIds;
use super::{Context, SandboxError, create_dir, network};
use crate::sandbox::plan::Interface;
use crate::{boot, engine, loopback, paths};

/// The namespaces beside the user namespace.
#[derive(Debug)]
struct Owned {
    network: File,
    ipc: File,
    uts: File,
}

static OWNED: OnceLock<Owned> = OnceLock::new();

/// The pod's user namespace.
pub fn user() -> PathBuf {
    Path::new(paths::NAMESPACES).join("user")
}

/// Makes them, at `/run/caisson/ns/{user,net,ipc,uts}`.
pub fn create(ids: &UserIds) -> Result<(), SandboxError> {
    create_dir(paths::NAMESPACES)?;
    engine::make_pod_namespaces(ids.uids, ids.gids, Path::new(paths::NAMESPACES))
        .map_err(|error| io::Error::other(error.to_string()))
        .context(|| "make the pod's namespaces".into())?;
    let open = |name| {
        let path = Path::new(paths::NAMESPACES).join(name);
        File::open(&path).context(|| format!("open {}", path.display()))
    };
    let owned = Owned {
        network: open("net")?,
        ipc: open("ipc")?,
        uts: open("uts")?,
    };
    OWNED.set(owned).map_err(|_| SandboxError::Invalid {
        field: "user_namespace",
        reason: "is made once".into(),
    })?;
    inside(loopback::up)
        .flatten()
        .context(|| "bring the pod's lo up".into())
}

/// Gives the pod's network devices, and what a guest's network has beside them, to the new network namespace.
pub fn move_network(interfaces: &[Interface]) -> Result<(), SandboxError> {
    let Some(owned) = OWNED.get() else {
        return Ok(());
    };
    network::move_to(interfaces, owned.network.as_fd())?;
    let (name, value) = boot::PING_GROUPS;
    inside(|| fs::write(Path::new("/proc/sys").join(name), value))
        .flatten()
        .context(|| format!("set {name} to {value}"))
}

/// Does something where the pod's network, IPC and hostname are: here, or on a thread that enters its namespaces.
///
/// # Errors
/// If they cannot be entered.
pub fn inside<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let Some(owned) = OWNED.get() else {
        return Ok(work());
    };
    let entered = || -> io::Result<T> {
        setns(&owned.network, CloneFlags::CLONE_NEWNET)?;
        setns(&owned.ipc, CloneFlags::CLONE_NEWIPC)?;
        setns(&owned.uts, CloneFlags::CLONE_NEWUTS)?;
        Ok(work())
    };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("pod".into())
            .spawn_scoped(scope, entered)?
            .join()
            .map_err(|_| io::Error::other("the thread in the pod's namespaces has panicked"))?
    })
}

/// Gives what the containers share to their root: it may change its hosts file.
pub fn own_files(ids: &UserIds) -> Result<(), SandboxError> {
    for name in ["resolv.conf", "hosts", "hostname", "shm"] {
        let path = Path::new(paths::SANDBOX).join(name);
        std::os::unix::fs::chown(&path, Some(ids.uids.host_id), Some(ids.gids.host_id))
            .context(|| format!("give away {}", path.display()))?;
    }
    Ok(())
}
