//! Serves the device's queues on its worker.

use std::os::fd::AsRawFd;
use std::time::Duration;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::NAME;
use super::farewell::Farewell;
use super::muxer::Muxer;
use super::receive::ReceiveRing;
use crate::virtio::queue::{BUDGET, Ring, Used};
use crate::virtio::worker::{Handler, Poll};
use crate::virtio::{DeviceError, Memory};

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const AGAIN: u64 = 2;
const EVENTS: u64 = 3;

/// How long a device that stops waits for readers of what the guest has sent.
const PATIENCE: Duration = Duration::from_secs(2);

/// The queues and connections of an active device.
pub struct VsockHandler {
    memory: Memory,
    receive: Ring,
    transmit: Ring,
    /// What comes before all else, where the guest has connections of an earlier device.
    farewell: Option<Farewell>,
    /// Signalled by ourselves where a pass ended before the work did.
    again: EventFd,
    /// The connections.
    pub(super) muxer: Muxer,
}

impl VsockHandler {
    /// A handler for these rings. `again` is a non-blocking event of its own.
    pub fn new(
        memory: Memory,
        receive: Ring,
        transmit: Ring,
        again: EventFd,
        muxer: Muxer,
    ) -> Self {
        Self {
            memory,
            receive,
            transmit,
            farewell: None,
            again,
            muxer,
        }
    }

    /// The same, which first tells the guest that its connections are gone.
    pub fn after(self, farewell: Option<Farewell>) -> Self {
        Self { farewell, ..self }
    }

    /// Takes the guest's packets. True if some are left for the next pass.
    fn serve_transmit(&mut self) -> Result<bool, DeviceError> {
        let guard = self.memory.memory();
        let ring = &mut self.transmit;
        let mut left = BUDGET;
        loop {
            ring.disable_notification(&guard)?;
            while let Some(chain) = ring.pop(&guard)? {
                self.muxer.packet(chain.readable);
                let head = chain.head;
                ring.push(&guard, Used { head, len: 0 })?;
                left -= 1;
                if left == 0 {
                    return Ok(true);
                }
            }
            if !ring.enable_notification(&guard)? {
                return Ok(false);
            }
        }
    }

    /// Sends packets to the guest while it gives us buffers. True if more could be sent in the next pass.
    fn serve_receive(&mut self) -> Result<bool, DeviceError> {
        if !self.muxer.has_work() {
            return Ok(false);
        }
        let guard = self.memory.memory();
        let mut ring = ReceiveRing::new(&mut self.receive, &guard);
        while self.muxer.has_work() {
            if ring.used() >= BUDGET {
                return Ok(true);
            }
            // The notification for new buffers must be asked for each time that there are none, or what is
            // in line waits for ever.
            if ring.reserve(1)? == 0 && !ring.enable_notification()? {
                return Ok(false);
            }
            if ring.reserve(1)? > 0 {
                self.muxer.send_next(&mut ring)?;
            }
        }
        Ok(false)
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        if let Some(farewell) = &mut self.farewell
            && !farewell.go_on(&self.memory.memory())?
        {
            return Ok(());
        }
        let more = self.serve_transmit()?;
        let more = self.serve_receive()? || more;
        let guard = self.memory.memory();
        self.transmit.signal(&guard)?;
        self.receive.signal(&guard)?;
        if more {
            // A full counter is a wake-up that is still to be seen.
            let _ = self.again.write(1);
        }
        Ok(())
    }
}

impl From<VsockHandler> for Muxer {
    /// Ends all connections and gives the muxer back for the next activation. What the guest has sent before
    /// is passed on first.
    fn from(mut handler: VsockHandler) -> Self {
        // A ring that cannot be read has nothing to pass on; the device is stopping in any case.
        let _ = handler.serve_transmit();
        handler.muxer.stop(PATIENCE);
        handler.muxer
    }
}

impl Handler for VsockHandler {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        for (fd, token) in [
            (self.receive.notify_fd(), RECEIVE),
            (self.transmit.notify_fd(), TRANSMIT),
            (self.again.as_raw_fd(), AGAIN),
        ] {
            poll.add(fd, token, EventSet::IN)
                .map_err(DeviceError::host(NAME))?;
        }
        if let Some(farewell) = &self.farewell {
            poll.add(farewell.events().notify_fd(), EVENTS, EventSet::IN)
                .map_err(DeviceError::host(NAME))?;
        }
        self.muxer.start(poll)?;
        // The driver may have sent before we listened.
        self.serve()
    }

    fn handle(&mut self, token: u64, ready: EventSet, poll: &Poll) -> Result<(), DeviceError> {
        match token {
            RECEIVE => self.receive.take_notification(),
            TRANSMIT => self.transmit.take_notification(),
            AGAIN => {
                let _ = self.again.read();
            }
            EVENTS => {
                if let Some(farewell) = &self.farewell {
                    farewell.events().take_notification();
                }
            }
            _ => self.muxer.handle(token, ready, poll),
        }
        self.serve()
    }
}
