//! How a machine comes to its end: the first reason wins.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use caisson_vmm_protocol::ExitReason;

use crate::virtio::{DeviceError, FailureSink};

/// The place where every thread can end the machine.
#[derive(Default)]
pub struct Ending {
    reason: Mutex<Option<ExitReason>>,
    changed: Condvar,
}

impl Ending {
    /// A machine that has not ended.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Ends the machine. Later reasons are consequences of the first and are dropped.
    pub fn end(&self, reason: ExitReason) {
        let mut slot = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(reason);
        self.changed.notify_all();
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits for the machine's end.
    pub fn wait(&self) -> ExitReason {
        let mut slot = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(reason) = &*slot {
                return reason.clone();
            }
            slot = self
                .changed
                .wait_timeout(slot, Duration::from_secs(60))
                .map_or_else(|e| e.into_inner().0, |(guard, _)| guard);
        }
    }

    /// Where devices report that they cannot go on.
    pub fn failure_sink(self: &Arc<Self>) -> FailureSink {
        let ending = Arc::clone(self);
        Arc::new(move |error| {
            let message = error.to_string();
            ending.end(match error {
                DeviceError::Guest { .. } => ExitReason::GuestError(message),
                DeviceError::Host { .. } => ExitReason::InternalError(message),
            });
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let ending = Ending::new();
        assert_eq!(ending.reason(), None);
        ending.failure_sink()(DeviceError::Guest {
            device: "virtio-test",
            what: "a loop".into(),
        });
        ending.end(ExitReason::Killed);
        assert!(matches!(ending.wait(), ExitReason::GuestError(m) if m.contains("a loop")));
    }
}
