//! OOM kills, told as they happen.
//!
//! The kernel notifies of each change of a cgroup's `memory.events` through inotify.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use caisson_proto::agent::{Event, OomEvent, event};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::container::{Container, lock};
use super::pod::Pod;
use crate::warn;

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Watches the containers' cgroups.
pub struct OomWatch {
    inotify: AsyncFd<Descriptor>,
    containers: Mutex<HashMap<WatchDescriptor, Weak<Container>>>,
}

impl OomWatch {
    /// Watches nothing yet. Needs a running tokio runtime.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let descriptor = Descriptor(inotify);
        // SAFETY: the descriptor is owned by what is registered, and does not change.
        let inotify = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        Ok(Self {
            inotify,
            containers: Mutex::default(),
        })
    }

    /// Watches a container until its cgroup is removed.
    pub fn add(&self, container: &Arc<Container>) {
        let path: &Path = &container.memory_events;
        let mut containers = lock(&self.containers);
        containers.retain(|_, container| container.strong_count() > 0);
        match self
            .inotify
            .get_ref()
            .0
            .add_watch(path, AddWatchFlags::IN_MODIFY)
        {
            Ok(watch) => {
                containers.insert(watch, Arc::downgrade(container));
            }
            Err(error) => warn!(
                "no OOM events of container {}: {}: {error}",
                container.id,
                path.display()
            ),
        }
    }

    async fn next(&self) -> io::Result<Vec<Arc<Container>>> {
        let read = |descriptor: &Descriptor| Ok(descriptor.0.read_events()?);
        let events = self.inotify.async_io(Interest::READABLE, read).await?;
        let mut containers = lock(&self.containers);
        let mut changed: Vec<Arc<Container>> = Vec::new();
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                containers.remove(&event.wd);
            } else if let Some(container) = containers.get(&event.wd).and_then(Weak::upgrade) {
                changed.push(container);
            }
        }
        Ok(changed)
    }
}

/// Tells of OOM kills for ever.
pub async fn run(pod: Arc<Pod>) {
    let Some(oom) = &pod.oom else {
        return;
    };
    loop {
        match oom.next().await {
            Ok(containers) => {
                for container in containers {
                    tell(&pod, &container);
                }
            }
            Err(error) => {
                warn!("OOM events have ended: {error}");
                return;
            }
        }
    }
}

/// Tells of a container's OOM kills that have not been told of.
pub fn tell(pod: &Pod, container: &Container) {
    if container.take_new_oom_kills() {
        crate::info!("container {}: OOM kill", container.id);
        pod.tell(Event {
            container_id: container.id.clone(),
            exec_id: String::new(),
            kind: Some(event::Kind::Oom(OomEvent {})),
        });
    }
}
