//! The agent's side of a process that prepares itself: what the two say to each other, and how long that may take.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Stdio;
use super::channel::{Channel, Message};
use super::error::EngineError;
use super::launch::{Launched, launch};
use super::plan::{Plan, State};
use super::spec::Hook;

/// How long a process may take to prepare itself; hooks have their own time.
pub(crate) const PREPARE_TIME: Duration = Duration::from_secs(120);
/// How long all hooks of one point may take that have no time of their own.
const HOOKS_TIME: Duration = Duration::from_secs(600);

/// A process that exists and waits to be told to go on.
pub(crate) struct Prepared {
    /// Its number.
    pub pid: i32,
    /// A descriptor of it.
    pub pidfd: OwnedFd,
    /// The agent's end.
    pub channel: Channel,
}

impl Prepared {
    /// Starts a container's process in a group, up to its being there.
    pub fn start(
        plan: &Plan,
        stdio: &Stdio,
        cgroup: &File,
        target: Option<BorrowedFd<'_>>,
    ) -> Result<Self, EngineError> {
        let Launched { channel, .. } = launch(plan, stdio, Some(cgroup.as_fd()), target)?;
        match receive(&channel, PREPARE_TIME)? {
            Message::Created { pid, pidfd } => Ok(Self {
                pid,
                pidfd,
                channel,
            }),
            _ => Err(EngineError::Init("no process was made".to_owned())),
        }
    }

    /// Lets the process set itself up; hands back its terminal.
    pub fn prepare(&self, hooks: &[Hook]) -> Result<Option<OwnedFd>, EngineError> {
        let gone = |error| EngineError::system("talk to a container's process", error);
        self.channel.send(&Message::Continue).map_err(gone)?;
        match receive(&self.channel, PREPARE_TIME + hooks_time(hooks))? {
            Message::Ready(terminal) => Ok(terminal),
            _ => Err(EngineError::Init(
                "the process spoke out of turn".to_owned(),
            )),
        }
    }
}

/// Receives a message; a failure and the end of the stream are errors.
pub(crate) fn receive(channel: &Channel, time: Duration) -> Result<Message, EngineError> {
    match channel.receive(Some(Instant::now() + time)) {
        Ok(Some(Message::Failed {
            reason,
            unexecutable,
        })) => Err(EngineError::init(reason, unexecutable)),
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(EngineError::Init(
            "the container's process ended while it was prepared (was it killed, or out of memory?)"
                .to_owned(),
        )),
        Err(error) => Err(EngineError::system(
            "hear from a container's process",
            error,
        )),
    }
}

/// Lets a prepared process execute; the end of the stream means that it has.
pub(crate) fn start(
    channel: &Channel,
    hooks: &[Hook],
    ended: impl Fn() -> EngineError,
) -> Result<(), EngineError> {
    channel.send(&Message::Start).map_err(|_| ended())?;
    let deadline = Instant::now() + PREPARE_TIME + hooks_time(hooks);
    match channel.receive(Some(deadline)) {
        Ok(None) => Ok(()),
        Ok(Some(Message::Failed {
            reason,
            unexecutable,
        })) => Err(EngineError::init(reason, unexecutable)),
        Ok(Some(_)) => Err(EngineError::Init(
            "the process spoke out of turn".to_owned(),
        )),
        Err(error) => Err(EngineError::system("start a container's process", error)),
    }
}

/// How long the hooks may take altogether.
fn hooks_time(hooks: &[Hook]) -> Duration {
    hooks
        .iter()
        .map(|hook| {
            hook.timeout.map_or(HOOKS_TIME, |seconds| {
                Duration::from_secs(seconds.into()).min(HOOKS_TIME)
            })
        })
        .sum()
}

/// Runs hooks in the agent's namespaces, from a process of their own: the agent waits for all of its children, and a
/// hook's status would be lost there.
pub(crate) fn run_hooks(hooks: &[Hook], state: &State) -> Result<(), EngineError> {
    if hooks.is_empty() {
        return Ok(());
    }
    let plan = Plan::Hooks(hooks.to_vec(), state.clone());
    let launched = launch(&plan, &Stdio::default(), None, None)?;
    let result = receive(&launched.channel, PREPARE_TIME + hooks_time(hooks));
    if result.is_err() {
        let _ = kill(Pid::from_raw(launched.pid), Signal::SIGKILL);
    }
    result.map(drop)
}
