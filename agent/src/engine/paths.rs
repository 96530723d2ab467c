//! Where the engine keeps things in the guest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Sources of bind mounts below this path are files of the host, where the agent runs there ([`set_host`]).
pub const HOST: &str = "/run/caisson/host";

/// Base directories; [`set`] changes them before the first use.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Mount points of image layers, one a layer, named by number.
    pub layers: PathBuf,
    /// Writable parts of the containers' root file systems.
    pub scratch: PathBuf,
    /// A directory a container, with its mounted root file system.
    pub containers: PathBuf,
    /// Images that containers have as volumes: `<container>/<number>`; parts of volumes in memory:
    /// `<container>/m<number>`.
    pub volumes: PathBuf,
    /// Volumes in memory, which the containers of a pod share, by name.
    pub memory: PathBuf,
    /// The agent's program, run anew to become a container's process; it must call [`super::init_main`] when its
    /// first argument is [`super::INIT`].
    pub program: PathBuf,
    /// Mount point of the cgroup v2 hierarchy.
    pub cgroup: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            layers: "/run/caisson/layers".into(),
            scratch: "/run/caisson/scratch".into(),
            containers: "/run/caisson/containers".into(),
            volumes: "/run/caisson/volumes".into(),
            memory: "/run/caisson/memory".into(),
            program: "/proc/self/exe".into(),
            cgroup: "/sys/fs/cgroup".into(),
        }
    }
}

static PATHS: OnceLock<Paths> = OnceLock::new();
static HOST_MOUNTS: OnceLock<OwnedFd> = OnceLock::new();

/// Sets the base directories, for tests that run beside a system of their own.
///
/// # Errors
/// Gives them back if they were set or used before.
pub fn set(paths: Paths) -> Result<(), Box<Paths>> {
    PATHS.set(paths).map_err(Box::new)
}

/// Names the mount namespace in which sources below [`HOST`] are looked up.
///
/// # Errors
/// Gives it back if one was named before.
pub fn set_host(namespace: OwnedFd) -> Result<(), OwnedFd> {
    HOST_MOUNTS.set(namespace)
}

/// The host's mount namespace, if the agent runs there.
pub(crate) fn host() -> Option<BorrowedFd<'static>> {
    HOST_MOUNTS.get().map(AsFd::as_fd)
}

pub(crate) fn get() -> &'static Paths {
    PATHS.get_or_init(Paths::default)
}

impl Paths {
    pub(crate) fn container(&self, id: &str) -> PathBuf {
        self.containers.join(id)
    }

    pub(crate) fn rootfs(&self, id: &str) -> PathBuf {
        self.container(id).join("rootfs")
    }

    pub(crate) fn scratch(&self, id: &str) -> PathBuf {
        self.scratch.join(id)
    }

    pub(crate) fn in_cgroup(&self, path: &Path) -> PathBuf {
        self.cgroup.join(path.strip_prefix("/").unwrap_or(path))
    }
}
