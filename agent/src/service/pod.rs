//! The agent's state: one pod.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use caisson_proto::agent;
use tokio::sync::{Notify, broadcast, watch};

use super::container::{Container, lock};
use super::error::ServiceError;
use super::oom::OomWatch;
use super::validate;
use crate::reaper::Reaper;
use crate::streams::{Endpoint, Kind, Processes};

const CONTAINERS_MAX: usize = 256;
/// Events a slow reader of Events may lag behind.
const EVENTS_MAX: usize = 1024;

/// What ends when the pod ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest: the machine is powered off.
    PowerOff,
    /// This process only, when it does not run as a guest's PID 1.
    Exit,
}

enum Slot {
    Creating,
    Ready(Arc<Container>),
    Removing(Arc<Container>),
}

/// How far SetupSandbox has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// Not called.
    Fresh,
    /// At work, or failed: the guest is of no use then.
    Begun,
    /// Done.
    Ready,
}

/// The pod.
pub struct Pod {
    /// When the agent began.
    pub started: Instant,
    /// Reaps and tells.
    pub reaper: Reaper,
    /// What happens to containers.
    pub events: broadcast::Sender<agent::Event>,
    /// Watches for OOM kills.
    pub oom: Option<OomWatch>,
    /// What ends in the end.
    pub ending: Ending,
    /// Raised when the agent's process is to end, with [`Ending::Exit`].
    pub ended: Notify,
    /// Raised by a stream connection that asks for the end.
    pub shutdown_requested: Notify,
    shutting_down: AtomicBool,
    quiescent: AtomicBool,
    /// Held while the pod is brought to a standstill, or goes on.
    pub standstill: tokio::sync::Mutex<()>,
    /// Whether containers can run as far as the system is concerned.
    settled: watch::Sender<bool>,
    setup: Mutex<Setup>,
    slots: Mutex<HashMap<String, Slot>>,
    changed: Notify,
}

impl Pod {
    /// An empty pod. Needs a running tokio runtime.
    pub fn new(started: Instant, reaper: Reaper, ending: Ending) -> Arc<Self> {
        let oom = OomWatch::new()
            .inspect_err(|error| crate::error!("no OOM events: inotify: {error}"))
            .ok();
        Arc::new(Self {
            started,
            reaper,
            events: broadcast::Sender::new(EVENTS_MAX),
            oom,
            ending,
            ended: Notify::new(),
            shutdown_requested: Notify::new(),
            shutting_down: AtomicBool::new(false),
            quiescent: AtomicBool::new(false),
            standstill: tokio::sync::Mutex::default(),
            settled: watch::Sender::new(false),
            setup: Mutex::new(Setup::Fresh),
            slots: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Says that the system has what containers need.
    pub fn settled(&self) {
        self.settled.send_replace(true);
    }

    /// Resolves when [`Pod::settled`] has been said.
    pub async fn wait_until_settled(&self) {
        // The sender is in `self`, so that the channel is open while this runs.
        let _ = self.settled.subscribe().wait_for(|settled| *settled).await;
    }

    /// How far SetupSandbox has come.
    pub fn setup(&self) -> Setup {
        *lock(&self.setup)
    }

    /// Takes the right to set the sandbox up.
    pub fn begin_setup(&self) -> Result<(), ServiceError> {
        let mut setup = lock(&self.setup);
        if *setup != Setup::Fresh {
            return Err(ServiceError::SandboxTwice);
        }
        *setup = Setup::Begun;
        Ok(())
    }

    /// Gives back the right (nothing was done) or records success.
    pub fn end_setup(&self, setup: Setup) {
        *lock(&self.setup) = setup;
    }

    /// Whether the end has begun; the first caller of [`Pod::begin_shutdown`] begins it.
    pub fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Ordering::Relaxed)
    }

    /// True for the first caller only.
    pub fn begin_shutdown(&self) -> bool {
        !self.shutting_down.swap(true, Ordering::Relaxed)
    }

    /// Whether the pod stands still, or is being brought to that.
    pub fn is_quiescent(&self) -> bool {
        self.quiescent.load(Ordering::Relaxed)
    }

    /// Refuses what would begin something in a pod that stands still.
    pub fn check_moving(&self) -> Result<(), ServiceError> {
        match self.is_quiescent() {
            true => Err(ServiceError::Quiescent),
            false => Ok(()),
        }
    }

    /// Takes the right to bring the pod to a standstill.
    pub fn begin_quiescence(&self) -> Result<(), ServiceError> {
        if self.setup() != Setup::Ready {
            return Err(ServiceError::SandboxNotReady);
        }
        match self.quiescent.swap(true, Ordering::Relaxed) {
            true => Err(ServiceError::Quiescent),
            false => Ok(()),
        }
    }

    /// The pod goes on.
    pub fn end_quiescence(&self) {
        self.quiescent.store(false, Ordering::Relaxed);
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whoever watches. No one may.
    pub fn tell(&self, event: agent::Event) {
        let _ = self.events.send(event);
    }

    /// Takes a name for a container about to be made.
    pub fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation, ServiceError> {
        validate::container_id(id)?;
        if self.is_shutting_down() {
            return Err(ServiceError::ShuttingDown);
        }
        if self.setup() != Setup::Ready {
            return Err(ServiceError::SandboxNotReady);
        }
        self.check_moving()?;
        let mut slots = self.slots();
        let count = slots.len();
        match slots.entry(id.to_owned()) {
            Entry::Occupied(_) => Err(ServiceError::ContainerExists(id.into())),
            Entry::Vacant(_) if count >= CONTAINERS_MAX => {
                Err(ServiceError::TooMany(format!("{count} containers")))
            }
            Entry::Vacant(slot) => {
                slot.insert(Slot::Creating);
                Ok(Reservation {
                    pod: self.clone(),
                    id: id.into(),
                    fulfilled: false,
                })
            }
        }
    }

    /// A container that is there.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        validate::container_id(id)?;
        match self.slots().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            Some(_) => Err(ServiceError::Busy(id.into())),
            None => Err(ServiceError::NoContainer(id.into())),
        }
    }

    /// All containers that are there.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        let slots = self.slots();
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(container) => Some(container.clone()),
            _ => None,
        });
        let mut containers: Vec<_> = ready.collect();
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        containers
    }

    /// Takes a container out for removal, waiting for others that make or remove it. `None`: it is gone.
    pub async fn take_for_removal(&self, id: &str) -> Option<Arc<Container>> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            {
                let mut slots = self.slots();
                let slot = slots.get_mut(id)?;
                if let Slot::Ready(container) = slot {
                    let container = container.clone();
                    *slot = Slot::Removing(container.clone());
                    return Some(container);
                }
            }
            changed.await;
        }
    }

    /// Ends a removal: the container is gone, or it stays since its removal failed.
    pub fn end_removal(&self, id: &str, removed: bool) {
        let mut slots = self.slots();
        match slots.remove(id) {
            Some(Slot::Removing(container)) if !removed => {
                slots.insert(id.into(), Slot::Ready(container));
            }
            _ => {}
        }
        drop(slots);
        self.changed.notify_waiters();
    }
}

impl Processes for Pod {
    fn endpoint(
        &self,
        container: &str,
        exec: Option<&str>,
        kind: Kind,
    ) -> Result<Arc<Endpoint>, String> {
        let find = || self.container(container)?.process(exec);
        let process = find().map_err(|error: ServiceError| error.to_string())?;
        process.streams.get(kind)
    }

    fn shutdown(&self) {
        self.shutdown_requested.notify_one();
    }
}

/// The name of a container that is being made. Dropping it gives the name up.
pub struct Reservation {
    pod: Arc<Pod>,
    id: String,
    fulfilled: bool,
}

impl Reservation {
    /// The container is there.
    pub fn fulfil(mut self, container: Arc<Container>) {
        self.fulfilled = true;
        self.pod
            .slots()
            .insert(self.id.clone(), Slot::Ready(container));
        self.pod.changed.notify_waiters();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.fulfilled {
            self.pod.slots().remove(&self.id);
            self.pod.changed.notify_waiters();
        }
    }
}
