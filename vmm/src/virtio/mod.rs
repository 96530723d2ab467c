//! Virtio devices (virtio 1.2), one folder each, and what they share.
//!
//! A device knows nothing of its transport: it states its type, features, configuration space and queue
//! sizes ([`VirtioDevice`]), and when the driver is ready it gets memory, interrupt and queues in one
//! argument ([`Activation`]). From then on its own [`worker::Worker`] thread serves it.
//!
//! Everything read from guest memory is hostile. A device that finds a ring it cannot go on with returns
//! [`DeviceError`]; the machine then ends with that as its reason. It never panics.

pub mod balloon;
pub mod blk;
pub mod buffers;
mod discard;
pub mod fs;
pub mod mem;
pub mod net;
pub mod queue;
mod rate;
pub mod rng;
pub mod service;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
pub mod worker;

use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory, as every device holds it.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Interrupts of one device, whatever the transport.
pub trait Interrupt: Send + Sync {
    /// Tell the driver that the queue of this index has used buffers (virtio 1.2 §2.7.7).
    ///
    /// # Errors
    /// What the kernel says of the eventfd or ioctl.
    fn queue(&self, index: u16) -> io::Result<()>;

    /// Change bytes of the configuration space, at this offset, and tell the driver (virtio 1.2 §2.5).
    ///
    /// # Errors
    /// What the kernel says of the eventfd or ioctl.
    fn config(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Change bytes of the configuration space of which the driver need not be told: it looks there by itself.
    fn config_silently(&self, offset: u64, bytes: &[u8]);

    /// An event by which the host's kernel itself tells the driver that queues have used buffers, any of them.
    ///
    /// # Errors
    /// What the kernel says when there is no descriptor for it.
    fn by_kernel(&self) -> io::Result<EventFd>;
}

/// A queue that the driver has set up, and the event by which it says that buffers are available.
pub struct ActiveQueue {
    /// The queue's index in the device.
    pub index: u16,
    /// Its rings, validated against guest memory at activation.
    pub queue: Queue,
    /// Signalled by the driver's notification (an ioeventfd).
    pub notify: EventFd,
}

/// What a device gets when its driver is ready (`DRIVER_OK`, virtio 1.2 §3.1.1).
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// The device's interrupts.
    pub interrupt: Arc<dyn Interrupt>,
    /// The device's queues in order, as many as [`VirtioDevice::queues`] says.
    pub queues: Vec<ActiveQueue>,
    /// The features both sides agreed on.
    pub features: u64,
    /// Where the worker reports that it cannot go on.
    pub failure: FailureSink,
}

/// Where a device's worker reports the error that ended it. The machine ends with it.
pub type FailureSink = Arc<dyn Fn(DeviceError) + Send + Sync>;

/// Why a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest's driver broke the rules of its ring or protocol.
    #[error("the guest's {device} driver broke the device's rules: {what}")]
    Guest {
        /// The device, such as "virtio-blk".
        device: &'static str,
        /// What was wrong.
        what: String,
    },
    /// A system call of the host failed where that cannot be told to the guest.
    #[error("{device} failed on the host: {source}")]
    Host {
        /// The device.
        device: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl DeviceError {
    /// What makes a [`DeviceError::Host`] of this device from what the system said.
    pub fn host(device: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { device, source }
    }

    /// What makes a [`DeviceError::Guest`] of this device from what was wrong.
    pub fn guest(device: &'static str) -> impl Fn(&str) -> Self {
        move |what| Self::Guest {
            device,
            what: what.into(),
        }
    }
}

/// A device behind any transport.
pub trait VirtioDevice: Send {
    /// The device's name in messages and thread names, such as "virtio-blk".
    fn name(&self) -> &'static str;

    /// The device ID (virtio 1.2 §5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// How many of its queues, from the first on, a driver sets up that has accepted these features. All, unless a
    /// feature has a queue of its own.
    fn queues(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }

    /// The features that the device offers, `VIRTIO_F_VERSION_1` among them.
    fn features(&self) -> u64;

    /// The configuration space as the driver finds it first (virtio 1.2 §2.5). What becomes of it is told by
    /// [`Interrupt::config`]; what the driver writes there is ignored.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// Starts to serve the queues on the device's worker.
    ///
    /// # Errors
    /// [`DeviceError`] where the worker cannot be started; the transport sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Stops serving and takes the resources back, so that the device can be activated again.
    fn reset(&mut self);

    /// Parks the worker between two requests; a no-op before activation.
    fn pause(&mut self);

    /// Lets a parked worker go on.
    fn resume(&mut self);
}
