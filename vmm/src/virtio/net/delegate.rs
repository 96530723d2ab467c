//! Has the host's kernel carry the frames ([`Vhost`]), and looks after what is left to do here: to begin, to park, to end,
//! and to hear of a tap that is gone and of rings that cannot be used.
//!
//! The driver's notifications go from KVM to the kernel's thread, and its interrupts back, without this process.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::worker::{Handler, Poll};
use super::super::{Activation, ActiveQueue, DeviceError, Interrupt, Memory};
use super::tap::Tap;
use super::vhost::{Events, Refused, Vhost};
use super::{DEVICE, unplug};

const BROKEN: u64 = 0;

/// How often it is looked whether the tap is still there. The tap wakes who waits for its end with the same words as who
/// waits for frames, and to be woken for each frame is what the kernel's service saves.
const LOOK: Duration = Duration::from_secs(5);

/// What a device is made of whose frames the kernel carries.
pub struct Plug {
    pub tap: Tap,
    pub vhost: Vhost,
}

/// Both queues in the kernel's service.
pub struct Delegate {
    plug: Plug,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    /// Receive, then transmit, as the kernel numbers them, too.
    queues: Vec<ActiveQueue>,
    features: u64,
    call: EventFd,
    broken: EventFd,
    /// When to look for the tap again; `None`: there is none.
    look: Option<Instant>,
}

/// What goes with the queues of an activation.
pub struct Lines {
    call: EventFd,
    broken: EventFd,
}

impl Lines {
    /// The events by which the kernel speaks to driver and device.
    ///
    /// # Errors
    /// What the system says when it has no more of them.
    pub fn new(interrupt: &dyn Interrupt) -> Result<Self, DeviceError> {
        Ok(Self {
            call: interrupt.by_kernel().map_err(DeviceError::host(DEVICE))?,
            broken: EventFd::new(EFD_NONBLOCK).map_err(DeviceError::host(DEVICE))?,
        })
    }
}

impl Delegate {
    /// Takes everything; [`Handler::start`] hands it to the kernel.
    pub fn new(plug: Plug, activation: Activation, lines: Lines) -> Self {
        Self {
            plug,
            memory: activation.memory,
            interrupt: activation.interrupt,
            queues: activation.queues,
            features: activation.features,
            call: lines.call,
            broken: lines.broken,
            look: None,
        }
    }

    fn attach(&self) -> Result<(), DeviceError> {
        for (index, queue) in self.queues.iter().enumerate() {
            let tap = Some(self.plug.tap.fd());
            self.plug.vhost.attach(index, tap).map_err(refused)?;
            // What the driver put there before is looked for now.
            queue.notify.write(1).map_err(DeviceError::host(DEVICE))?;
        }
        Ok(())
    }

    fn detach(&self) -> Result<(), DeviceError> {
        for index in 0..self.queues.len() {
            self.plug.vhost.attach(index, None).map_err(refused)?;
        }
        Ok(())
    }

    /// Whether there is a tap. One that is gone is let go, and the guest sees the link go down.
    fn is_plugged(&mut self) -> Result<bool, DeviceError> {
        if self.look.is_none() || self.plug.tap.is_there() {
            return Ok(self.look.is_some());
        }
        self.look = None;
        self.detach()?;
        unplug(self.interrupt.as_ref())?;
        Ok(false)
    }
}

impl Handler for Delegate {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        let vhost = &mut self.plug.vhost;
        vhost.set_up(self.features, &memory).map_err(refused)?;
        for (index, active) in self.queues.iter().enumerate() {
            let events = Events {
                kick: &active.notify,
                call: &self.call,
                broken: &self.broken,
            };
            let set = vhost.set_ring(index, &active.queue, &memory, &events);
            if set.map_err(refused)?.is_none() {
                return Err(guest("its rings are not in guest memory"));
            }
        }
        let fd = self.broken.as_raw_fd();
        poll.add(fd, BROKEN, EventSet::IN)
            .map_err(DeviceError::host(DEVICE))?;
        self.look = Some(Instant::now() + LOOK);
        self.attach()
    }

    fn handle(&mut self, _: u64, _: EventSet, _: &Poll) -> Result<(), DeviceError> {
        self.broken.read().map_err(DeviceError::host(DEVICE))?;
        // Without a tap there is no carrying frames, which is not the driver's doing.
        match self.is_plugged()? {
            true => Err(guest("its rings cannot be followed")),
            false => Ok(()),
        }
    }

    fn due(&self) -> Option<Instant> {
        self.look
    }

    fn go_on(&mut self, _: &Poll) -> Result<(), DeviceError> {
        if self.is_plugged()? {
            self.look = Some(Instant::now() + LOOK);
        }
        Ok(())
    }

    fn park(&mut self) -> Result<(), DeviceError> {
        self.detach()
    }

    fn unpark(&mut self) -> Result<(), DeviceError> {
        if self.look.is_some() {
            self.attach()?;
        }
        Ok(())
    }
}

impl From<Delegate> for Plug {
    fn from(delegate: Delegate) -> Self {
        for index in 0..delegate.queues.len() {
            // The kernel refuses it to those alone who do not own the device, and then it serves nothing.
            let _ = delegate.plug.vhost.release(index);
        }
        delegate.plug
    }
}

fn refused(refused: Refused) -> DeviceError {
    DeviceError::host(DEVICE)(std::io::Error::other(refused))
}

fn guest(what: &str) -> DeviceError {
    DeviceError::Guest {
        device: DEVICE,
        what: what.into(),
    }
}
