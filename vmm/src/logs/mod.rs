//! The containers' logs: output comes from the agent over vsock and goes to log files in the CRI format and to
//! attached clients. It needs no daemon.
//!
//! Each stream has a thread that does nothing but copy, so whatever is slow (a reader, a full disk) holds back
//! that container alone: the stream is not read, the guest runs out of credit, and the container's writes wait.
//! No byte is dropped and none is kept in memory beyond what was read last.

mod agent;
mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod hold;
mod sink;
mod stream;
mod tee;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use caisson_vmm_protocol::Event;

pub use agent::{AgentStreamError, Dial, open_stream};

use format::Tag;
use stream::{Live, Log};

/// How long the agent may take to open a stream.
const OPEN_TIME: Duration = Duration::from_secs(10);
/// How long the last output before a hold may be under way.
const HOLD_TIME: Duration = Duration::from_secs(10);
/// The longest container ID, as the agent's protocol has it.
const MAX_ID: usize = 128;

/// Where events go. Called on the streams' threads; it must not wait.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

/// Why a log could not be added or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Not a container ID.
    #[error(
        "{0:?} is not a container ID; it has 1 to {MAX_ID} of the characters A-Z a-z 0-9 _ . -"
    )]
    BadId(String),
    /// The container has a log.
    #[error("container {0} already has a log; remove it first")]
    Exists(String),
    /// The container has no log.
    #[error("container {0} has no log here; add one first")]
    Unknown(String),
    /// A terminal has no standard error of its own.
    #[error("container {0} has a terminal, which has no standard error; attach to its output")]
    NoStderr(String),
    /// The agent gave no stream.
    #[error(transparent)]
    Agent(#[from] AgentStreamError),
    /// What was read last cannot be written.
    #[error(
        "the output of container {0} is still under way after {limit} s; is there room for its log?",
        limit = HOLD_TIME.as_secs()
    )]
    UnderWay(String),
    /// The system refused something.
    #[error("the log of container {id} could not be set up: {source}")]
    Host {
        /// The container.
        id: String,
        /// What failed.
        source: io::Error,
    },
}

/// A log to be added: [`LogConfig`](caisson_vmm_protocol::LogConfig) with its descriptors in hand.
#[derive(Debug)]
pub struct NewLog {
    /// The container, already created in the agent.
    pub container_id: String,
    /// One terminal stream instead of standard output and standard error.
    pub terminal: bool,
    /// The log file; without one the output only goes to attached clients.
    pub file: Option<OwnedFd>,
    /// A first client of standard output or of the terminal.
    pub stdout: Option<OwnedFd>,
    /// A first client of standard error.
    pub stderr: Option<OwnedFd>,
}

/// The logs of a pod.
pub struct LogManager {
    dial: Box<dyn Dial>,
    events: EventSink,
    logs: Mutex<HashMap<String, Entry>>,
    live: Arc<Live>,
    held: AtomicBool,
}

enum Entry {
    /// Its streams are being opened.
    Opening,
    Running(Arc<Log>),
}

impl LogManager {
    /// A manager that gets streams from the agent behind `dial`.
    pub fn new(dial: impl Dial + 'static, events: EventSink) -> Self {
        Self {
            dial: Box::new(dial),
            events,
            logs: Mutex::new(HashMap::new()),
            live: Arc::default(),
            held: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &str) -> Result<Arc<Log>, LogError> {
        match self.lock().get(id) {
            Some(Entry::Running(log)) => Ok(Arc::clone(log)),
            _ => Err(LogError::Unknown(id.to_owned())),
        }
    }

    /// Connects to a container's output streams and copies them from their first byte. Returns when they are open,
    /// which takes as long as the agent does (bounded): other calls need not wait meanwhile.
    ///
    /// # Errors
    /// [`LogError`]; nothing has been read then.
    pub fn add(&self, new: NewLog) -> Result<(), LogError> {
        let id = new.container_id.clone();
        if !is_id(&id) {
            return Err(LogError::BadId(id));
        }
        if new.terminal && new.stderr.is_some() {
            return Err(LogError::NoStderr(id));
        }
        {
            let mut logs = self.lock();
            if logs.contains_key(&id) {
                return Err(LogError::Exists(id));
            }
            logs.insert(id.clone(), Entry::Opening);
        }
        let started = self.start(new);
        let mut logs = self.lock();
        match started {
            Ok(log) => {
                logs.insert(id, Entry::Running(log));
                Ok(())
            }
            Err(error) => {
                logs.remove(&id);
                Err(error)
            }
        }
    }

    fn start(&self, new: NewLog) -> Result<Arc<Log>, LogError> {
        let id = new.container_id;
        let streams = if new.terminal {
            vec![(Tag::Stdout, self.open(&id, "tty")?)]
        } else {
            vec![
                (Tag::Stdout, self.open(&id, "stdout")?),
                (Tag::Stderr, self.open(&id, "stderr")?),
            ]
        };
        let failed = |id: &str| {
            let id = id.to_owned();
            |source| LogError::Host { id, source }
        };
        let log = Log::new(id.clone(), new.terminal, new.file, Arc::clone(&self.events))
            .map_err(failed(&id))?;
        for (tag, fd) in [(Tag::Stdout, new.stdout), (Tag::Stderr, new.stderr)] {
            if let Some(fd) = fd {
                log.arrivals(tag).add(fd).map_err(failed(&id))?;
            }
        }
        log.start(streams, &self.live).map_err(failed(&id))?;
        Ok(log)
    }

    fn open(&self, id: &str, stream: &str) -> Result<UnixStream, LogError> {
        let line = format!("STREAM {id} - {stream}");
        Ok(open_stream(self.dial.as_ref(), &line, OPEN_TIME)?)
    }

    /// Goes on in another file; the next byte goes there.
    ///
    /// # Errors
    /// [`LogError::Unknown`], [`LogError::Host`].
    pub fn reopen(&self, id: &str, file: OwnedFd) -> Result<(), LogError> {
        self.find(id)?
            .reopen(file)
            .map_err(|source| LogError::Host {
                id: id.to_owned(),
                source,
            })
    }

    /// Copies a container's output to more clients, from now on. A client of a stream that has ended sees its
    /// descriptor closed at once.
    ///
    /// # Errors
    /// [`LogError::Unknown`], [`LogError::NoStderr`], [`LogError::Host`].
    pub fn attach(
        &self,
        id: &str,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> Result<(), LogError> {
        let log = self.find(id)?;
        if log.terminal() && stderr.is_some() {
            return Err(LogError::NoStderr(id.to_owned()));
        }
        for (tag, fd) in [(Tag::Stdout, stdout), (Tag::Stderr, stderr)] {
            if let Some(fd) = fd {
                log.arrivals(tag).add(fd).map_err(|source| LogError::Host {
                    id: id.to_owned(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Forgets a container that is gone. Output that is still under way is written; what a file refuses from now
    /// on, or a client does not read, is let go. An unknown container is not an error.
    pub fn remove(&self, id: &str) {
        let mut logs = self.lock();
        if let Some(Entry::Running(log)) = logs.get(id) {
            log.abandon();
            logs.remove(id);
        }
    }

    fn running(&self) -> Vec<(String, Arc<Log>)> {
        let logs = self.lock();
        let running = logs.iter().filter_map(|(id, entry)| match entry {
            Entry::Running(log) => Some((id.clone(), Arc::clone(log))),
            Entry::Opening => None,
        });
        running.collect()
    }

    /// From now on a stream that ends was let go of by the agent, and goes on with [`LogManager::release`].
    pub fn hold(&self) {
        self.held.store(true, Ordering::Relaxed);
        self.running()
            .iter()
            .for_each(|(_, log)| log.hold().begin());
    }

    /// Whether the logs are held.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// Waits until all streams have been let go of, and what they had is in the logs.
    ///
    /// # Errors
    /// [`LogError::UnderWay`].
    pub fn wait_until_held(&self) -> Result<(), LogError> {
        let late = |(_, log): &(String, Arc<Log>)| !log.wait_until_held(HOLD_TIME);
        match self.running().into_iter().find(late) {
            Some((id, _)) => Err(LogError::UnderWay(id)),
            None => Ok(()),
        }
    }

    /// Takes up the streams again that have been let go of. One that cannot be had has ended.
    ///
    /// # Errors
    /// The first that could not be had, after all were tried.
    pub fn release(&self) -> Result<(), LogError> {
        self.held.store(false, Ordering::Relaxed);
        let mut failed = Ok(());
        for (id, log) in self.running() {
            for tag in log.hold().release() {
                let name = if log.terminal() { "tty" } else { tag.name() };
                let next = self.open(&id, name).map_err(|error| {
                    if failed.is_ok() {
                        failed = Err(error);
                    }
                });
                log.hold().give(tag, next.ok());
            }
        }
        failed
    }

    /// The containers whose output has ended and is written.
    pub fn drained(&self) -> Vec<String> {
        self.lock()
            .iter()
            .filter(|(_, entry)| matches!(entry, Entry::Running(log) if log.is_drained()))
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Waits until all streams have ended and are written, when the machine ends. False if some have not
    /// within `timeout`.
    pub fn finish(&self, timeout: Duration) -> bool {
        self.live.wait_for_none(timeout)
    }
}

fn is_id(id: &str) -> bool {
    (1..=MAX_ID).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}
