//! What the agent hands to the process that becomes a container's: see [`super::init`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::seccomp::Filter;
use super::spec::{Hook, NamespaceKind, Personality, Process, Spec};

/// What a prepared process is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Plan {
    /// Become a container's first process.
    Create(Box<Create>),
    /// Become one more process of a container.
    Exec(Box<Exec>),
    /// Run hooks in the agent's namespaces, and report.
    Hooks(Vec<Hook>, State),
    /// Make a user namespace and stay in it for a while; for a pod with those that it owns.
    Namespaces {
        /// For a pod.
        pod: bool,
    },
}

/// A container to make.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Create {
    /// Its spec.
    pub spec: Spec,
    /// Where its root file system is mounted.
    pub rootfs: PathBuf,
    /// Its control group's directory.
    pub cgroup: PathBuf,
    /// Its system call filter.
    pub filter: Option<Filter>,
    /// For its hooks.
    pub state: State,
}

/// A process to add.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Exec {
    /// The process.
    pub process: Process,
    /// Namespaces of the container, to be joined.
    pub namespaces: Vec<NamespaceKind>,
    /// The container's filter.
    pub filter: Option<Filter>,
    /// The container's execution domain.
    pub personality: Option<Personality>,
}

/// A container's state as hooks get it (runtime.md, "State").
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State {
    /// Version of the specification.
    pub oci_version: String,
    /// The container.
    pub id: String,
    /// `creating`, `created`, `running` or `stopped`.
    pub status: String,
    /// Its first process, as the agent sees it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pid: Option<i32>,
    /// Its directory.
    pub bundle: PathBuf,
    /// From its spec.
    pub annotations: std::collections::BTreeMap<String, String>,
}
