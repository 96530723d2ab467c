//! The receive ring (virtio 1.2 §5.10.6.4), filled with several packets at a time.

use std::collections::VecDeque;

use vm_memory::GuestMemoryMmap;

use super::NAME;
use super::packet::{HEADER_LEN, Header};
use crate::virtio::DeviceError;
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::{Ring, Used};

/// The most chains that are taken ahead.
const MAX_TAKEN: usize = 64;

/// A chain that waits for a packet.
struct Taken<'m> {
    head: u16,
    header: Buffers<'m>,
    payload: Buffers<'m>,
}

/// The receive ring for the time of one pass: chains are taken ahead of their use, so that one system call
/// can fill many, and those that were not used are put back at the end.
pub struct ReceiveRing<'r, 'm> {
    ring: &'r mut Ring,
    mem: &'m GuestMemoryMmap,
    taken: VecDeque<Taken<'m>>,
    used: usize,
}

impl<'r, 'm> ReceiveRing<'r, 'm> {
    /// Begins a pass.
    pub fn new(ring: &'r mut Ring, mem: &'m GuestMemoryMmap) -> Self {
        Self {
            ring,
            mem,
            taken: VecDeque::new(),
            used: 0,
        }
    }

    /// Makes room for a packet, or for packets with `payload` bytes in all where there is so much.
    /// Returns the room for payload: 0 when the ring is empty.
    ///
    /// # Errors
    /// The guest's fault: a malformed ring, a buffer outside memory, or one too small for any data.
    pub fn reserve(&mut self, payload: usize) -> Result<usize, DeviceError> {
        let mut room: usize = self.taken.iter().map(|t| t.payload.len()).sum();
        while (room < payload && self.taken.len() < MAX_TAKEN) || self.taken.is_empty() {
            let Some(chain) = self.ring.pop(self.mem)? else {
                break;
            };
            let mut payload = chain.writable;
            let len = payload.len();
            let header = payload.split_front(HEADER_LEN);
            let Some(header) = header.filter(|_| !payload.is_empty()) else {
                return Err(DeviceError::Guest {
                    device: NAME,
                    what: format!("a receive buffer has only {len} bytes"),
                });
            };
            room += payload.len();
            self.taken.push_back(Taken {
                head: chain.head,
                header,
                payload,
            });
        }
        Ok(room)
    }

    /// The places of up to `len` bytes of payload, in the chains that were reserved.
    pub fn places(&self, len: usize) -> Buffers<'m> {
        let mut places = Buffers::default();
        for taken in &self.taken {
            let left = len - places.len();
            let mut payload = taken.payload.clone();
            let part = payload.split_front(left.min(payload.len()));
            places.append(part.unwrap_or_default());
        }
        places
    }

    /// Hands packets over to the driver: as many as `len` bytes, which are in their places, need; one
    /// if there are none. `header` makes the header for a packet of so many bytes.
    ///
    /// # Errors
    /// The guest's fault: a malformed ring.
    pub fn commit(
        &mut self,
        len: usize,
        mut header: impl FnMut(u32) -> Header,
    ) -> Result<(), DeviceError> {
        let mut left = len;
        while let Some(mut taken) = self.taken.pop_front() {
            // A read is far below 4 GiB: both conversions are exact.
            let part = left.min(taken.payload.len());
            taken.header.write(&header(part as u32).to_bytes());
            let used = Used {
                head: taken.head,
                len: (HEADER_LEN + part) as u32,
            };
            self.ring.push(self.mem, used)?;
            self.used += 1;
            left -= part;
            if left == 0 {
                break;
            }
        }
        Ok(())
    }

    /// The packets handed over so far.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Asks for a notification when there are buffers; true if some came in the meantime.
    ///
    /// # Errors
    /// The guest's fault: a malformed ring.
    pub fn enable_notification(&mut self) -> Result<bool, DeviceError> {
        self.ring.enable_notification(self.mem)
    }
}

impl Drop for ReceiveRing<'_, '_> {
    fn drop(&mut self) {
        // Chains are taken and used in order, so those left are the last ones popped; at most MAX_TAKEN.
        self.ring.unpop(self.taken.len() as u16);
    }
}
