//! The end of a machine that is to be a template.

use std::fs::File;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use super::{Image, TemplateError};
use crate::vm::Machine;

/// How often it is looked whether the machine has ended by itself.
const LOOK: Duration = Duration::from_millis(100);
/// What the guest is given after its last word to come to rest. Nothing depends on it: what is under way when the machine
/// is parked goes on in each clone.
const REST: Duration = Duration::from_millis(200);

/// What makes a template of a machine that runs.
pub struct Making {
    image: Image,
    state: File,
    settled: Receiver<()>,
}

impl Making {
    /// To write `image` and `state` once there is a message in `settled`.
    pub fn new(image: Image, state: File, settled: Receiver<()>) -> Self {
        Self {
            image,
            state,
            settled,
        }
    }

    /// Waits until the guest is settled, parks the machine and writes it down. False where it has ended before.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn finish(mut self, machine: &Machine) -> Result<bool, TemplateError> {
        loop {
            match self.settled.recv_timeout(LOOK) {
                Ok(()) => break,
                _ if machine.ending().reason().is_some() => return Ok(false),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(TemplateError::State(
                        "the machine has no vsock device, so nobody says when it is settled".into(),
                    ));
                }
            }
        }
        std::thread::sleep(REST);
        let state = machine.save()?;
        if machine.ending().reason().is_some() {
            return Ok(false);
        }
        self.image.write().map_err(super::file("memory"))?;
        state.write(&mut self.state)?;
        self.state.sync_all().map_err(super::file("state"))?;
        Ok(true)
    }
}
