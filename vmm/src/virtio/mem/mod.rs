//! The memory device (virtio 1.2 §5.15): the memory by which a clone is larger than its template.
//!
//! A template that grows is booted with little memory and with this device, which has none then. Its clone has the rest of
//! its pod's memory mapped from the start, at [`layout::ADDED`](crate::arch::layout::ADDED), behind a device that wants the
//! guest to take all of it in use. Nothing is ever asked back; a guest that gives some back by itself, as Linux does
//! where it cannot use it, finds zeroes there later.
//!
//! What the guest asks for changes nothing of what it can reach: the memory is its own, in use or not. So a guest that lies
//! harms itself alone, and the account that is kept here is for the answers that the driver expects.

mod blocks;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

use std::ops::Range;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use self::blocks::Blocks;
use super::discard::discard;
use super::queue::{Chain, Ring};
use super::service::{self, Service};
use super::worker::{Handler, Poll};
use super::{Activation, DeviceError, Interrupt, Memory, VirtioDevice};
use crate::arch::layout;
use crate::threads::Kind;

const DEVICE: &str = "virtio-mem";
const QUEUE_SIZES: [u16; 1] = [64];
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (§5.15.3): there is nothing behind most of what the device could have.
const UNPLUGGED_INACCESSIBLE: u32 = 1;

/// `struct virtio_mem_config` (§5.15.4): the size, and where the fields are that change.
const CONFIG: usize = 56;
const PLUGGED_SIZE: u64 = 40;
const REQUESTED_SIZE: u64 = 48;
/// Linux takes memory in use in blocks of 128 MiB, parts of which may be missing, and none that is not whole in what is usable.
const LINUX_BLOCK: u64 = 128 << 20;

/// `struct virtio_mem_req` and `struct virtio_mem_resp` (§5.15.6.1).
const REQUEST: usize = 24;
const RESPONSE: usize = 10;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What the driver is told (§5.15.6.1), and of [`STATE`] what is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Answer {
    Ack,
    /// Not now: more than is wanted.
    Nack,
    Error,
    State(u16),
}

impl Answer {
    fn bytes(self) -> [u8; RESPONSE] {
        let (kind, state) = match self {
            Self::Ack => (0u16, 0u16),
            Self::Nack => (1, 0),
            Self::Error => (3, 0),
            Self::State(state) => (0, state),
        };
        let mut bytes = [0; RESPONSE];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

/// A memory device.
pub struct Mem {
    config: [u8; CONFIG],
    service: Service<Blocks, Requests>,
}

impl Mem {
    /// A device that is not active yet, with so many bytes at [`layout::ADDED`], which the guest has in use already if they are
    /// `plugged`.
    pub fn new(bytes: u64, plugged: bool) -> Self {
        let (start, size) = (layout::ADDED.0, layout::ADDED_BLOCK);
        Self::of(Blocks::new(start, bytes, size, plugged))
    }

    fn of(blocks: Blocks) -> Self {
        Self {
            config: config(&blocks),
            service: Service::new(Kind::Mem, DEVICE, blocks),
        }
    }
}

/// The configuration space as the driver finds it first.
fn config(blocks: &Blocks) -> [u8; CONFIG] {
    let mut config = [0; CONFIG];
    let fields = [
        (0, blocks.size()),
        // 8: a NUMA node, which there is none of.
        (16, blocks.start()),
        (24, layout::ADDED_MOST),
        (32, blocks.bytes().next_multiple_of(LINUX_BLOCK)),
        (PLUGGED_SIZE as usize, blocks.plugged_bytes()),
        (REQUESTED_SIZE as usize, blocks.bytes()),
    ];
    for (at, value) in fields {
        config[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    config
}

impl VirtioDevice for Mem {
    fn name(&self) -> &'static str {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << UNPLUGGED_INACCESSIBLE
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let [ring] = service::rings(DEVICE, &mut activation)?;
        let (memory, interrupt) = (activation.memory, activation.interrupt);
        self.service.start(activation.failure, |blocks| Requests {
            memory,
            interrupt,
            ring,
            blocks,
        })
    }

    fn reset(&mut self) {
        self.service.stop();
    }

    fn pause(&mut self) {
        self.service.pause();
    }

    fn resume(&mut self) {
        self.service.resume();
    }
}

/// The request queue in service.
struct Requests {
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    ring: Ring,
    blocks: Blocks,
}

impl From<Requests> for Blocks {
    fn from(requests: Requests) -> Self {
        requests.blocks
    }
}

impl Handler for Requests {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add(self.ring.notify_fd(), 0, EventSet::IN)
            .map_err(DeviceError::host(DEVICE))?;
        // The driver of a clone has read its template's configuration, which wanted nothing.
        let wanted = self.blocks.bytes();
        if self.blocks.plugged_bytes() < wanted {
            self.interrupt
                .config(REQUESTED_SIZE, &wanted.to_le_bytes())
                .map_err(DeviceError::host(DEVICE))?;
        }
        self.serve()
    }

    fn handle(&mut self, _: u64, _: EventSet, _: &Poll) -> Result<(), DeviceError> {
        self.ring.take_notification();
        self.serve()
    }
}

impl Requests {
    fn serve(&mut self) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        let (blocks, interrupt) = (&mut self.blocks, &self.interrupt);
        self.ring.serve(&memory, |mut chain| {
            let answer = answer(&memory, blocks, &mut chain)?;
            // Before the driver has the answer, after which it looks there.
            interrupt.config_silently(PLUGGED_SIZE, &blocks.plugged_bytes().to_le_bytes());
            // As long as the answer.
            Ok(chain.writable.write(&answer.bytes()) as u32)
        })
    }
}

/// Does what a request asks for.
fn answer(
    memory: &GuestMemoryMmap,
    blocks: &mut Blocks,
    chain: &mut Chain<'_>,
) -> Result<Answer, DeviceError> {
    let request = chain.readable.read_array::<REQUEST>();
    let request =
        request.ok_or_else(|| DeviceError::guest(DEVICE)("a request is shorter than 24 bytes"))?;
    if chain.writable.len() < RESPONSE {
        return Err(DeviceError::guest(DEVICE)(
            "there is no room for the answer to a request",
        ));
    }
    let half = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
    let (kind, count) = (half(0), half(16));
    let mut address = [0; 8];
    address.copy_from_slice(&request[8..16]);
    let address = u64::from_le_bytes(address);
    if kind == UNPLUG_ALL {
        return unplug(memory, blocks, blocks.all());
    }
    let Some(range) = blocks.range(address, count) else {
        // What may be usable ends with a block of Linux', which may be beyond what is wanted.
        let behind = kind == PLUG && blocks.plugged_bytes() == blocks.bytes();
        return Ok(if behind { Answer::Nack } else { Answer::Error });
    };
    match (kind, blocks.state(range.clone())) {
        (PLUG, Some(false)) => {
            blocks.set(range, true);
            Ok(Answer::Ack)
        }
        (UNPLUG, Some(true)) => unplug(memory, blocks, range),
        (STATE, state) => Ok(Answer::State(match state {
            Some(true) => 0,
            Some(false) => 1,
            None => 2,
        })),
        _ => Ok(Answer::Error),
    }
}

fn unplug(
    memory: &GuestMemoryMmap,
    blocks: &mut Blocks,
    range: Range<usize>,
) -> Result<Answer, DeviceError> {
    let (address, bytes) = blocks.place(&range);
    // Blocks are within what is mapped: see `Blocks::new`.
    let slices = memory.get_slices(GuestAddress(address), bytes as usize);
    for slice in slices {
        let slice =
            slice.map_err(|error| DeviceError::host(DEVICE)(std::io::Error::other(error)))?;
        discard(&slice).map_err(DeviceError::host(DEVICE))?;
    }
    blocks.set(range, false);
    Ok(Answer::Ack)
}

#[cfg(test)]
mod tests;
