//! The OCI runtime spec, version 1.2: the part that makes sense for a container in a Linux guest.
//!
//! The structures are strict. A field that the specification does not have fails the parse with an error that
//! names it; one that it has and this engine does not do is refused by [`Spec::parse`] under its full path, unless
//! it is set to its empty value. Nothing is ignored, because a limit or a protection that is silently dropped
//! is worse than a container that does not start.

mod check;
mod linux;
mod process;
mod resources;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use check::Unsupported;
pub use linux::{
    Device, IdMapping, Linux, Namespace, NamespaceKind, Personality, Seccomp, SeccompArg,
    SeccompRule, TimeOffset,
};
pub use process::{Capabilities, ConsoleSize, Process, Rlimit, User};
pub use resources::{
    BlockIo, Cpu, DeviceRule, HugepageLimit, LinuxResources, Memory, Pids, ThrottleDevice,
    WeightDevice,
};

/// The largest document that is parsed, in bytes.
pub const MAX_JSON: usize = 4 << 20;

/// Why a document was refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// More bytes than [`MAX_JSON`].
    #[error("the {what} has {size} bytes, the limit is {MAX_JSON}")]
    TooLarge {
        /// Which document.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
    },
    /// Not JSON, a field of the wrong type, or a field the specification does not have.
    #[error("the {what} is not valid: {source}")]
    Json {
        /// Which document.
        what: &'static str,
        /// Where and why; names an unknown field.
        source: serde_json::Error,
    },
    /// A field of the specification that this engine does not do.
    #[error("{field} is not supported; leave it out")]
    Unsupported {
        /// Its path, such as `linux.intelRdt`.
        field: String,
    },
    /// A field with a value that cannot be.
    #[error("{field}: {reason}")]
    Invalid {
        /// Its path.
        field: String,
        /// What is wrong with the value.
        reason: String,
    },
}

impl SpecError {
    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn unsupported(field: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
        }
    }
}

/// `config.json` of the OCI runtime spec (config.md).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Spec {
    /// Version of the specification; 1.x is understood.
    pub oci_version: String,
    /// The container's process; required here, though not by the specification.
    pub process: Option<Process>,
    /// The root file system.
    pub root: Option<Root>,
    /// Hostname in the container's UTS namespace; empty: unchanged.
    pub hostname: String,
    /// NIS domain name in the container's UTS namespace; empty: unchanged.
    pub domainname: String,
    /// Mounts, in the order they are made.
    pub mounts: Vec<Mount>,
    /// Programs run at points of the container's life.
    pub hooks: Option<Hooks>,
    /// Free-form notes of those above; handed to hooks, otherwise unused.
    pub annotations: BTreeMap<String, String>,
    /// The Linux part.
    pub linux: Option<Linux>,
    /// Not supported.
    pub solaris: Unsupported,
    /// Not supported.
    pub windows: Unsupported,
    /// Not supported: the microVM is the sandbox's, not the container's.
    pub vm: Unsupported,
    /// Not supported.
    pub zos: Unsupported,
}

/// `root` (config.md, "Root").
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Root {
    /// Must be `rootfs`: the engine stacks the layers and knows where.
    pub path: String,
    /// Makes the root file system read-only for the container.
    pub readonly: bool,
}

/// One of `mounts` (config.md, "Mounts").
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mount {
    /// Absolute path in the container.
    pub destination: String,
    /// File system type, or `bind`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What to mount; for a bind mount an absolute path in the guest.
    pub source: String,
    /// Options as of mount(8), and the specification's recursive ones.
    pub options: Vec<String>,
    /// User ids of a bind mount; those of the container's user namespace, or none.
    #[serde(rename = "uidMappings")]
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids of a bind mount; those of the container's user namespace, or none.
    #[serde(rename = "gidMappings")]
    pub gid_mappings: Vec<IdMapping>,
}

/// `hooks` (config.md, "POSIX-platform Hooks").
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Hooks {
    /// Deprecated name of `createRuntime`, run before it.
    pub prestart: Vec<Hook>,
    /// In the guest's namespaces, once the container's namespaces exist.
    pub create_runtime: Vec<Hook>,
    /// In the container's namespaces, path resolved in the guest, before the root is changed.
    pub create_container: Vec<Hook>,
    /// In the container, before its process is executed.
    pub start_container: Vec<Hook>,
    /// In the guest, after the container's process was executed.
    pub poststart: Vec<Hook>,
    /// In the guest, after the container is destroyed.
    pub poststop: Vec<Hook>,
}

/// One hook.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hook {
    /// Absolute path of the program.
    pub path: String,
    /// Its arguments, the program's name first.
    pub args: Vec<String>,
    /// Its environment, `NAME=value`.
    pub env: Vec<String>,
    /// Seconds until it is killed; none: no limit.
    pub timeout: Option<u32>,
}

impl Spec {
    /// Parses and checks a `config.json`.
    ///
    /// # Errors
    /// One that names the field if a field is unknown, unsupported, or has a value that cannot be.
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        let spec: Self = from_json("OCI spec", json)?;
        check::spec(&spec)?;
        Ok(spec)
    }

    /// The Linux part, or an empty one.
    pub(crate) fn linux(&self) -> std::borrow::Cow<'_, Linux> {
        match &self.linux {
            Some(linux) => std::borrow::Cow::Borrowed(linux),
            None => std::borrow::Cow::Owned(Linux::default()),
        }
    }
}

impl Process {
    /// Parses and checks a `process` object.
    ///
    /// # Errors
    /// As [`Spec::parse`].
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        let process: Self = from_json("OCI process", json)?;
        check::process(&process)?;
        Ok(process)
    }
}

impl LinuxResources {
    /// Parses and checks a `linux.resources` object.
    ///
    /// # Errors
    /// As [`Spec::parse`].
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        let resources: Self = from_json("OCI resources", json)?;
        check::resources(&resources)?;
        Ok(resources)
    }
}

fn from_json<T: serde::de::DeserializeOwned>(
    what: &'static str,
    json: &[u8],
) -> Result<T, SpecError> {
    if json.len() > MAX_JSON {
        return Err(SpecError::TooLarge {
            what,
            size: json.len(),
        });
    }
    serde_json::from_slice(json).map_err(|source| SpecError::Json { what, source })
}

#[cfg(test)]
mod tests;
