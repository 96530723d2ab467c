//! Carries frames between a tap and a pair of queues.
//!
//! A frame is read from the tap when there is one, and waits in [`Receive::frame`] while the driver has no
//! buffers for it; the tap is not polled then, and is again as soon as the frame is delivered. All polling is
//! level-triggered: no state exists in which both the tap and the ring wait for the other.

use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::super::queue::{BUDGET, Chain, Ring, Used};
use super::super::worker::{Handler, Poll};
use super::super::{DeviceError, Interrupt, Memory};
use super::tap::{HEADER, MOST, Outcome, Tap};
use super::{DEVICE, unplug};

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const TAP: u64 = 2;

/// Where the header's `num_buffers` is (virtio 1.2 §5.1.6).
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Header and the shortest frame that has a destination, a source and a type.
const LEAST: usize = HEADER + 14;

/// Both queues and the tap in service.
pub struct Frames {
    tap: Tap,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    receive: Ring,
    transmit: Ring,
    mergeable: bool,
    /// The frame that was read from the tap and not yet delivered, if `pending`.
    frame: Box<[u8]>,
    pending: usize,
    /// What is waited for on the tap; `None` once it is gone.
    polled: Option<EventSet>,
}

/// Whether a frame found buffers.
enum Delivery {
    /// It did, or it is too long for this driver and was dropped.
    Done,
    /// Not yet. The driver notifies when it adds some, unless it did just now.
    NoBuffers {
        /// Whether it did just now.
        more_came: bool,
    },
}

impl Frames {
    /// Takes everything into service. The rings are receive and transmit.
    pub fn new(
        tap: Tap,
        memory: Memory,
        interrupt: Arc<dyn Interrupt>,
        (receive, transmit): (Ring, Ring),
        features: u64,
    ) -> Self {
        Self {
            tap,
            memory,
            interrupt,
            receive,
            transmit,
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            frame: vec![0; HEADER + MOST].into_boxed_slice(),
            pending: 0,
            polled: None,
        }
    }

    /// Carries frames from the tap to the guest, at most [`BUDGET`].
    fn receive(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        let mut delivered = 0;
        let wait_for = loop {
            if self.pending == 0 {
                // Frames wait in the tap, which drops what it has no room for.
                if self.receive.is_closed() {
                    break EventSet::empty();
                }
                if delivered >= BUDGET || self.polled.is_none() {
                    // Level-triggered: what is left makes the tap readable again.
                    break EventSet::IN;
                }
                match self.tap.read(&mut self.frame) {
                    Outcome::Done(n) if n >= LEAST => self.pending = n,
                    Outcome::Done(_) | Outcome::Lost => {
                        delivered += 1;
                        continue;
                    }
                    Outcome::Later => break EventSet::IN,
                    Outcome::Gone => {
                        self.tap_is_gone(poll)?;
                        break EventSet::empty();
                    }
                }
            }
            match self.deliver(&memory)? {
                Delivery::Done => {
                    self.receive.spend(self.pending);
                    self.pending = 0;
                    delivered += 1;
                }
                Delivery::NoBuffers { more_came: false } => break EventSet::empty(),
                Delivery::NoBuffers { more_came: true } if delivered >= BUDGET => {
                    self.receive.notify_self();
                    break EventSet::empty();
                }
                Delivery::NoBuffers { more_came: true } => delivered += 1,
            }
        };
        self.receive.signal(&memory)?;
        self.poll_tap(poll, wait_for)
    }

    /// Delivers the pending frame to as many chains as it takes (§5.1.6.4), if they are there.
    fn deliver(&mut self, memory: &GuestMemoryMmap) -> Result<Delivery, DeviceError> {
        let len = self.pending;
        let mut chains: Vec<Chain<'_>> = Vec::new();
        let mut room = 0;
        while room < len {
            // One chain must do without VIRTIO_NET_F_MRG_RXBUF, and no more than the queue has can ever come.
            let most = if self.mergeable {
                self.receive.size()
            } else {
                1
            };
            if chains.len() == usize::from(most) {
                // The driver's buffers are too small for this frame, now and for ever.
                self.receive.unpop(most);
                return Ok(Delivery::Done);
            }
            let Some(chain) = self.receive.pop(memory)? else {
                // Before the chains go back: what the driver is to tell us of is what comes behind them.
                let more_came = self.receive.enable_notification(memory)?;
                // Fewer than the queue's size, which is a u16.
                self.receive.unpop(chains.len() as u16);
                return Ok(Delivery::NoBuffers { more_came });
            };
            room += chain.writable.len();
            chains.push(chain);
        }
        let count = chains.len() as u16;
        self.frame[NUM_BUFFERS].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.frame[..len];
        let used: Vec<_> = chains
            .into_iter()
            .map(|mut chain| {
                let n = chain.writable.write(rest);
                rest = &rest[n..];
                // At most a frame's length.
                Used {
                    head: chain.head,
                    len: n as u32,
                }
            })
            .collect();
        self.receive.push_all(memory, &used)?;
        Ok(Delivery::Done)
    }

    /// Carries frames from the guest to the tap, at most [`BUDGET`], so that receiving has its turn.
    fn transmit(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        let (tap, polled) = (&self.tap, self.polled);
        let mut gone = false;
        self.transmit.serve(&memory, |chain| {
            let len = chain.readable.len();
            // A frame of a length that cannot be is lost; so is every frame once the tap is gone.
            if polled.is_some() && !gone && (LEAST..=HEADER + MOST).contains(&len) {
                gone = tap.write(&chain.readable) == Outcome::Gone;
            }
            Ok(0)
        })?;
        if gone {
            self.tap_is_gone(poll)?;
        }
        Ok(())
    }

    /// Waits for `events` on the tap.
    fn poll_tap(&mut self, poll: &Poll, events: EventSet) -> Result<(), DeviceError> {
        if let Some(polled) = &mut self.polled
            && *polled != events
        {
            poll.modify(self.tap.fd(), TAP, events)
                .map_err(DeviceError::host(DEVICE))?;
            *polled = events;
        }
        Ok(())
    }

    /// Forgets the tap: its descriptor would be ready for ever. The guest sees the link go down.
    fn tap_is_gone(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        if self.polled.take().is_some() {
            poll.remove(self.tap.fd())
                .map_err(DeviceError::host(DEVICE))?;
            unplug(self.interrupt.as_ref())?;
        }
        Ok(())
    }
}

impl From<Frames> for Tap {
    fn from(frames: Frames) -> Self {
        frames.tap
    }
}

impl Handler for Frames {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        for (fd, token) in [
            (self.receive.notify_fd(), RECEIVE),
            (self.transmit.notify_fd(), TRANSMIT),
            (self.tap.fd(), TAP),
        ] {
            poll.add(fd, token, EventSet::IN)
                .map_err(DeviceError::host(DEVICE))?;
        }
        self.polled = Some(EventSet::IN);
        self.transmit(poll)?;
        self.receive(poll)
    }

    fn handle(&mut self, token: u64, ready: EventSet, poll: &Poll) -> Result<(), DeviceError> {
        match token {
            RECEIVE => {
                self.receive.take_notification();
                self.receive(poll)
            }
            TRANSMIT => {
                self.transmit.take_notification();
                self.transmit(poll)
            }
            // Reported whether asked for or not, so the descriptor must go or the worker spins.
            _ if ready.intersects(EventSet::ERROR | EventSet::HANG_UP) => self.tap_is_gone(poll),
            _ => self.receive(poll),
        }
    }

    fn due(&self) -> Option<Instant> {
        let due = [self.receive.due(), self.transmit.due()];
        due.into_iter().flatten().min()
    }

    fn go_on(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        self.transmit(poll)?;
        self.receive(poll)
    }
}
