//! The records: everything by which a daemon that starts finds its pods again.

use std::net::IpAddr;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use caisson_proto::cri;
use serde::{Deserialize, Serialize};

use crate::config::HandlerKind;

/// A protobuf message inside a record, kept in its own encoding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Proto<T>(pub T);

impl<T: prost::Message> Serialize for Proto<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(self.0.encode_to_vec()))
    }
}

impl<'de, T: prost::Message + Default> Deserialize<'de> for Proto<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(serde::de::Error::custom)?;
        T::decode(bytes.as_slice())
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

/// What becomes of a pod sandbox. Each state is written before the work that leads out of it begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// The name is reserved and the sandbox is being made. Found after a crash: undone.
    Creating,
    /// It runs.
    Ready,
    /// It is being stopped. Found after a crash: stopped.
    Stopping,
    /// It does not run.
    NotReady,
    /// It is being removed. Found after a crash: removed.
    Removing,
}

/// A pod's network, so that it can be shown and taken down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// The network namespace's path.
    pub netns: PathBuf,
    /// The interface's name in the pod.
    pub interface: String,
    /// Its MAC address.
    pub mac: String,
    /// Its MTU.
    pub mtu: u32,
    /// Its addresses with prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Destination with prefix length, gateway, metric.
    pub routes: Vec<(IpAddr, u8, Option<IpAddr>, u32)>,
    /// The addresses shown to the client, the primary one first.
    pub ips: Vec<IpAddr>,
}

/// A pod sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// 64 hexadecimal digits.
    pub id: String,
    /// The reserved name: name, namespace, UID and attempt.
    pub name: String,
    /// The handler that was asked for.
    pub handler: String,
    /// What that stood for.
    #[serde(default)]
    pub kind: HandlerKind,
    /// Unix time in nanoseconds.
    pub created_at: i64,
    /// What becomes of it.
    pub state: SandboxState,
    /// Why it is not ready, in one sentence; may be empty.
    pub reason: String,
    /// Why a pod that runs cannot be used at the moment. Not kept: each daemon finds it out by itself.
    #[serde(skip)]
    pub silence: Option<String>,
    /// What was asked for.
    pub config: Proto<cri::PodSandboxConfig>,
    /// Its network, until that is taken down.
    pub network: Option<NetworkRecord>,
    /// The host user and group that its pod process runs as; 0 in records of versions that had one for all pods.
    #[serde(default)]
    pub user: u32,
}

impl SandboxRecord {
    /// The first record of a pod, before its user is known.
    pub fn first(id: String, name: String, created_at: i64) -> Self {
        Self {
            id,
            name,
            handler: String::new(),
            kind: HandlerKind::MicroVm,
            created_at,
            state: SandboxState::Creating,
            reason: String::new(),
            silence: None,
            config: Proto(cri::PodSandboxConfig::default()),
            network: None,
            user: 0,
        }
    }
}

/// What becomes of a container. Each state is written before the work that leads out of it begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// The name is reserved and the container is being made. Found after a crash: undone.
    Creating,
    /// Made, not started.
    Created,
    /// Being started. Found after a crash: the agent knows how far it came.
    Starting,
    /// Its process runs.
    Running,
    /// Its process has ended, or never ran.
    Exited,
    /// It is being removed. Found after a crash: removed.
    Removing,
}

/// User, group and supplementary groups of a container's process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UserRecord {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its pod sandbox.
    pub sandbox_id: String,
    /// The reserved name: name, attempt and sandbox.
    pub name: String,
    /// What becomes of it.
    pub state: ContainerState,
    /// Unix time in nanoseconds.
    pub created_at: i64,
    /// Unix time in nanoseconds; 0: not started.
    pub started_at: i64,
    /// Unix time in nanoseconds; 0: not ended.
    pub finished_at: i64,
    /// 0 to 255.
    pub exit_code: i32,
    /// Completed, Error, OOMKilled, StartError, ContainerCannotRun; empty while it runs.
    pub reason: String,
    /// More about it, in one sentence; may be empty.
    pub message: String,
    /// What was asked for.
    pub config: Proto<cri::ContainerConfig>,
    /// The limits in force.
    pub resources: Proto<cri::LinuxContainerResources>,
    /// The image's ID.
    pub image_id: String,
    /// The image's digest reference, or its ID.
    pub image_ref: String,
    /// The diff IDs of the layers of the image and of image volumes, which an image removal must spare.
    pub layers: Vec<String>,
    /// The log file's path on the host; empty: no log.
    pub log_path: PathBuf,
    /// The signal that asks it to stop, 1 to 64.
    pub stop_signal: i32,
    /// The OCI `process` it was made with, from which an exec takes what it is not told.
    pub process: serde_json::Value,
    /// Its process in the guest's PID namespace; 0: none yet.
    pub guest_pid: i32,
    /// Whom it runs as; `None` as long as nobody knows.
    #[serde(default)]
    pub user: Option<UserRecord>,
}

impl ContainerRecord {
    /// The first record of a container, before it is known what it is to be.
    pub fn first(id: String, sandbox_id: String, name: String, created_at: i64) -> Self {
        Self {
            id,
            sandbox_id,
            name,
            state: ContainerState::Creating,
            created_at,
            started_at: 0,
            finished_at: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            config: Proto(cri::ContainerConfig::default()),
            resources: Proto(cri::LinuxContainerResources::default()),
            image_id: String::new(),
            image_ref: String::new(),
            layers: Vec::new(),
            log_path: PathBuf::new(),
            stop_signal: libc::SIGTERM,
            process: serde_json::Value::Null,
            guest_pid: 0,
            user: None,
        }
    }
}
