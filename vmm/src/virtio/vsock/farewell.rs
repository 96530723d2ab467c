//! The end of connections that only an earlier device knew (virtio 1.2 §5.10.6.7).
//!
//! The guest of a machine that was restored has connections that nobody else has any more. It is told so by an event, and
//! resets all that it has. So before it has taken that in, it must be asked for no new one. It says that it has by giving the
//! event's buffer back.

use vm_memory::GuestMemoryMmap;

use super::NAME;
use crate::virtio::DeviceError;
use crate::virtio::queue::{Ring, Used};

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, a le32.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// How far the guest is.
enum Step {
    /// It is to be told.
    Due,
    /// It has been told, while it had so many other buffers in the ring.
    Told(u16),
    /// It has heard.
    Over,
}

/// Tells the guest.
pub struct Farewell {
    events: Ring,
    step: Step,
}

impl Farewell {
    /// What is to be told through this ring, the device's third.
    pub fn new(events: Ring) -> Self {
        Self {
            events,
            step: Step::Due,
        }
    }

    /// The ring.
    pub fn events(&self) -> &Ring {
        &self.events
    }

    /// Goes as far as the guest allows. True once it has heard.
    ///
    /// # Errors
    /// The guest's fault: a malformed ring, or a buffer that no event fits into.
    pub fn go_on(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        loop {
            match self.step {
                Step::Over => return Ok(true),
                Step::Due => self.tell(memory)?,
                Step::Told(others) => self.listen(memory, others)?,
            }
            // What came in between is not notified.
            if !matches!(self.step, Step::Over) && !self.events.enable_notification(memory)? {
                return Ok(false);
            }
        }
    }

    fn tell(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        let Some(mut chain) = self.events.pop(memory)? else {
            return Ok(());
        };
        let room = chain.writable.len();
        if room < TRANSPORT_RESET.len() {
            return Err(DeviceError::Guest {
                device: NAME,
                what: format!("an event buffer has only {room} bytes"),
            });
        }
        chain.writable.write(&TRANSPORT_RESET);
        // The next that is there is then the one that comes back.
        let mut others = 0;
        while self.events.pop(memory)?.is_some() {
            others += 1;
        }
        let used = Used {
            head: chain.head,
            len: TRANSPORT_RESET.len() as u32,
        };
        self.events.push(memory, used)?;
        self.events.signal(memory)?;
        self.step = Step::Told(others);
        Ok(())
    }

    fn listen(&mut self, memory: &GuestMemoryMmap, others: u16) -> Result<(), DeviceError> {
        if self.events.pop(memory)?.is_some() {
            self.events.unpop(others + 1);
            self.step = Step::Over;
        }
        Ok(())
    }
}
