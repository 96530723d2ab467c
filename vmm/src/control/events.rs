//! What watchers hear.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use caisson_vmm_protocol::{Event, ExitReason};

/// Events on their way to one watcher. One that does not read so many is dropped; it can watch anew.
const BACKLOG: usize = 1024;

#[derive(Default)]
struct Hub {
    agent_ready: bool,
    drained: Vec<String>,
    /// Containers whose logs cannot be written, and why.
    failed: BTreeMap<String, String>,
    exited: Option<ExitReason>,
    watchers: Vec<SyncSender<Event>>,
}

/// The facts so far, and who wants to hear of new ones.
#[derive(Default)]
pub struct Events(Mutex<Hub>);

impl Events {
    fn lock(&self) -> MutexGuard<'_, Hub> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a fact and tells all watchers.
    pub fn publish(&self, event: Event) {
        let mut hub = self.lock();
        match &event {
            Event::AgentReady if hub.agent_ready => return,
            Event::AgentReady => hub.agent_ready = true,
            Event::LogDrained { container_id } => hub.drained.push(container_id.clone()),
            Event::Exited(reason) => hub.exited = Some(reason.clone()),
            Event::LogFailed {
                container_id,
                message,
            } => {
                hub.failed.insert(container_id.clone(), message.clone());
            }
            Event::LogRecovered { container_id } => {
                hub.failed.remove(container_id);
            }
        }
        let last = hub.exited.is_some();
        hub.watchers
            .retain(|watcher| watcher.try_send(event.clone()).is_ok());
        if last {
            hub.watchers.clear();
        }
    }

    /// A container's log begins anew: what was known of an earlier one holds no longer.
    pub fn forget_log(&self, container_id: &str) {
        let mut hub = self.lock();
        hub.drained.retain(|id| id != container_id);
        hub.failed.remove(container_id);
    }

    /// Whether the agent has said that it listens.
    pub fn agent_ready(&self) -> bool {
        self.lock().agent_ready
    }

    /// The facts that hold, then everything that happens.
    pub fn watch(&self) -> Receiver<Event> {
        let mut hub = self.lock();
        let (sender, receiver) = sync_channel(BACKLOG + hub.drained.len() + hub.failed.len());
        let ready = hub.agent_ready.then_some(Event::AgentReady);
        let drained = hub.drained.iter().map(|id| Event::LogDrained {
            container_id: id.clone(),
        });
        let failed = hub.failed.iter().map(|(id, message)| Event::LogFailed {
            container_id: id.clone(),
            message: message.clone(),
        });
        let exited = hub.exited.clone().map(Event::Exited);
        for fact in ready.into_iter().chain(drained).chain(failed).chain(exited) {
            // There is room: see the channel's size.
            let _ = sender.try_send(fact);
        }
        if hub.exited.is_none() {
            hub.watchers.push(sender);
        }
        receiver
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drained(id: &str) -> Event {
        Event::LogDrained {
            container_id: id.into(),
        }
    }

    #[test]
    fn a_late_watcher_hears_the_facts_that_hold() {
        let events = Events::default();
        let early = events.watch();
        events.publish(Event::AgentReady);
        events.publish(Event::AgentReady);
        events.publish(drained("a"));
        events.publish(drained("b"));
        events.forget_log("a");
        let failed = |id: &str| Event::LogFailed {
            container_id: id.into(),
            message: "full".into(),
        };
        events.publish(failed("c"));
        events.publish(failed("d"));
        events.publish(Event::LogRecovered {
            container_id: "c".into(),
        });
        events.publish(Event::Exited(ExitReason::PoweredOff));
        let exited = Event::Exited(ExitReason::PoweredOff);
        assert_eq!(
            early.iter().collect::<Vec<_>>(),
            [
                Event::AgentReady,
                drained("a"),
                drained("b"),
                failed("c"),
                failed("d"),
                Event::LogRecovered {
                    container_id: "c".into()
                },
                exited.clone()
            ]
        );
        let late: Vec<_> = events.watch().iter().collect();
        assert_eq!(late, [Event::AgentReady, drained("b"), failed("d"), exited]);
    }

    #[test]
    fn a_watcher_that_does_not_read_is_dropped() {
        let events = Events::default();
        let watcher = events.watch();
        for n in 0..BACKLOG + 10 {
            events.publish(drained(&n.to_string()));
        }
        assert_eq!(watcher.iter().count(), BACKLOG);
    }
}
