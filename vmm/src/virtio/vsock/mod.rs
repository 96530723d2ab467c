//! virtio-vsock (virtio 1.2 §5.10): stream sockets between the host and the guest.
//!
//! Only the host opens connections: through a listening unix socket on which a client says
//! `CONNECT <port>\n` and hears `OK <host port>\n`, as Firecracker's users know it, or from inside this
//! process through a [`VsockConnector`]. Of what the guest opens, a connection to
//! [`READY_PORT`](caisson_vmm_protocol::READY_PORT) or [`SETTLED_PORT`](caisson_vmm_protocol::SETTLED_PORT) counts as a
//! message ([`Knock`]); it is refused as all others are.
//!
//! One worker serves the queues and all connections, and never waits for any of them: every socket is
//! non-blocking, and each direction has the credit that §5.10.6.3 describes.

mod connection;
mod connector;
mod farewell;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handler;
mod handshake;
#[cfg(test)]
mod hostile_tests;
mod muxer;
mod packet;
mod receive;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use connector::VsockConnector;
pub use muxer::{Knock, KnockCallback, MAX_CONNECTIONS};

use connector::Requests;
use farewell::Farewell;
use handler::VsockHandler;
use muxer::Muxer;

use super::queue::Ring;
use super::worker::Worker;
use super::{Activation, DeviceError, VirtioDevice};
use crate::threads::Kind;

const NAME: &str = "virtio-vsock";
/// The device ID (virtio 1.2 §5.10.1).
const DEVICE_TYPE: u32 = 19;
/// Receive, transmit, event. Linux fills the receive ring with buffers of 4 KiB: 1 MiB of guest memory.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// `VIRTIO_VSOCK_F_STREAM`.
const VIRTIO_VSOCK_F_STREAM: u32 = 0;
/// The first context ID that may be a guest's (virtio 1.2 §5.10.4).
const FIRST_CID: u32 = 3;

/// Why there is no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context ID is reserved.
    #[error("{0} cannot be a guest's vsock context ID; use {FIRST_CID} to 4294967294")]
    BadCid(u32),
    /// The system refused something.
    #[error("the vsock device could not be set up: {0}")]
    Host(#[from] io::Error),
}

/// The vsock device.
pub struct Vsock {
    /// The guest's context ID (virtio 1.2 §5.10.4).
    config: [u8; 8],
    requests: Arc<Requests>,
    /// Here while the device is not active; the worker has it otherwise.
    muxer: Option<Muxer>,
    worker: Option<Worker<Muxer>>,
    /// The guest has connections of an earlier device.
    anew: bool,
}

impl Vsock {
    /// A device for a guest with this context ID. Clients come through `listener`, a listening unix stream
    /// socket. `knocked` is called on the device's worker, once for each [`Knock`].
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn new(
        cid: u32,
        listener: Option<OwnedFd>,
        knocked: KnockCallback,
    ) -> Result<Self, VsockError> {
        if cid < FIRST_CID || cid == u32::MAX {
            return Err(VsockError::BadCid(cid));
        }
        let requests = Requests::new()?;
        let muxer = Muxer::new(cid, listener, Arc::clone(&requests), knocked)?;
        Ok(Self {
            config: u64::from(cid).to_le_bytes(),
            requests,
            muxer: Some(muxer),
            worker: None,
            anew: false,
        })
    }

    /// Has the guest hear, once the device is active, that the connections which it has are gone. To be called before.
    pub fn begin_anew(&mut self) {
        self.anew = true;
        if let Some(muxer) = &mut self.muxer {
            muxer.use_other_ports();
        }
    }

    /// Opens connections to the guest from inside this process.
    pub fn connector(&self) -> VsockConnector {
        self.requests.connector()
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_VSOCK_F_STREAM
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            interrupt,
            queues,
            features,
            failure,
        } = activation;
        let event_index = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let guard = memory.memory();
        let mut rings = Vec::with_capacity(QUEUE_SIZES.len());
        for mut active in queues {
            active.queue.set_event_idx(event_index);
            rings.push(Ring::new(NAME, active, Arc::clone(&interrupt), &guard)?);
        }
        drop(guard);
        let mut rings = rings.into_iter();
        let (Some(receive), Some(transmit)) = (rings.next(), rings.next()) else {
            return Err(DeviceError::host(NAME)(io::ErrorKind::InvalidInput.into()));
        };
        let again = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::host(NAME))?;
        let muxer = self.muxer.take().ok_or_else(|| {
            DeviceError::host(NAME)(io::Error::other(
                "it is active already, or its worker did not come back",
            ))
        })?;
        let farewell = rings
            .next()
            .filter(|_| std::mem::take(&mut self.anew))
            .map(Farewell::new);
        let handler = VsockHandler::new(memory, receive, transmit, again, muxer).after(farewell);
        let worker =
            Worker::spawn(Kind::Vsock, NAME, handler, failure).map_err(DeviceError::host(NAME))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(muxer) = self.worker.take().and_then(Worker::stop) {
            self.muxer = Some(muxer);
        }
    }

    fn pause(&mut self) {
        if let Some(worker) = &self.worker {
            worker.pause();
        }
    }

    fn resume(&mut self) {
        if let Some(worker) = &self.worker {
            worker.resume();
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Whoever waits for a connection, or still reads one, must not wait for ever.
        self.requests.close();
        self.reset();
    }
}
