//! `process` of the OCI runtime spec (config.md, "Process").

use serde::{Deserialize, Serialize};

use super::Unsupported;

/// A process to run in a container: its own or one more.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Process {
    /// Gives it a terminal of its own instead of the standard streams.
    pub terminal: bool,
    /// Initial size of that terminal.
    pub console_size: Option<ConsoleSize>,
    /// Who it runs as.
    pub user: User,
    /// Program and arguments; the program is looked up in `PATH` unless it has a slash.
    pub args: Vec<String>,
    /// Not supported: Windows.
    pub command_line: Unsupported,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// Absolute working directory; made if it is missing.
    pub cwd: String,
    /// Capability sets; none: no capabilities at all.
    pub capabilities: Option<Capabilities>,
    /// Resource limits as of setrlimit(2).
    pub rlimits: Vec<Rlimit>,
    /// Sets no_new_privs.
    pub no_new_privileges: bool,
    /// The AppArmor profile it runs under; empty: none. The guest's kernel has no AppArmor, a host's may.
    pub apparmor_profile: String,
    /// Value for `/proc/<pid>/oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// Not supported.
    pub scheduler: Unsupported,
    /// Not supported: the guest's kernel has no SELinux.
    pub selinux_label: Unsupported,
    /// Not supported.
    pub io_priority: Unsupported,
    /// Not supported.
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Unsupported,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

/// User and groups, numbers of the container's user namespace.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct User {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// File mode creation mask; none: 0022.
    pub umask: Option<u32>,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// `user[:group]`, each a name or a number, to be looked up in the container's own files; it takes the place of
    /// `uid` and `gid`. The host cannot look into an image's files, so it hands over what the image says.
    pub username: String,
    /// Only the groups named here: those that list the user in the container's `/etc/group` are left out. It is not in
    /// the specification, which has no word for CRI's `supplemental_groups_policy: Strict`.
    #[serde(
        rename = "caissonStrictGroups",
        skip_serializing_if = "std::ops::Not::not"
    )]
    pub strict_groups: bool,
}

/// Capability sets by name, such as `CAP_CHOWN`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Capabilities {
    /// Bounding set.
    pub bounding: Vec<String>,
    /// Effective set.
    pub effective: Vec<String>,
    /// Inheritable set.
    pub inheritable: Vec<String>,
    /// Permitted set.
    pub permitted: Vec<String>,
    /// Ambient set.
    pub ambient: Vec<String>,
}

/// One resource limit.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rlimit {
    /// Name, such as `RLIMIT_NOFILE`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Hard limit.
    pub hard: u64,
    /// Soft limit.
    pub soft: u64,
}
