//! A pod's sandbox, of whatever kind: the place in which an agent makes its containers.
//!
//! The CRI code knows only the [`Sandbox`] trait. Its two kinds, [`microvm`] and [`host`], have a pod process ([`pod`]) and
//! speak the same protocol with the same agent ([`agent`]), over vsock here and over a unix socket there.

mod agent;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod host;
pub mod ids;
pub mod microvm;
pub mod pod;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use caisson_proto::agent as proto;
use caisson_proto::agent::agent_client::AgentClient;
use caisson_vmm_protocol::ExitReason;
use tokio::sync::watch;
use tonic::transport::Channel;

use self::ids::UserIds;
use self::pod::PodProcess;
pub use self::pod::control::sentence;
pub use self::pod::health::{self, Health};
use crate::network::{NetworkError, Port};
use crate::timings::Timings;

/// The place of a pod's writable layers, and the most bytes that all of them may hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scratch {
    /// A sparse file on the host's disk.
    Disk {
        /// The most bytes.
        bytes: u64,
        /// Whether other pods have it of this size, so that it is worth a template.
        usual: bool,
    },
    /// The guest's memory.
    Memory {
        /// The most bytes.
        bytes: u64,
    },
}

impl Default for Scratch {
    fn default() -> Self {
        Self::Memory { bytes: 0 }
    }
}

/// What a sandbox is made from.
#[derive(Clone, Debug, Default)]
pub struct SandboxPlan {
    /// The pod sandbox's ID: 64 hexadecimal digits.
    pub id: String,
    /// The pod's hostname.
    pub hostname: String,
    /// Name servers, search domains and resolver options of the pod.
    pub dns: Dns,
    /// Virtual CPUs, 1 to 32; of a microVM.
    pub vcpus: u8,
    /// Guest memory in MiB, the guest's own overhead included; of a microVM.
    pub memory_mib: u32,
    /// The cgroup in which the kubelet accounts for the pod; empty: the daemon's default.
    pub cgroup_parent: String,
    /// Where the pod's network will be; `None` leaves it with a loopback device.
    pub port: Option<Port>,
    /// Whether containers share one PID namespace.
    pub shared_pid_namespace: bool,
    /// Sysctls of the pod, by dotted name.
    pub sysctls: Vec<(String, String)>,
    /// Where the pod's writable layers go.
    pub scratch: Scratch,
    /// What a pod on the host shares with it.
    pub host: HostNamespaces,
    /// The IDs of the pod's user namespace; `None`: it has none.
    pub ids: Option<UserIds>,
    /// The host user and group that the pod process runs as, this pod's alone; not 0.
    pub user: u32,
}

/// Namespaces of the host that a pod on the host shares. Its PID namespaces are its containers' affair.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HostNamespaces {
    /// The network, and with it the hostname.
    pub network: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
}

/// A pod's resolver configuration (CRI `DNSConfig`).
#[derive(Clone, Debug, Default)]
pub struct Dns {
    /// IP addresses of name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// resolv.conf options.
    pub options: Vec<String>,
}

/// A raw standard stream of a process in the sandbox.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StreamKind {
    /// Standard input; half-close ends it.
    Stdin,
    /// Standard input; half-close leaves it open for the next client.
    StdinKept,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The terminal, both ways.
    Tty,
}

/// A container's log as the pod process writes it.
#[derive(Debug)]
pub struct Log {
    /// The container, already created in the agent.
    pub container_id: String,
    /// Whether the container has a terminal instead of two streams.
    pub terminal: bool,
    /// The CRI log file, open for appending; `None`: no log.
    pub file: Option<OwnedFd>,
    /// Gets a copy of standard output from the first byte on.
    pub stdout: Option<OwnedFd>,
    /// Gets a copy of standard error from the first byte on.
    pub stderr: Option<OwnedFd>,
}

/// How a file or directory of the host is shown.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct VolumeOptions {
    /// Writes are refused, except in what is mounted below.
    pub read_only: bool,
    /// Writes are refused in what is mounted below.
    pub recursive_read_only: bool,
    /// What the host mounts below it later appears.
    pub follows_host: bool,
    /// Its owners on the host are the pod's: 0 there is 0 in the pod. Of the mount at the top alone.
    pub ids: Option<UserIds>,
}

/// A volume as the agent finds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SharedVolume {
    /// Its path there.
    pub path: String,
    /// It is read-only in part. For the agent it is one mount, which has to be writable; the sandbox refuses the writes
    /// that must not be.
    pub partly_writable: bool,
    /// What is left to the agent of [`VolumeOptions::ids`].
    pub ids: Option<UserIds>,
}

/// Why a sandbox could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The sandbox could not be made; the step and the cause.
    #[error("cannot {step} for pod {id}: {cause}")]
    Start {
        /// The pod's ID.
        id: String,
        /// What was tried, such as "start caisson-vmm".
        step: &'static str,
        /// Why it did not work.
        cause: String,
    },
    /// The guest reset itself before its agent had answered.
    #[error("the guest of pod {id} does not boot: {cause}")]
    Reset {
        /// The pod's ID.
        id: String,
        /// What is known of it.
        cause: String,
    },
    /// The pod's network could not be made meanwhile.
    #[error(transparent)]
    Network(NetworkError),
    /// The sandbox has ended.
    #[error("the sandbox of pod {id} has ended: {reason}")]
    Ended {
        /// The pod's ID.
        id: String,
        /// Why.
        reason: String,
    },
    /// The pod process refused or did not answer.
    #[error("the pod process of {id} did not {what}: {cause}")]
    Control {
        /// The pod's ID.
        id: String,
        /// What was asked.
        what: &'static str,
        /// Why it did not work.
        cause: String,
    },
    /// Nobody in the pod answers on a port.
    #[error("port {port} of pod {id} cannot be reached: {cause}")]
    Dial {
        /// The pod's ID.
        id: String,
        /// The port.
        port: u16,
        /// Why.
        cause: String,
    },
    /// A file or directory of the host cannot be given to the pod.
    #[error("cannot share {path} with pod {id}: {cause}")]
    Share {
        /// The pod's ID.
        id: String,
        /// The path on the host.
        path: PathBuf,
        /// Why.
        cause: String,
    },
}

impl SandboxError {
    /// What a failure at this step of a pod's start becomes.
    fn at(id: &str, step: &'static str) -> impl Fn(io::Error) -> Self {
        move |cause| Self::Start {
            id: id.to_owned(),
            step,
            cause: cause.to_string(),
        }
    }
}

/// Takes back a start that failed. `found` finds the pod by what is on disk, as after a crash of the daemon at the same
/// point.
async fn take_back<S: Sandbox>(id: &str, found: impl Future<Output = Result<S, SandboxError>>) {
    let undone = async { found.await?.remove().await };
    if let Err(error) = undone.await {
        tracing::warn!(pod = id, %error, "the half-made pod could not be removed");
    }
}

/// A pod's sandbox. Every call is bounded in time; none holds a lock over I/O to the guest.
#[tonic::async_trait]
pub trait Sandbox: Send + Sync {
    /// The pod's process on the host, by which everything is done that does not depend on the kind.
    fn pod(&self) -> &PodProcess;

    /// A client of the agent inside. Cheap to call; the connection is shared and made again when it breaks.
    fn agent(&self) -> AgentClient<Channel> {
        self.pod().agent()
    }

    /// `None` while the sandbox runs, then why it ended.
    fn ended(&self) -> watch::Receiver<Option<ExitReason>> {
        self.pod().ended()
    }

    /// How the pod does, as far as [`Sandbox::tend`] has heard.
    fn health(&self) -> watch::Receiver<Health> {
        self.pod().health()
    }

    /// Asks the pod again and again how it does, until it has ended.
    async fn tend(&self) {
        pod::health::tend(self.pod()).await;
    }

    /// The last lines of the guest's console, or of what the agent on the host said, in one.
    fn last_words(&self) -> String {
        self.pod().dir.last_words()
    }

    /// The process ID of the pod process on the host.
    fn host_pid(&self) -> Option<u32> {
        self.pod().pid()
    }

    /// Opens a raw standard stream of a container's process (`exec_id` empty) or of an exec.
    async fn stream(
        &self,
        container_id: &str,
        exec_id: &str,
        kind: StreamKind,
    ) -> Result<tokio::net::UnixStream, SandboxError> {
        self.pod().stream(container_id, exec_id, kind).await
    }

    /// Connects to a port on the pod's loopback device; half-closes pass both ways.
    async fn dial(&self, port: u16) -> Result<tokio::net::UnixStream, SandboxError> {
        self.pod().dial(port).await
    }

    /// Starts to write a container's log. Before the container is started, so that no byte is missed.
    async fn add_log(&self, log: Log) -> Result<(), SandboxError> {
        self.pod().add_log(log).await
    }

    /// Goes on in another log file (CRI `ReopenContainerLog`).
    async fn reopen_log(&self, container_id: &str, file: OwnedFd) -> Result<(), SandboxError> {
        self.pod().reopen_log(container_id, file).await
    }

    /// Copies a container's output from now on.
    async fn attach(
        &self,
        container_id: &str,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> Result<(), SandboxError> {
        self.pod().attach(container_id, stdout, stderr).await
    }

    /// Waits until the container's output is in its log to the last byte, at most `limit`. False if it is not.
    async fn log_drained(&self, container_id: &str, limit: std::time::Duration) -> bool {
        self.pod().control.drained(container_id, limit).await
    }

    /// Shows an image layer (an EROFS file of the host) to the agent, read-only; where the agent has it.
    /// The same layer given twice is shared.
    async fn share_layer(&self, layer: &Path) -> Result<proto::Layer, SandboxError>;

    /// Shows a file or directory of the host to the agent. The options also hold against a guest that ignores them.
    async fn share_volume(
        &self,
        container_id: &str,
        host_path: &Path,
        options: VolumeOptions,
    ) -> Result<SharedVolume, SandboxError>;

    /// Takes away what was shared with a container that the agent has removed, and closes its log. Idempotent.
    async fn forget(&self, container_id: &str) -> Result<(), SandboxError>;

    /// Ends the sandbox: orderly within `grace`, then by force. Idempotent; always ends.
    async fn stop(&self, grace: std::time::Duration) -> Result<(), SandboxError>;

    /// Removes every trace of a stopped sandbox from the host, its network excepted. Idempotent.
    async fn remove(&self) -> Result<(), SandboxError>;

    /// The steps of the start and how long they took.
    fn timings(&self) -> Timings;
}
