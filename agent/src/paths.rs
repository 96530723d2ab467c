//! Where the agent keeps things in the guest. The daemon's specs name some of these.

/// Everything of Caisson.
pub const BASE: &str = "/run/caisson";
/// The pod's own files: `resolv.conf`, `hosts`, `hostname`, and the `shm` tmpfs.
pub const SANDBOX: &str = "/run/caisson/sandbox";
/// Writable layers.
pub const SCRATCH: &str = "/run/caisson/scratch";
/// Bind mounts of the pod's namespaces; `pid` is there if the sandbox asked for a shared PID namespace.
pub const NAMESPACES: &str = "/run/caisson/ns";
/// cgroup v2.
pub const CGROUP: &str = "/sys/fs/cgroup";
