//! What both kinds of pods have on the host: a `caisson-vmm` process of their own, with its directories, control socket
//! and cgroup, and an agent behind it.

pub mod cgroup;
pub mod confinement;
pub mod control;
pub mod dir;
pub mod health;
mod line;
pub mod memory;
pub mod process;
pub mod scratch;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use caisson_proto::agent::agent_client::AgentClient;
use caisson_vmm_protocol::{ExitReason, FdIndex, LogConfig, Request};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tonic::transport::Channel;

use super::agent::{self, Address};
use super::{Log, SandboxError, StreamKind};
use crate::steps::{self, Step};
use control::Control;
use dir::PodDir;
use health::Health;

/// How long a pod process may take to be gone after it was told to.
const AFTER_KILL: Duration = Duration::from_secs(2);

/// What the pods of this node have in common.
#[derive(Clone, Debug)]
pub struct PodConfig {
    /// The `caisson-vmm` binary.
    pub vmm: PathBuf,
    /// Where running pods have their sockets: a tmpfs such as /run/caisson.
    pub state_dir: PathBuf,
    /// Where pods have their disks, such as /var/lib/caisson.
    pub data_dir: PathBuf,
    /// The cgroup of pods that name none.
    pub cgroup_parent: String,
}

/// A pod's process on the host, watched, and the way to its agent.
pub struct PodProcess {
    /// The pod's ID.
    pub id: String,
    /// Its directories.
    pub dir: PodDir,
    /// Its control socket.
    pub control: Control,
    health: watch::Sender<Health>,
    resting: AtomicBool,
    address: Address,
    client: AgentClient<Channel>,
}

impl PodProcess {
    /// Connects to the process of this pod; one that cannot be reached has ended.
    pub async fn watch(id: &str, dir: PodDir, address: Address) -> Self {
        Self {
            id: id.to_owned(),
            control: Control::watch(id, &dir).await,
            dir,
            health: watch::Sender::default(),
            resting: AtomicBool::new(false),
            client: agent::client(address.clone()),
            address,
        }
    }

    /// A failure of this pod's process.
    pub fn error(&self, what: &'static str, cause: impl ToString) -> SandboxError {
        SandboxError::Control {
            id: self.id.clone(),
            what,
            cause: cause.to_string(),
        }
    }

    /// A client of the agent.
    pub fn agent(&self) -> AgentClient<Channel> {
        self.client.clone()
    }

    /// `None` while it runs, then why it ended.
    pub fn ended(&self) -> watch::Receiver<Option<ExitReason>> {
        self.control.ended()
    }

    /// How it does, once [`health::tend`] asks.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Says that the pod does not answer because its machine is parked, which is no silence; or that it goes on.
    pub fn rest(&self, resting: bool) {
        self.resting.store(resting, Ordering::Relaxed);
    }

    /// Its process ID.
    pub fn pid(&self) -> Option<u32> {
        process::find(&self.dir)
    }

    /// See [`super::Sandbox::stream`].
    pub async fn stream(
        &self,
        container_id: &str,
        exec_id: &str,
        kind: StreamKind,
    ) -> Result<UnixStream, SandboxError> {
        let kind = match kind {
            StreamKind::Stdin => "stdin",
            StreamKind::StdinKept => "stdin keep",
            StreamKind::Stdout => "stdout",
            StreamKind::Stderr => "stderr",
            StreamKind::Tty => "tty",
        };
        let exec_id = if exec_id.is_empty() { "-" } else { exec_id };
        let header = format!("STREAM {container_id} {exec_id} {kind}\n");
        agent::stream(&self.address, &header)
            .await
            .map_err(|e| self.error("connect a standard stream", e))
    }

    /// See [`super::Sandbox::dial`].
    pub async fn dial(&self, port: u16) -> Result<UnixStream, SandboxError> {
        agent::stream(&self.address, &format!("DIAL {port}\n"))
            .await
            .map_err(|cause| SandboxError::Dial {
                id: self.id.clone(),
                port,
                cause: cause.to_string(),
            })
    }

    /// See [`super::Sandbox::add_log`].
    pub async fn add_log(&self, log: Log) -> Result<(), SandboxError> {
        let mut fds = Fds::default();
        let config = LogConfig {
            container_id: log.container_id,
            terminal: log.terminal,
            file: fds.add(log.file.as_ref()),
            stdout: fds.add(log.stdout.as_ref()),
            stderr: fds.add(log.stderr.as_ref()),
        };
        let held = [log.file, log.stdout, log.stderr];
        self.control
            .request(Request::AddLog(config), fds.0, held)
            .await
            .map_err(|e| self.error("take the container's log", e))
    }

    /// See [`super::Sandbox::reopen_log`].
    pub async fn reopen_log(&self, container_id: &str, file: OwnedFd) -> Result<(), SandboxError> {
        let mut fds = Fds::default();
        let request = Request::ReopenLog {
            container_id: container_id.to_owned(),
            file: fds.push(&file),
        };
        self.control
            .request(request, fds.0, [Some(file)])
            .await
            .map_err(|e| self.error("reopen the container's log", e))
    }

    /// See [`super::Sandbox::attach`].
    pub async fn attach(
        &self,
        container_id: &str,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> Result<(), SandboxError> {
        let mut fds = Fds::default();
        let request = Request::Attach {
            container_id: container_id.to_owned(),
            stdout: fds.add(stdout.as_ref()),
            stderr: fds.add(stderr.as_ref()),
        };
        self.control
            .request(request, fds.0, [stdout, stderr])
            .await
            .map_err(|e| self.error("attach to the container's output", e))
    }

    /// Closes a container's log. Nothing is left to close in a pod that has ended.
    pub async fn remove_log(&self, container_id: &str) -> Result<(), SandboxError> {
        if self.ended().borrow().is_some() {
            return Ok(());
        }
        let request = Request::RemoveLog {
            container_id: container_id.to_owned(),
        };
        self.control
            .ask(request)
            .await
            .map_err(|e| self.error("close the container's log", e))
    }

    /// Ends the pod: in order within `grace`, then by force. Who does not answer is not asked. Idempotent; always ends.
    pub async fn stop(&self, grace: Duration) -> Result<(), SandboxError> {
        let mut ended = self.ended();
        if ended.borrow().is_some() && self.pid().is_none() {
            return Ok(());
        }
        let in_order = async {
            let asked = self.control.ask_promptly(&Request::Shutdown).await;
            let grace = if asked.is_ok() { grace } else { Duration::ZERO };
            if !control::wait_ended(&mut ended, grace).await {
                tracing::info!(pod = self.id, "the pod did not end in time");
                if self.control.ask_promptly(&Request::Kill).await.is_ok() {
                    control::wait_ended(&mut ended, AFTER_KILL).await;
                }
            }
        };
        tokio::select! {
            biased;
            () = health::silent(self.health()) => {}
            () = in_order => {}
        }
        self.end().await
    }

    /// Ends the process by force.
    pub async fn end(&self) -> Result<(), SandboxError> {
        process::end(&self.dir)
            .await
            .map_err(|e| self.error("end", e))?;
        self.control.killed();
        Ok(())
    }

    /// Removes the pod's cgroup and directories. Idempotent.
    pub async fn remove(&self) -> Result<(), SandboxError> {
        cgroup::remove(&self.dir)
            .await
            .map_err(|e| self.error("remove its cgroup", e))?;
        steps::done(Step::GroupRemoved);
        self.dir
            .remove()
            .await
            .map_err(|e| self.error("remove its files", e))
    }
}

/// The descriptors that go with a message, in order.
#[derive(Default)]
pub struct Fds(pub Vec<std::os::fd::RawFd>);

impl Fds {
    /// Adds one.
    pub fn push(&mut self, fd: &impl AsRawFd) -> FdIndex {
        self.0.push(fd.as_raw_fd());
        // At most MAX_FDS descriptors go with a message, which the channel checks.
        FdIndex((self.0.len() - 1) as u16)
    }

    /// Adds one that may be missing.
    pub fn add(&mut self, fd: Option<&OwnedFd>) -> Option<FdIndex> {
        fd.map(|fd| self.push(fd))
    }
}
