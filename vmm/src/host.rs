//! A pod that runs on the host: this process watches its agent and writes its containers' logs, so that both go on
//! while the daemon is away. It has no machine.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use caisson_vmm_protocol::{
    Event, ExitReason, Frame, JailConfig, JoinConfig, STREAM_PORT, STREAM_SOCKET, VmState,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use nix::unistd::fchdir;

use crate::config::{ConfigError, Fds, check_jail, check_name};
use crate::control::Events;
use crate::jail::{Jail, JailError};
use crate::logs::{Dial, LogManager};
use crate::pod::{Pod, Running};
use crate::threads::{self, ConfineError, Kind};
use crate::timeline::Timeline;
use crate::vm::Ending;

/// How often an agent that is starting is asked whether it listens.
const ASK_AGAIN: Duration = Duration::from_millis(10);
/// How long one such question may take.
const ASK_LIMIT: Duration = Duration::from_secs(1);

/// Why a pod could not be joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The filters.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The agent's directory, or a thread.
    #[error("the {what} of the pod on the host cannot be had: {source}")]
    System {
        /// What.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> JoinError {
    move |source| JoinError::System {
        what,
        source: source.into(),
    }
}

/// The daemon's [`JoinConfig`], checked, with its descriptors in hand.
pub struct HostConfig {
    agent_directory: OwnedFd,
    agent: OwnedFd,
    cgroup_kill: File,
    jail: Option<JailConfig>,
    /// Where later control clients connect.
    pub control_listener: Option<UnixListener>,
    /// What gets the exit reason.
    pub exit_file: Option<File>,
}

impl HostConfig {
    /// Checks a configuration and takes the descriptors that came with it.
    ///
    /// # Errors
    /// [`ConfigError`] names the first field that is wrong.
    pub fn new<T>(config: JoinConfig, frame: &mut Frame<T>) -> Result<Self, ConfigError> {
        check_name(config.version, &config.id)?;
        if let Some(jail) = &config.jail {
            check_jail(jail)?;
        }
        let mut fds = Fds(frame);
        Ok(Self {
            agent_directory: fds.take(config.agent_directory)?,
            agent: fds.take(config.agent)?,
            cgroup_kill: fds.take(config.cgroup_kill)?.into(),
            jail: config.jail,
            control_listener: fds
                .optional(config.control_listener)?
                .map(UnixListener::from),
            exit_file: fds.optional(config.exit_file)?.map(File::from),
        })
    }
}

/// A pod of the host.
pub struct HostPod {
    cgroup_kill: File,
    ending: Arc<Ending>,
    end_expected: Arc<AtomicBool>,
}

impl HostPod {
    /// A pod without an agent.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn alone(cgroup_kill: File, ending: Arc<Ending>) -> Self {
        Self {
            cgroup_kill,
            ending,
            end_expected: Arc::default(),
        }
    }

    /// What it is doing.
    pub fn state(&self) -> VmState {
        match self.ending.reason() {
            Some(_) => VmState::Exited,
            None => VmState::Running,
        }
    }

    /// Where its end is told.
    pub fn ending(&self) -> &Arc<Ending> {
        &self.ending
    }

    /// Notes that the agent was asked to end.
    pub fn expect_end(&self) {
        self.end_expected.store(true, Ordering::SeqCst);
    }

    /// Kills whatever of the pod is left: nothing of it outlives its agent.
    pub fn stop(&self) {
        if let Err(error) = (&self.cgroup_kill).write_all(b"1") {
            // The daemon does the same when it hears of the end.
            eprintln!("the pod's processes could not be killed: {error}");
        }
    }
}

/// Goes into the agent's directory, gives up the process's privileges, and watches the agent from there.
///
/// The jail comes before the first thread: see [`crate::boot::build_and_boot`].
///
/// # Errors
/// [`JoinError`] says in one sentence what failed.
pub fn join(
    config: HostConfig,
    ending: &Arc<Ending>,
    events: &Arc<Events>,
    timeline: &mut Timeline,
) -> Result<Running, JoinError> {
    let landlock = timeline.measure("enter jail", || -> Result<u32, JoinError> {
        match &config.jail {
            Some(identity) => {
                let jail = Jail::prepare(Some(config.agent_directory.as_fd()))?;
                // It would be a way out.
                drop(config.agent_directory);
                let landlock = jail.enter(identity)?;
                threads::confine()?;
                Ok(landlock)
            }
            None => {
                fchdir(&config.agent_directory).map_err(system("directory"))?;
                Ok(0)
            }
        }
    })?;
    let dial = UnixDial {
        path: STREAM_SOCKET.into(),
    };
    let end_expected = Arc::new(AtomicBool::new(false));
    watch(config.agent, ending, &end_expected).map_err(system("watch"))?;
    await_agent(dial.clone(), ending, events).map_err(system("agent"))?;
    let sink = Arc::clone(events);
    Ok(Running {
        pod: Pod::Host(HostPod {
            cgroup_kill: config.cgroup_kill,
            ending: Arc::clone(ending),
            end_expected,
        }),
        logs: Some(LogManager::new(
            dial.clone(),
            Arc::new(move |event| sink.publish(event)),
        )),
        layers: None,
        landlock,
        connector: Some(Arc::new(dial)),
    })
}

/// Ends the pod when its agent has ended.
fn watch(agent: OwnedFd, ending: &Arc<Ending>, expected: &Arc<AtomicBool>) -> io::Result<()> {
    let (ending, expected) = (Arc::clone(ending), Arc::clone(expected));
    let wait = move || {
        let waited = loop {
            // A pidfd can be read when its process has ended (pidfd_open(2)).
            let mut fds = [PollFd::new(agent.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                other => break other,
            }
        };
        ending.end(match waited {
            Err(error) => ExitReason::InternalError(format!("the agent is not watched: {error}")),
            Ok(_) if expected.load(Ordering::SeqCst) => ExitReason::PoweredOff,
            Ok(_) => ExitReason::InternalError(
                "the pod's agent on the host ended unasked; its last words are in console.log"
                    .into(),
            ),
        });
    };
    threads::spawn(Kind::Watch, "agent", 0, wait).map(drop)
}

/// Tells when the agent takes connections.
fn await_agent(dial: UnixDial, ending: &Arc<Ending>, events: &Arc<Events>) -> io::Result<()> {
    let (ending, events) = (Arc::clone(ending), Arc::clone(events));
    let ask = move || {
        while ending.reason().is_none() {
            if dial.dial(STREAM_PORT, ASK_LIMIT).is_ok() {
                events.publish(Event::AgentReady);
                return;
            }
            std::thread::sleep(ASK_AGAIN);
        }
    };
    threads::spawn(Kind::Watch, "ready", 0, ask).map(drop)
}

/// Connects to the agent's stream socket.
#[derive(Clone)]
struct UnixDial {
    path: PathBuf,
}

impl Dial for UnixDial {
    fn dial(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        if port != STREAM_PORT {
            return Err(io::Error::other(format!(
                "port {port} of an agent on the host is not for this process"
            )));
        }
        let stream = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let limit = TimeVal::new(
            i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            i64::from(timeout.subsec_micros()),
        );
        // It bounds the connect, too: an agent that hangs does not accept.
        setsockopt(&stream, sockopt::SendTimeout, &limit)?;
        connect(stream.as_raw_fd(), &UnixAddr::new(&self.path)?)?;
        setsockopt(&stream, sockopt::SendTimeout, &TimeVal::new(0, 0))?;
        Ok(UnixStream::from(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    #[test]
    fn the_dial_reaches_the_stream_socket_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let dial = UnixDial {
            path: dir.path().join(STREAM_SOCKET),
        };
        assert!(dial.dial(STREAM_PORT, ASK_LIMIT).is_err());
        let listener = UnixListener::bind(&dial.path).unwrap();
        let mut stream = dial.dial(STREAM_PORT, ASK_LIMIT).unwrap();
        stream.write_all(b"x").unwrap();
        listener.accept().unwrap();
        assert!(dial.dial(STREAM_PORT + 1, ASK_LIMIT).is_err());
    }

    #[test]
    fn the_pod_ends_with_its_agent() {
        for (expected, reason) in [(true, true), (false, false)] {
            let mut child = Command::new("sleep").arg("600").spawn().unwrap();
            let pid = Pid::from_child(&child);
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
            let ending = Ending::new();
            watch(pidfd, &ending, &Arc::new(AtomicBool::new(expected))).unwrap();
            assert_eq!(ending.reason(), None);
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(ending.wait() == ExitReason::PoweredOff, reason);
        }
    }
}
