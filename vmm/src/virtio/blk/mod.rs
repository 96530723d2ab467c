//! The block device (virtio 1.2 §5.2) on a raw image: a regular file or a host block device; or on image layers side
//! by side ([`Layers`]), which come while the machine runs.
//!
//! The format is raw because it was stated to be, never because the content looks like it. Requests are
//! served one after another on the device's worker, so no two can have the same buffers in flight. What the
//! host cannot do (a full disk, a bad sector) is an I/O error for the guest, never the end of the machine.

mod disk;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod layers;
mod request;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use caisson_vmm_protocol::RateLimit;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use self::disk::Disk;
pub use self::disk::DiskError;
pub use self::layers::{LayerError, Layers};
use super::queue::Ring;
use super::service::{self, Service};
use super::worker::{Handler, Poll};
use super::{Activation, DeviceError, Memory, VirtioDevice};
use crate::threads::Kind;

const DEVICE: &str = "virtio-blk";
const QUEUE_SIZES: [u16; 1] = [256];

/// The unit of the device's addresses and sizes, in bytes (§5.2.4).
const SECTOR: u64 = 512;
/// Ranges in one discard or write-zeroes request.
const MOST_RANGES: u32 = 16;
/// Sectors in one range of a discard: 1 GiB.
const MOST_DISCARDED: u32 = 1 << 21;
/// Sectors in one range of a write-zeroes: 4 MiB, since a host file system may make us write each.
const MOST_ZEROED: u32 = 1 << 13;

/// A block device.
pub struct Block {
    config: [u8; 60],
    read_only: bool,
    limit: RateLimit,
    service: Service<Disk, Requests>,
}

impl Block {
    /// A device on a regular file or block device. Its capacity is the file's size in whole sectors, now.
    /// `serial` is what `VIRTIO_BLK_T_GET_ID` answers: 1 to 20 ASCII bytes.
    ///
    /// # Errors
    /// [`DiskError`] where the descriptor is neither, is not open as needed, or the serial is not good.
    pub fn new(file: OwnedFd, serial: &str, read_only: bool) -> Result<Self, DiskError> {
        Ok(Self::with(Disk::new(file, serial, read_only)?))
    }

    /// A read-only device on image layers, those that are there and those that come.
    ///
    /// # Errors
    /// [`DiskError::Serial`] where the serial is not good.
    pub fn of_layers(layers: Arc<Layers>, serial: &str) -> Result<Self, DiskError> {
        Ok(Self::with(Disk::of_layers(layers, serial)?))
    }

    /// The same device, which does no more than this.
    #[must_use]
    pub fn limited(self, limit: RateLimit) -> Self {
        Self { limit, ..self }
    }

    fn with(disk: Disk) -> Self {
        Self {
            config: config(disk.sectors()),
            read_only: disk.read_only(),
            limit: RateLimit::default(),
            service: Service::new(Kind::Block, DEVICE, disk),
        }
    }
}

/// `struct virtio_blk_config` (§5.2.4).
fn config(sectors: u64) -> [u8; 60] {
    let mut space = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    // All but the header and the status of the longest chain.
    put(12, &(u32::from(QUEUE_SIZES[0]) - 2).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(36, &MOST_DISCARDED.to_le_bytes());
    put(40, &MOST_RANGES.to_le_bytes());
    put(44, &1u32.to_le_bytes()); // discard_sector_alignment
    put(48, &MOST_ZEROED.to_le_bytes());
    put(52, &MOST_RANGES.to_le_bytes());
    put(56, &[1]); // write_zeroes_may_unmap
    space
}

impl VirtioDevice for Block {
    fn name(&self) -> &'static str {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.read_only {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let [mut ring] = service::rings(DEVICE, &mut activation)?;
        ring.limit(self.limit);
        let memory = activation.memory;
        self.service
            .start(activation.failure, |disk| Requests { memory, ring, disk })
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
    ring: Ring,
    disk: Disk,
}

impl From<Requests> for Disk {
    fn from(requests: Requests) -> Self {
        requests.disk
    }
}

impl Handler for Requests {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        poll.add(self.ring.notify_fd(), 0, EventSet::IN)
            .map_err(DeviceError::host(DEVICE))?;
        self.serve()
    }

    fn handle(&mut self, _: u64, _: EventSet, _: &Poll) -> Result<(), DeviceError> {
        self.ring.take_notification();
        self.serve()
    }

    fn due(&self) -> Option<Instant> {
        self.ring.due()
    }

    fn go_on(&mut self, _: &Poll) -> Result<(), DeviceError> {
        self.serve()
    }
}

impl Requests {
    fn serve(&mut self) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        let disk = &self.disk;
        self.ring
            .serve(&memory, |chain| request::serve(disk, chain))
    }
}

#[cfg(test)]
mod tests;
