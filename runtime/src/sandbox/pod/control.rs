//! The daemon's side of a pod process's control socket.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_vmm_protocol::{
    Channel, ChannelError, Event, ExitReason, FdIndex, MAX_FRAME, PROTOCOL_VERSION, Reply, Request,
    VmStatus,
};
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use super::dir::PodDir;

/// How long the pod process may take to answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);
/// The most containers whose drained logs are remembered.
const MAX_DRAINED: usize = 4096;

/// Why the pod process did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It refused; its own sentence.
    #[error("{0}")]
    Refused(String),
    /// It cannot be reached.
    #[error("its control socket does not answer: {0}")]
    Unreachable(#[from] ChannelError),
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
    ended: watch::Receiver<Option<ExitReason>>,
}

impl Control {
    /// Connects to the pod process and watches it. One that cannot be reached has ended.
    pub async fn watch(id: &str, dir: &PodDir) -> Self {
        let (ready_in, ready) = watch::channel(false);
        let (drained_in, drained) = watch::channel(BTreeSet::new());
        let (ended_in, ended) = watch::channel(None);
        let facts = Facts {
            id: id.to_owned(),
            ready: ready_in,
            drained: drained_in,
        };
        let socket = dir.control();
        let watching = async {
            tokio::time::timeout(REPLY_TIMEOUT, begin_watch(&socket))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        };
        match watching.await {
            Err(error) => {
                tracing::debug!(pod = id, %error, "the pod process cannot be watched");
                ended_in.send_replace(Some(read_exit(dir)));
            }
            Ok(stream) => {
                let dir = dir.clone();
                tokio::spawn(async move {
                    let reason = facts.follow(stream).await;
                    let reason = reason.unwrap_or_else(|| read_exit(&dir));
                    ended_in.send_replace(Some(reason));
                });
            }
        }
        Self {
            socket,
            ready,
            drained,
            ended,
        }
    }

    /// `None` while the machine runs, then why it ended.
    pub fn ended(&self) -> watch::Receiver<Option<ExitReason>> {
        self.ended.clone()
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

    /// Sends a request that carries no descriptor.
    pub async fn ask(&self, request: Request) -> Result<(), ControlError> {
        self.request(request, Vec::new(), []).await
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
            Reply::Status(_) | Reply::LayerPlace { .. } => Err(ControlError::Confused),
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
            Reply::Done | Reply::Status(_) => Err(ControlError::Confused),
        }
    }

    /// How the machine does.
    pub async fn status(&self) -> Result<VmStatus, ControlError> {
        let request = Request::Status {
            version: PROTOCOL_VERSION,
        };
        match self.exchange(request, Vec::new(), []).await? {
            Reply::Status(status) => Ok(status),
            Reply::Error { message } => Err(ControlError::Refused(message)),
            Reply::Done | Reply::LayerPlace { .. } => Err(ControlError::Confused),
        }
    }

    async fn exchange<const N: usize>(
        &self,
        request: Request,
        fds: Vec<RawFd>,
        held: [Option<OwnedFd>; N],
    ) -> Result<Reply, ControlError> {
        let socket = self.socket.clone();
        let work = move || {
            let stream = UnixStream::connect(socket)?;
            let reply = exchange(stream, &request, &fds);
            drop(held);
            reply
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(io::Error::from)?
    }
}

/// Sends one request and takes its answer.
pub fn exchange(
    stream: UnixStream,
    request: &Request,
    fds: &[RawFd],
) -> Result<Reply, ControlError> {
    stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
    stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
    let mut channel = Channel::new(stream);
    channel.send(request, fds)?;
    Ok(channel.recv::<Reply>()?.message)
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
}

impl Facts {
    /// Takes in events until the machine ends; `None` if the pod process was gone before it could say why.
    async fn follow(&self, mut stream: tokio::net::UnixStream) -> Option<ExitReason> {
        loop {
            match read_event(&mut stream).await {
                Ok(Event::AgentReady) => {
                    self.ready.send_replace(true);
                }
                Ok(Event::LogDrained { container_id }) => {
                    self.drained.send_modify(|set| {
                        if set.len() < MAX_DRAINED {
                            set.insert(container_id);
                        }
                    });
                }
                Ok(Event::LogFailed {
                    container_id,
                    message,
                }) => {
                    tracing::error!(pod = self.id, container = container_id, "{message}");
                }
                Ok(Event::Exited(reason)) => return Some(reason),
                Err(error) => {
                    tracing::debug!(pod = self.id, %error, "the pod process is no longer watched");
                    return None;
                }
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
    };
    let reason = facts.follow(stream).await;
    let drained = facts.drained.borrow().clone();
    (drained, reason)
}

async fn begin_watch(socket: &Path) -> io::Result<tokio::net::UnixStream> {
    let socket = socket.to_owned();
    let stream = tokio::task::spawn_blocking(move || {
        let stream = UnixStream::connect(socket)?;
        let reply = exchange(stream.try_clone()?, &Request::Watch, &[]);
        match reply {
            Ok(Reply::Done) => {
                stream.set_read_timeout(None)?;
                stream.set_nonblocking(true)?;
                Ok(stream)
            }
            Ok(other) => Err(io::Error::other(format!("{other:?}"))),
            Err(error) => Err(io::Error::other(error.to_string())),
        }
    })
    .await??;
    tokio::net::UnixStream::from_std(stream)
}

async fn read_event(stream: &mut tokio::net::UnixStream) -> io::Result<Event> {
    let length = stream.read_u32_le().await? as usize;
    if length > MAX_FRAME {
        return Err(io::Error::other(ChannelError::TooLong(length).to_string()));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(serde_json::from_slice(&body)?)
}

/// Why a pod process that is gone ended, as it wrote it down.
fn read_exit(dir: &PodDir) -> ExitReason {
    let written = std::fs::read(dir.exit()).unwrap_or_default();
    serde_json::from_slice(&written).unwrap_or_else(|_| {
        let said = dir.vmm_tail();
        let said = said.trim().lines().next_back().unwrap_or_default();
        ExitReason::InternalError(if said.is_empty() {
            "the pod process died without saying why".into()
        } else {
            format!("the pod process died; its last words: {said}")
        })
    })
}

/// The sentence of an end.
pub fn sentence(reason: &ExitReason) -> String {
    match reason {
        ExitReason::PoweredOff => "the guest powered off".into(),
        ExitReason::Reset => "the guest asked for a reset".into(),
        ExitReason::Panicked => "the guest kernel panicked".into(),
        ExitReason::Killed => "it was killed".into(),
        ExitReason::GuestError(what) => what.clone(),
        ExitReason::InternalError(what) => what.clone(),
    }
}
