//! What the agent knows of a container and of its processes.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_proto::agent::container_state::State;
use caisson_proto::agent::{ContainerState, ExitStatus};
use tokio::sync::watch;

use super::error::ServiceError;
use super::stdio::Streams;
use crate::engine;

/// Execs of one container, running ones and finished ones whose streams can still be read.
const EXECS_MAX: usize = 256;
/// Exit statuses kept of execs that have been forgotten otherwise.
const STATUSES_MAX: usize = 1024;

/// A process that the daemon knows by name: a container's own, or an exec.
pub struct Process {
    /// In the guest's PID namespace.
    pub pid: i32,
    /// Its standard streams.
    pub streams: Streams,
    /// Set once, when it has ended.
    exit: watch::Sender<Option<ExitStatus>>,
    waited: AtomicBool,
}

impl Process {
    /// A process that runs.
    pub fn new(pid: i32, streams: Streams) -> Arc<Self> {
        Arc::new(Self {
            pid,
            streams,
            exit: watch::Sender::new(None),
            waited: AtomicBool::new(false),
        })
    }

    /// Its exit status, if it has ended.
    pub fn exit(&self) -> Option<ExitStatus> {
        *self.exit.borrow()
    }

    /// Records that it has ended.
    pub fn ended(&self, status: ExitStatus) {
        self.exit.send_replace(Some(status));
    }

    /// Resolves when it has ended.
    pub async fn wait(&self) -> ExitStatus {
        let mut exit = self.exit.subscribe();
        // The sender is in `self`, so that the channel is open while this runs.
        let status = match exit.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            Err(_) => ExitStatus::default(),
        };
        self.waited.store(true, Ordering::Relaxed);
        status
    }
}

enum ExecSlot {
    Starting,
    Ready(Arc<Process>),
}

/// The execs of a container.
#[derive(Default)]
pub struct Execs {
    slots: HashMap<String, ExecSlot>,
    /// Oldest first.
    finished: VecDeque<String>,
    /// Statuses of forgotten ones, oldest first.
    statuses: VecDeque<(String, ExitStatus)>,
}

/// Where an exec's exit status comes from.
pub enum ExecStatus {
    /// It is known by name.
    Process(Arc<Process>),
    /// It has ended and is forgotten otherwise.
    Known(ExitStatus),
}

impl Execs {
    /// Takes a name for an exec about to be started.
    fn reserve(&mut self, container: &str, exec: &str) -> Result<(), ServiceError> {
        if self.slots.contains_key(exec) {
            return Err(ServiceError::ExecExists(container.into(), exec.into()));
        }
        if self.slots.len() >= EXECS_MAX && !self.forget_one() {
            return Err(ServiceError::TooMany(format!(
                "{EXECS_MAX} execs of container {container}"
            )));
        }
        self.statuses.retain(|(name, _)| name != exec);
        self.slots.insert(exec.into(), ExecSlot::Starting);
        Ok(())
    }

    /// Forgets a finished exec: the oldest that somebody has waited for, or else the oldest.
    fn forget_one(&mut self) -> bool {
        let waited = |name: &String| match self.slots.get(name) {
            Some(ExecSlot::Ready(process)) => process.waited.load(Ordering::Relaxed),
            _ => false,
        };
        let index = self.finished.iter().position(waited).unwrap_or(0);
        let Some(name) = self.finished.remove(index) else {
            return false;
        };
        if let Some(ExecSlot::Ready(process)) = self.slots.remove(&name) {
            if self.statuses.len() >= STATUSES_MAX {
                self.statuses.pop_front();
            }
            self.statuses
                .push_back((name, process.exit().unwrap_or_default()));
        }
        true
    }
}

/// How far a container has come; whether it has ended is in its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its process waits to run.
    Created,
    /// StartContainer is at work.
    Starting,
    /// Its process runs.
    Running,
}

/// A container.
pub struct Container {
    /// Its name.
    pub id: String,
    /// The engine's part. Its calls can block.
    pub engine: engine::Container,
    /// Its own process.
    pub init: Arc<Process>,
    /// Its cgroup's `memory.events`.
    pub memory_events: PathBuf,
    /// OOM kills that events have told of.
    pub oom_kills: AtomicU64,
    /// A reading of its statistics is under way.
    pub stats_running: AtomicBool,
    phase: Mutex<Phase>,
    execs: Mutex<Execs>,
}

impl Container {
    /// A container whose process waits to run.
    pub fn new(id: String, engine: engine::Container, init: Arc<Process>) -> Arc<Self> {
        Arc::new(Self {
            id,
            memory_events: engine.memory_events_path(),
            engine,
            init,
            oom_kills: AtomicU64::new(0),
            stats_running: AtomicBool::new(false),
            phase: Mutex::new(Phase::Created),
            execs: Mutex::default(),
        })
    }

    /// The state that ListContainers tells.
    pub fn state(&self) -> ContainerState {
        let exit = self.init.exit();
        let state = match (exit, *lock(&self.phase)) {
            (Some(_), _) => State::Exited,
            (None, Phase::Running) => State::Running,
            (None, _) => State::Created,
        };
        ContainerState {
            container_id: self.id.clone(),
            pid: self.init.pid,
            state: state.into(),
            exit,
        }
    }

    /// Whether its process runs.
    pub fn is_running(&self) -> bool {
        self.init.exit().is_none() && *lock(&self.phase) == Phase::Running
    }

    /// Takes the right to start it.
    pub fn begin_start(&self) -> Result<(), ServiceError> {
        let mut phase = lock(&self.phase);
        if *phase != Phase::Created || self.init.exit().is_some() {
            return Err(ServiceError::NotCreated(self.id.clone()));
        }
        *phase = Phase::Starting;
        Ok(())
    }

    /// Records the outcome of a start.
    pub fn set_phase(&self, phase: Phase) {
        *lock(&self.phase) = phase;
    }

    /// OOM kills in its cgroup so far; 0 when the cgroup is gone.
    pub fn count_oom_kills(&self) -> u64 {
        let events = std::fs::read_to_string(&self.memory_events).unwrap_or_default();
        let count = events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "));
        count
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Whether there are OOM kills that no event has told of yet. True only once for each.
    pub fn take_new_oom_kills(&self) -> bool {
        let count = self.count_oom_kills();
        self.oom_kills.fetch_max(count, Ordering::Relaxed) < count
    }

    /// Takes a name for a new exec; [`Reservation::fulfil`] or dropping it gives it up.
    pub fn reserve_exec(self: &Arc<Self>, exec: &str) -> Result<Reservation, ServiceError> {
        lock(&self.execs).reserve(&self.id, exec)?;
        Ok(Reservation {
            container: self.clone(),
            exec: exec.into(),
            fulfilled: false,
        })
    }

    /// A container's own process (`None`) or an exec by name.
    pub fn process(&self, exec: Option<&str>) -> Result<Arc<Process>, ServiceError> {
        let Some(exec) = exec else {
            return Ok(self.init.clone());
        };
        match lock(&self.execs).slots.get(exec) {
            Some(ExecSlot::Ready(process)) => Ok(process.clone()),
            _ => Err(ServiceError::NoExec(self.id.clone(), exec.into())),
        }
    }

    /// Where to learn how a process ended, also after an exec has been forgotten.
    pub fn status_source(&self, exec: Option<&str>) -> Result<ExecStatus, ServiceError> {
        let missing = match self.process(exec) {
            Ok(process) => return Ok(ExecStatus::Process(process)),
            Err(missing) => missing,
        };
        let execs = lock(&self.execs);
        let known = execs
            .statuses
            .iter()
            .find(|(name, _)| Some(name.as_str()) == exec);
        known
            .map(|&(_, status)| ExecStatus::Known(status))
            .ok_or(missing)
    }

    /// Execs that have not ended.
    pub fn running_execs(&self) -> Vec<Arc<Process>> {
        let execs = lock(&self.execs);
        let ready = execs.slots.values().filter_map(|slot| match slot {
            ExecSlot::Ready(process) if process.exit().is_none() => Some(process.clone()),
            _ => None,
        });
        ready.collect()
    }

    /// Records that an exec has ended: it may be forgotten when room is needed.
    pub fn exec_finished(&self, exec: &str) {
        lock(&self.execs).finished.push_back(exec.into());
    }
}

/// The name of an exec that is being started.
pub struct Reservation {
    container: Arc<Container>,
    exec: String,
    fulfilled: bool,
}

impl Reservation {
    /// The exec has started.
    pub fn fulfil(mut self, process: Arc<Process>) {
        self.fulfilled = true;
        let name = std::mem::take(&mut self.exec);
        lock(&self.container.execs)
            .slots
            .insert(name, ExecSlot::Ready(process));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.fulfilled {
            lock(&self.container.execs).slots.remove(&self.exec);
        }
    }
}

/// Locks what is consistent between statements, so that a panic elsewhere does not spoil it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(code: i32) -> Arc<Process> {
        let process = Process::new(1, Streams::default());
        process.ended(ExitStatus {
            code,
            ..Default::default()
        });
        process
    }

    #[test]
    fn finished_execs_make_room_and_their_status_stays() {
        let mut execs = Execs::default();
        for number in 0..EXECS_MAX {
            let name = format!("e{number}");
            execs.reserve("c", &name).unwrap();
            if number >= 2 {
                execs
                    .slots
                    .insert(name.clone(), ExecSlot::Ready(finished(number as i32)));
                execs.finished.push_back(name);
            }
        }
        assert!(matches!(
            execs.reserve("c", "e5"),
            Err(ServiceError::ExecExists(..))
        ));
        if let Some(ExecSlot::Ready(process)) = execs.slots.get("e7") {
            process.waited.store(true, Ordering::Relaxed);
        }
        execs.reserve("c", "new").unwrap();
        assert_eq!(execs.slots.len(), EXECS_MAX);
        assert_eq!(execs.statuses[0].0, "e7");
        assert_eq!(execs.statuses[0].1.code, 7);
        execs.reserve("c", "newer").unwrap();
        assert_eq!(execs.statuses[1].0, "e2");
    }

    #[test]
    fn running_execs_are_bounded() {
        let mut execs = Execs::default();
        for number in 0..EXECS_MAX {
            execs.reserve("c", &format!("e{number}")).unwrap();
        }
        assert!(matches!(
            execs.reserve("c", "more"),
            Err(ServiceError::TooMany(_))
        ));
    }
}
