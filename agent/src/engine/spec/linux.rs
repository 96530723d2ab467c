//! `linux` of the OCI runtime spec (config-linux.md), without `linux.resources`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{LinuxResources, Unsupported};

/// The Linux part of a spec.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Linux {
    /// User ids of the container's user namespace; of one to join those that it has.
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids of the container's user namespace; of one to join those that it has.
    pub gid_mappings: Vec<IdMapping>,
    /// Kernel parameters of the container's namespaces.
    pub sysctl: BTreeMap<String, String>,
    /// Limits.
    pub resources: Option<LinuxResources>,
    /// Control group, relative to the root of the hierarchy; empty: `/caisson/<id>`.
    pub cgroups_path: String,
    /// Namespaces to make or to join; one that is absent is the agent's.
    pub namespaces: Vec<Namespace>,
    /// Device nodes beside the default ones.
    pub devices: Vec<Device>,
    /// Not supported.
    pub net_devices: Unsupported,
    /// System call filter.
    pub seccomp: Option<Seccomp>,
    /// Propagation of the root mount.
    pub rootfs_propagation: String,
    /// Paths the container cannot read.
    pub masked_paths: Vec<String>,
    /// Paths the container cannot write.
    pub readonly_paths: Vec<String>,
    /// Not supported: SELinux.
    pub mount_label: Unsupported,
    /// Not supported.
    pub intel_rdt: Unsupported,
    /// Not supported.
    pub memory_policy: Unsupported,
    /// Execution domain.
    pub personality: Option<Personality>,
    /// Offsets of the clocks in a new time namespace, by clock.
    pub time_offsets: BTreeMap<String, TimeOffset>,
}

/// A range of ids of a user namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IdMapping {
    /// First id in the container.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// First id outside.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

/// A namespace to make or join.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    /// Which.
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    /// File of the namespace to join; empty: a new one.
    #[serde(default)]
    pub path: String,
}

/// The kinds of namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceKind {
    /// Process ids.
    Pid,
    /// Network.
    Network,
    /// Mounts.
    Mount,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Hostname and domain name.
    Uts,
    /// User and group ids.
    User,
    /// View of the control groups.
    Cgroup,
    /// Monotonic and boot-time clocks.
    Time,
}

/// One of `linux.devices`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Device {
    /// `c`, `u`, `b` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Absolute path in the container.
    pub path: String,
    /// Major number.
    pub major: Option<u32>,
    /// Minor number.
    pub minor: Option<u32>,
    /// Permissions; none: 0666.
    pub file_mode: Option<u32>,
    /// Owner in the container; none: 0.
    pub uid: Option<u32>,
    /// Group in the container; none: 0.
    pub gid: Option<u32>,
}

/// `linux.seccomp`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Seccomp {
    /// Action for a system call no rule matches.
    pub default_action: String,
    /// Its errno, for `SCMP_ACT_ERRNO` and `SCMP_ACT_TRACE`.
    pub default_errno_ret: Option<u32>,
    /// Architectures whose system calls are possible at all.
    pub architectures: Vec<String>,
    /// Flags of seccomp(2).
    pub flags: Vec<String>,
    /// Not supported: user notification.
    pub listener_path: Unsupported,
    /// Not supported: user notification.
    pub listener_metadata: Unsupported,
    /// Rules.
    pub syscalls: Vec<SeccompRule>,
}

/// One of `linux.seccomp.syscalls`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct SeccompRule {
    /// System calls by name; one this build does not know is one no program can reach by that name, and is skipped.
    pub names: Vec<String>,
    /// Action.
    pub action: String,
    /// Its errno, for `SCMP_ACT_ERRNO` and `SCMP_ACT_TRACE`.
    pub errno_ret: Option<u32>,
    /// Conditions; all must hold.
    pub args: Vec<SeccompArg>,
}

/// A condition on one argument.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct SeccompArg {
    /// Which argument, 0 to 5.
    pub index: u32,
    /// Compared with; the mask of `SCMP_CMP_MASKED_EQ`.
    pub value: u64,
    /// Second value, of `SCMP_CMP_MASKED_EQ`.
    pub value_two: u64,
    /// Comparison.
    pub op: String,
}

/// `linux.personality`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Personality {
    /// `LINUX` or `LINUX32`.
    pub domain: String,
    /// None are defined.
    pub flags: Vec<String>,
}

/// Offset of a clock.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimeOffset {
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds, below 10⁹.
    pub nanosecs: u32,
}
