//! The daemon's side of a pod process's control socket.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use caisson_vmm_protocol::{
    Channel, ChannelError, Event, ExitReason, FdIndex, PROTOCOL_VERSION, Reply, Request,
    SavedMachine, VmStatus,
};
use tokio::sync::{oneshot, watch};

use super::dir::PodDir;
use super::line::Line;
use super::{cgroup, process};

/// How long a pod process that is at work may take to do what it is asked.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
/// How long it may take to write its machine, to a disk perhaps that others use.
const SAVE_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// How long it may take to answer what costs it nothing.
const PROMPT: Duration = Duration::from_secs(3);
/// The pause before a pod process that did not let itself be watched is asked again.
const WATCH_AGAIN: Duration = Duration::from_millis(100);
/// The question how it does, which says who asks.
const STATUS: Request = Request::Status {
    version: PROTOCOL_VERSION,
};
/// The most containers whose drained logs are remembered, and whose logs cannot be written.
const MAX_DRAINED: usize = 4096;
/// The most characters of why.
const MAX_MESSAGE: usize = 512;

/// Why the pod process did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It refused; its own sentence.
    #[error("{0}")]
    Refused(String),
    /// It cannot be reached.
    #[error("its control socket does not answer: {0}")]
    Unreachable(#[from] ChannelError),
    /// It did not answer in time; the seconds.
    #[error("it did not answer within {0} s")]
    Late(u64),
    /// It answered something else than was asked.
    #[error("it gave an answer that does not fit the question")]
    Confused,
}

impl From<io::Error> for ControlError {
    fn from(error: io::Error) -> Self {
        Self::Unreachable(error.into())
    }
}

/// A pod process, watched.
#[derive(Debug)]
pub struct Control {
    socket: PathBuf,
    ready: watch::Receiver<bool>,
    drained: watch::Receiver<BTreeSet<String>>,
    failing: watch::Receiver<BTreeMap<String, String>>,
    ended: watch::Sender<Option<ExitReason>>,
}

impl Control {
    /// Connects to the pod process and watches it. One that is gone has ended; one that is there and does not answer is
    /// asked again for as long as it is there.
    pub async fn watch(id: &str, dir: &PodDir) -> Self {
        let (ready_in, ready) = watch::channel(false);
        let (drained_in, drained) = watch::channel(BTreeSet::new());
        let (failing_in, failing) = watch::channel(BTreeMap::new());
        let ended = watch::Sender::new(None);
        let facts = Facts {
            id: id.to_owned(),
            ready: ready_in,
            drained: drained_in,
            failing: failing_in,
        };
        let (tell, tried) = oneshot::channel::<()>();
        let (watched, note) = (dir.clone(), ended.clone());
        tokio::spawn(async move {
            let mut tell = Some(tell);
            let reason = facts.follow(&watched, &mut tell).await;
            note_end(&note, reason);
            drop(tell);
        });
        // A pod process that does not answer must not hold up who finds it: it is not the only one.
        let _ = tokio::time::timeout(PROMPT, tried).await;
        Self {
            socket: dir.control(),
            ready,
            drained,
            failing,
            ended,
        }
    }

    /// `None` while the machine runs, then why it ended.
    pub fn ended(&self) -> watch::Receiver<Option<ExitReason>> {
        self.ended.subscribe()
    }

    /// Notes that the pod process was killed, without waiting for what its socket says.
    pub fn killed(&self) {
        note_end(&self.ended, ExitReason::Killed);
    }

    /// Waits until the agent has said that it listens. False when the machine ended or the time is over.
    pub async fn agent_ready(&self, limit: Duration) -> bool {
        let (mut ready, mut ended) = (self.ready.clone(), self.ended());
        tokio::select! {
            r = ready.wait_for(|ready| *ready) => r.is_ok(),
            _ = ended.wait_for(Option::is_some) => false,
            () = tokio::time::sleep(limit) => false,
        }
    }

    /// Waits until all output of a container is in its log. False when the time is over.
    pub async fn drained(&self, container_id: &str, limit: Duration) -> bool {
        let mut drained = self.drained.clone();
        let wait = drained.wait_for(|set| set.contains(container_id));
        matches!(tokio::time::timeout(limit, wait).await, Ok(Ok(_)))
    }

    /// Why a container's log cannot be written at this moment, if so.
    pub fn log_failure(&self, container_id: &str) -> Option<String> {
        self.failing.borrow().get(container_id).cloned()
    }

    /// Sends a request that carries no descriptor.
    pub async fn ask(&self, request: Request) -> Result<(), ControlError> {
        self.request(request, Vec::new(), []).await
    }

    /// Sends a request that a pod process which is well answers at once.
    pub async fn ask_promptly(&self, request: &Request) -> Result<Reply, ControlError> {
        let answer = async { Line::connect(&self.socket).await?.ask(request).await };
        tokio::time::timeout(PROMPT, answer)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// Sends a request; `held` are the owners of `fds`, kept until the answer is there.
    pub async fn request<const N: usize>(
        &self,
        request: Request,
        fds: Vec<RawFd>,
        held: [Option<OwnedFd>; N],
    ) -> Result<(), ControlError> {
        match self.exchange(request, fds, held).await? {
            Reply::Done => Ok(()),
            Reply::Error { message } => Err(ControlError::Refused(message)),
            _ => Err(ControlError::Confused),
        }
    }

    /// Puts a layer on the machine's disk of layers: the first byte of its place, and their number.
    pub async fn add_layer(&self, name: &str, file: OwnedFd) -> Result<(u64, u64), ControlError> {
        let request = Request::AddLayer {
            name: name.to_owned(),
            file: FdIndex(0),
        };
        let fds = vec![file.as_raw_fd()];
        match self.exchange(request, fds, [Some(file)]).await? {
            Reply::LayerPlace { offset, bytes } => Ok((offset, bytes)),
            Reply::Error { message } => Err(ControlError::Refused(message)),
            _ => Err(ControlError::Confused),
        }
    }

    /// Has the machine written to `to`, which somebody has to read meanwhile; it is parked afterwards ([`Request::Save`]).
    pub async fn save(&self, to: OwnedFd) -> Result<SavedMachine, ControlError> {
        let request = Request::Save { to: FdIndex(0) };
        let fds = vec![to.as_raw_fd()];
        match self
            .exchange_within(SAVE_TIMEOUT, request, fds, [Some(to)])
            .await?
        {
            Reply::Saved(machine) => Ok(machine),
            Reply::Error { message } => Err(ControlError::Refused(message)),
            _ => Err(ControlError::Confused),
        }
    }

    /// How the machine does.
    pub async fn status(&self) -> Result<VmStatus, ControlError> {
        match self.ask_promptly(&STATUS).await? {
            Reply::Status(status) => Ok(status),
            _ => Err(ControlError::Confused),
        }
    }

    async fn exchange<const N: usize>(
        &self,
        request: Request,
        fds: Vec<RawFd>,
        held: [Option<OwnedFd>; N],
    ) -> Result<Reply, ControlError> {
        self.exchange_within(REPLY_TIMEOUT, request, fds, held)
            .await
    }

    async fn exchange_within<const N: usize>(
        &self,
        limit: Duration,
        request: Request,
        fds: Vec<RawFd>,
        held: [Option<OwnedFd>; N],
    ) -> Result<Reply, ControlError> {
        let socket = self.socket.clone();
        let work = move || exchange(UnixStream::connect(socket)?, &request, &fds, held, limit);
        tokio::task::spawn_blocking(work)
            .await
            .map_err(io::Error::from)?
    }
}

/// Asks a pod process again and again whether it is there, over one connection.
#[derive(Debug, Default)]
pub struct Ping(Option<Line>);

impl Ping {
    /// Waits for an answer, for as long as it takes.
    ///
    /// # Errors
    /// [`ControlError::Refused`] by one that speaks another protocol; the connection's, after which the next question
    /// gets another.
    pub async fn ask(&mut self, control: &Control) -> Result<(), ControlError> {
        let mut line = match self.0.take() {
            Some(line) => line,
            None => Line::connect(&control.socket).await?,
        };
        line.ask(&STATUS).await?;
        self.0 = Some(line);
        Ok(())
    }
}

/// Sends one request and takes its answer, for which there is `limit`. `held` are owners of `fds`.
///
/// # Errors
/// [`ControlError::Late`]; the connection's.
pub fn exchange<T>(
    stream: UnixStream,
    request: &Request,
    fds: &[RawFd],
    held: T,
    limit: Duration,
) -> Result<Reply, ControlError> {
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut channel = Channel::new(stream);
    let sent = channel.send(request, fds);
    // They are on their way, and who reads from another end waits for the last of them.
    drop(held);
    match sent.and_then(|()| channel.recv()) {
        Ok(frame) => Ok(frame.message),
        // What Linux says when a socket's time-out is over.
        Err(ChannelError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(ControlError::Late(limit.as_secs()))
        }
        Err(error) => Err(error.into()),
    }
}

/// Notes an end. What is heard after it is its consequence.
fn note_end(ended: &watch::Sender<Option<ExitReason>>, reason: ExitReason) {
    ended.send_if_modified(|noted| {
        let first = noted.is_none();
        noted.get_or_insert(reason);
        first
    });
}

/// Waits at most `limit` for the end.
pub async fn wait_ended(ended: &mut watch::Receiver<Option<ExitReason>>, limit: Duration) -> bool {
    matches!(
        tokio::time::timeout(limit, ended.wait_for(Option::is_some)).await,
        Ok(Ok(_))
    )
}

/// What is learnt of a pod process.
struct Facts {
    id: String,
    ready: watch::Sender<bool>,
    drained: watch::Sender<BTreeSet<String>>,
    failing: watch::Sender<BTreeMap<String, String>>,
}

impl Facts {
    /// Watches until the pod ends. `tell` is dropped once the pod process is watched.
    async fn follow(&self, dir: &PodDir, tell: &mut Option<oneshot::Sender<()>>) -> ExitReason {
        loop {
            let told = async {
                let mut line = Line::connect(&dir.control()).await?;
                match line.ask(&Request::Watch).await? {
                    Reply::Done => {}
                    _ => return Err(ControlError::Confused),
                }
                tell.take();
                // What still holds is told anew.
                self.failing.send_replace(BTreeMap::new());
                self.take_in(&mut line).await
            };
            match told.await {
                Ok(reason) => return reason,
                Err(error) => {
                    tracing::debug!(pod = self.id, %error, "the pod process is not watched");
                }
            }
            // Asked after the connection broke, so that what it wrote last is there.
            if process::find(dir).is_none() {
                return read_exit(dir);
            }
            tokio::time::sleep(WATCH_AGAIN).await;
        }
    }

    /// Takes in events until the one that says how the pod ended.
    async fn take_in(&self, line: &mut Line) -> Result<ExitReason, ControlError> {
        loop {
            match line.next().await? {
                Event::AgentReady => {
                    self.ready.send_replace(true);
                }
                Event::LogDrained { container_id } => {
                    self.drained.send_modify(|set| {
                        if set.len() < MAX_DRAINED {
                            set.insert(container_id);
                        }
                    });
                }
                Event::LogFailed {
                    container_id,
                    message,
                } => {
                    let message: String = message
                        .chars()
                        .filter(|c| !c.is_control())
                        .take(MAX_MESSAGE)
                        .collect();
                    tracing::error!(pod = self.id, container = container_id, "{message}");
                    self.failing.send_modify(|failing| {
                        if failing.len() < MAX_DRAINED {
                            failing.insert(container_id, message);
                        }
                    });
                }
                Event::LogRecovered { container_id } => {
                    tracing::info!(pod = self.id, container = container_id, "its log goes on");
                    self.failing.send_modify(|failing| {
                        failing.remove(&container_id);
                    });
                }
                Event::Exited(reason) => return Ok(reason),
            }
        }
    }
}

/// What is learnt of a pod process until it ends: the logs that are complete, and why it ended if it said so. For the
/// fuzz target `agent_replies`.
#[cfg(any(test, fuzzing))]
pub async fn follow(stream: tokio::net::UnixStream) -> (BTreeSet<String>, Option<ExitReason>) {
    let facts = Facts {
        id: "p".into(),
        ready: watch::channel(false).0,
        drained: watch::channel(BTreeSet::new()).0,
        failing: watch::channel(BTreeMap::new()).0,
    };
    let reason = facts.take_in(&mut Line::from(stream)).await.ok();
    let drained = facts.drained.borrow().clone();
    (drained, reason)
}

/// Why a pod process that is gone ended: as it wrote it down, or else by what it left.
fn read_exit(dir: &PodDir) -> ExitReason {
    let written = std::fs::read(dir.exit()).unwrap_or_default();
    serde_json::from_slice(&written).unwrap_or_else(|_| {
        let said = dir.vmm_tail();
        let said = said.trim().lines().next_back().unwrap_or_default();
        ExitReason::InternalError(if cgroup::ran_out_of_memory(dir) {
            "the kernel killed the pod process for want of memory in its control group".into()
        } else if said.is_empty() {
            "the pod process was killed, and could not say why".into()
        } else {
            format!("the pod process died; its last words: {said}")
        })
    })
}

/// Why a pod ended, for people.
pub fn sentence(reason: &ExitReason) -> String {
    match reason {
        ExitReason::PoweredOff => "the guest powered off".into(),
        ExitReason::Reset => "the guest reset itself".into(),
        ExitReason::Panicked => "the guest kernel panicked".into(),
        ExitReason::Killed => "its pod process was killed".into(),
        ExitReason::GuestError(what) => format!("the guest broke a device's rules: {what}"),
        ExitReason::InternalError(what) => format!("its pod process failed: {what}"),
    }
}
