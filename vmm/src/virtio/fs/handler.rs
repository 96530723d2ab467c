//! Takes FUSE requests from the queues, has them served, and sees that each gets an answer.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::super::queue::{Chain, Ring};
use super::super::worker::{Handler, Poll};
use super::super::{DeviceError, Memory};
use super::identity::Identity;
use super::{DEVICE, ShareServer};

/// The size of `struct fuse_in_header` in bytes.
const IN_HEADER: usize = 40;
/// The size of `struct fuse_out_header` in bytes.
const OUT_HEADER: usize = 16;
/// The most bytes of a request, and of an answer: 1 MiB of data, which is what the server offers at
/// `FUSE_INIT`, and headers.
const MOST: usize = (1 << 20) + 4096;

/// Both queues in service.
pub struct Requests {
    server: ShareServer,
    memory: Memory,
    rings: [Ring; 2],
}

impl Requests {
    /// Takes the queues, priority and requests, into service.
    pub fn new(server: ShareServer, memory: Memory, rings: [Ring; 2]) -> Self {
        Self {
            server,
            memory,
            rings,
        }
    }

    fn serve(&mut self, ring: usize) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        let server = &self.server;
        let Some(ring) = self.rings.get_mut(ring) else {
            return Ok(());
        };
        ring.serve(&memory, |chain| answer(server, &memory, chain))
    }
}

impl From<Requests> for ShareServer {
    fn from(requests: Requests) -> Self {
        requests.server
    }
}

impl Handler for Requests {
    fn start(&mut self, poll: &Poll) -> Result<(), DeviceError> {
        Identity::take_root().map_err(DeviceError::host(DEVICE))?;
        for (token, ring) in (0u64..).zip(&self.rings) {
            poll.add(ring.notify_fd(), token, EventSet::IN)
                .map_err(DeviceError::host(DEVICE))?;
        }
        self.serve(0)?;
        self.serve(1)
    }

    fn handle(&mut self, token: u64, _: EventSet, _: &Poll) -> Result<(), DeviceError> {
        let ring = usize::from(token != 0);
        self.rings[ring].take_notification();
        self.serve(ring)
    }
}

/// Serves one request; returns how many bytes of answer were written.
fn answer(
    server: &ShareServer,
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
) -> Result<u32, DeviceError> {
    let broken = DeviceError::guest(DEVICE);
    let Some(header) = chain.readable.clone().read_array::<IN_HEADER>() else {
        return Err(broken("a request is shorter than its header"));
    };
    // These walk the chain again and check it again; from here on its buffers are fixed.
    let reader = Reader::from_descriptor_chain(memory, chain.raw.clone())
        .map_err(|e| broken(&format!("a request cannot be read: {e}")))?;
    let writer = VirtioFsWriter::new(memory, chain.raw)
        .map_err(|e| broken(&format!("a request cannot be answered: {e}")))?;
    let served = if reader.available_bytes() > MOST || writer.available_bytes() > MOST {
        None
    } else {
        // The server parses what a hostile guest sends. Should it panic, that must end this machine with a
        // reason, not a thread with none; nothing of the server is used afterwards.
        catch_unwind(AssertUnwindSafe(|| {
            server.handle_message(reader, writer.into(), None, None)
        }))
        .map_err(|_| {
            DeviceError::host(DEVICE)(io::Error::other(format!(
                "the file server panicked at a request of opcode {}",
                u32::from_le_bytes([header[4], header[5], header[6], header[7]])
            )))
        })?
        .ok()
    };
    if let Some(written) = served {
        return u32::try_from(written)
            .map_err(|_| DeviceError::host(DEVICE)(io::ErrorKind::InvalidData.into()));
    }
    // The server gives no answer to what it cannot parse. The guest waits for one, where it has room for it.
    let mut room = chain.writable;
    if room.len() < OUT_HEADER {
        return Ok(0);
    }
    let mut out = [0; OUT_HEADER];
    out[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
    out[4..8].copy_from_slice(&(-libc::EINVAL).to_le_bytes());
    out[8..].copy_from_slice(&header[8..16]); // unique
    room.write(&out);
    Ok(OUT_HEADER as u32)
}
