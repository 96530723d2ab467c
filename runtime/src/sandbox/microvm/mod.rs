//! The `microvm` kind of sandbox: a `caisson-vmm` process with a guest, and an agent in it.
//!
//! What a pod has on the host, all of it found again by a daemon that comes later ([`MicroVm::recover`]):
//!
//! * `<state>/pods/<short id>/`: control and vsock sockets, console log, exit file, process ID, share ([`PodDir`]);
//! * `<data>/pods/<short id>/scratch.img`: the disk of its writable layers ([`scratch`]);
//! * a cgroup with the pod process ([`cgroup`]).

mod agent;
mod cgroup;
mod control;
mod dir;
mod process;
mod scratch;
mod share;
mod start;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_proto::agent::agent_client::AgentClient;
use caisson_vmm_protocol::{ExitReason, FdIndex, LogConfig, Request, STREAM_PORT};
use tokio::sync::watch;
use tonic::transport::Channel;

use super::{Log, Sandbox, SandboxError, StreamKind};
use crate::timings::Timings;
use control::Control;
use dir::PodDir;
use share::Share;

/// How microVM pods are made on this node.
#[derive(Clone, Debug)]
pub struct MicroVmConfig {
    /// The `caisson-vmm` binary.
    pub vmm: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs, with the agent.
    pub initramfs: PathBuf,
    /// Added to the kernel's command line.
    pub cmdline_extra: String,
    /// The host user and group that pod processes run as; not 0.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Where running pods have their sockets: a tmpfs such as /run/caisson.
    pub state_dir: PathBuf,
    /// Where pods have their disks, such as /var/lib/caisson.
    pub data_dir: PathBuf,
    /// The cgroup of pods that name none.
    pub cgroup_parent: String,
    /// How long a guest may take from power-on until its agent answers.
    pub start_timeout: Duration,
}

/// A pod in its microVM.
pub struct MicroVm {
    id: String,
    dir: PodDir,
    control: Control,
    agent: AgentClient<Channel>,
    share: Share,
    timings: Timings,
}

impl MicroVm {
    /// Finds a pod again after the daemon was restarted. A pod that has ended meanwhile is found too; its
    /// [`Sandbox::ended`] says why it ended.
    ///
    /// # Errors
    /// [`SandboxError::Start`] where the configured directories cannot hold a pod.
    pub async fn recover(id: &str, config: &MicroVmConfig) -> Result<Self, SandboxError> {
        let dir = PodDir::new(id, config)?;
        let control = Control::watch(id, &dir).await;
        Ok(Self {
            id: id.to_owned(),
            agent: agent::client(dir.vsock()),
            share: Share::new(id, &dir),
            control,
            dir,
            timings: Timings::begin(),
        })
    }

    fn error(&self, what: &'static str, cause: impl ToString) -> SandboxError {
        SandboxError::Control {
            id: self.id.clone(),
            what,
            cause: cause.to_string(),
        }
    }

    /// The last lines of the guest's console, for a person who asks why a pod ended.
    pub fn console_tail(&self) -> String {
        self.dir.console_tail()
    }
}

#[tonic::async_trait]
impl Sandbox for MicroVm {
    fn agent(&self) -> AgentClient<Channel> {
        self.agent.clone()
    }

    fn ended(&self) -> watch::Receiver<Option<ExitReason>> {
        self.control.ended()
    }

    fn host_pid(&self) -> Option<u32> {
        process::find(&self.dir)
    }

    async fn stream(
        &self,
        container_id: &str,
        exec_id: &str,
        kind: StreamKind,
    ) -> Result<tokio::net::UnixStream, SandboxError> {
        let kind = match kind {
            StreamKind::Stdin => "stdin",
            StreamKind::StdinKept => "stdin keep",
            StreamKind::Stdout => "stdout",
            StreamKind::Stderr => "stderr",
            StreamKind::Tty => "tty",
        };
        let exec_id = if exec_id.is_empty() { "-" } else { exec_id };
        let header = format!("STREAM {container_id} {exec_id} {kind}\n");
        agent::stream(&self.dir.vsock(), STREAM_PORT, &header)
            .await
            .map_err(|e| self.error("connect a standard stream", e))
    }

    async fn dial(&self, port: u16) -> Result<tokio::net::UnixStream, SandboxError> {
        agent::stream(&self.dir.vsock(), STREAM_PORT, &format!("DIAL {port}\n"))
            .await
            .map_err(|cause| SandboxError::Dial {
                id: self.id.clone(),
                port,
                cause: cause.to_string(),
            })
    }

    async fn add_log(&self, log: Log) -> Result<(), SandboxError> {
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

    async fn reopen_log(&self, container_id: &str, file: OwnedFd) -> Result<(), SandboxError> {
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

    async fn attach(
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

    async fn log_drained(&self, container_id: &str, limit: Duration) -> bool {
        self.control.drained(container_id, limit).await
    }

    async fn share_layer(&self, _container_id: &str, layer: &Path) -> Result<String, SandboxError> {
        self.share.layer(layer).await
    }

    async fn share_volume(
        &self,
        container_id: &str,
        host_path: &Path,
        read_only: bool,
    ) -> Result<String, SandboxError> {
        self.share.volume(container_id, host_path, read_only).await
    }

    async fn forget(&self, container_id: &str) -> Result<(), SandboxError> {
        if self.control.ended().borrow().is_none() {
            let request = Request::RemoveLog {
                container_id: container_id.to_owned(),
            };
            self.control
                .ask(request)
                .await
                .map_err(|e| self.error("close the container's log", e))?;
        }
        self.share.unshare(container_id).await
    }

    async fn stop(&self, grace: Duration) -> Result<(), SandboxError> {
        let mut ended = self.control.ended();
        if ended.borrow().is_some() && process::find(&self.dir).is_none() {
            return Ok(());
        }
        // A pod process that does not listen is ended by force below.
        let asked = self.control.ask(Request::Shutdown).await;
        let grace = if asked.is_ok() { grace } else { Duration::ZERO };
        if !control::wait_ended(&mut ended, grace).await {
            tracing::info!(pod = self.id, "the guest did not power off in time");
            if self.control.ask(Request::Kill).await.is_ok() {
                control::wait_ended(&mut ended, Duration::from_secs(2)).await;
            }
        }
        process::end(&self.dir)
            .await
            .map_err(|e| self.error("end", e))
    }

    async fn remove(&self) -> Result<(), SandboxError> {
        process::end(&self.dir)
            .await
            .map_err(|e| self.error("end", e))?;
        self.share.remove_all().await?;
        cgroup::remove(&self.dir)
            .await
            .map_err(|e| self.error("remove its cgroup", e))?;
        self.dir
            .remove()
            .await
            .map_err(|e| self.error("remove its files", e))
    }

    fn timings(&self) -> Timings {
        self.timings.clone()
    }
}

/// The descriptors that go with a message, in order.
#[derive(Default)]
struct Fds(Vec<std::os::fd::RawFd>);

impl Fds {
    fn push(&mut self, fd: &impl AsRawFd) -> FdIndex {
        self.0.push(fd.as_raw_fd());
        // At most MAX_FDS descriptors go with a message, which the channel checks.
        FdIndex((self.0.len() - 1) as u16)
    }

    fn add(&mut self, fd: Option<&OwnedFd>) -> Option<FdIndex> {
        fd.map(|fd| self.push(fd))
    }
}
