//! What every device does with a queue: take a chain, serve it, hand it back, interrupt (virtio 1.2 §2.7).
//!
//! A [`Ring`] is a queue in service. [`Ring::pop`] walks a descriptor chain once, checks each descriptor
//! against guest memory, and gives the device two lists of slices ([`Chain`]): the device never sees an
//! address or a length that the guest can still change. A chain that cannot be followed (a loop, an index
//! or an address out of range) is the driver's fault and ends the machine with a [`DeviceError`].

use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use caisson_vmm_protocol::RateLimit;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::Buffers;
use super::rate::Rate;
use super::{ActiveQueue, DeviceError, Interrupt};

/// Chains that a device serves in one go before it looks for other work: a driver that makes buffers
/// available as fast as they are used must not keep a worker from its other queues, or from a pause.
pub const BUDGET: usize = 256;

/// A descriptor chain that was walked and checked, ready to be served.
#[derive(Clone, Debug)]
pub struct Chain<'m> {
    /// The index of the chain's head, by which it is handed back.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Buffers<'m>,
    /// What the device may write, in order.
    pub writable: Buffers<'m>,
    /// The chain as `virtio_queue` gives it, for code that insists on it. It reads the descriptors from
    /// guest memory again, so their lengths and addresses must be checked again.
    pub raw: DescriptorChain<&'m GuestMemoryMmap>,
}

/// A chain that was served: its head, and how many bytes the device wrote to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Used {
    /// The chain's head.
    pub head: u16,
    /// Bytes written, from the first writable byte on.
    pub len: u32,
}

/// A queue in service.
pub struct Ring {
    device: &'static str,
    index: u16,
    queue: Queue,
    notify: EventFd,
    interrupt: Arc<dyn Interrupt>,
    /// The used index when the driver was last considered for an interrupt (virtio 1.2 §2.7.10).
    considered: Wrapping<u16>,
    rate: Rate,
    /// When to go on, if the rate's limit was reached.
    due: Option<Instant>,
}

impl Ring {
    /// Takes a queue into service.
    ///
    /// # Errors
    /// [`DeviceError::Guest`] where its rings are not in guest memory.
    pub fn new(
        device: &'static str,
        active: ActiveQueue,
        interrupt: Arc<dyn Interrupt>,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, DeviceError> {
        let ring = Self {
            device,
            index: active.index,
            considered: Wrapping(active.queue.next_used()),
            queue: active.queue,
            notify: active.notify,
            interrupt,
            rate: Rate::new(RateLimit::default(), Instant::now()),
            due: None,
        };
        if ring.queue.is_valid(memory) {
            Ok(ring)
        } else {
            Err(ring.broken("its rings are not in guest memory"))
        }
    }

    /// Keeps the queue to a limit from now on. Without one it does what it can.
    pub fn limit(&mut self, limit: RateLimit) {
        self.rate = Rate::new(limit, Instant::now());
    }

    /// Whether the limit is reached; then [`Ring::due`] says when to go on.
    pub fn is_closed(&mut self) -> bool {
        self.due = if self.rate.is_limited() {
            self.rate.closed_until(Instant::now())
        } else {
            None
        };
        self.due.is_some()
    }

    /// Accounts for something that was done, with so many bytes of data.
    pub fn spend(&mut self, bytes: usize) {
        if self.rate.is_limited() {
            self.rate.spend(bytes, Instant::now());
        }
    }

    /// When the queue is to be served again though nobody notifies; `None` where its limit is not reached.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The descriptor that is readable when the driver has notified the device.
    pub fn notify_fd(&self) -> RawFd {
        self.notify.as_raw_fd()
    }

    /// Takes the driver's notification, so that the descriptor is readable only after the next.
    pub fn take_notification(&self) {
        // Not readable after all: another reader of the same event was first, and nothing is lost.
        let _ = self.notify.read();
    }

    /// Makes the notification descriptor readable, to go on later where [`BUDGET`] was used up.
    pub fn notify_self(&self) {
        // A full counter is readable as it is.
        let _ = self.notify.write(1);
    }

    /// How many descriptors the queue has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain; `None` when there is none now.
    ///
    /// # Errors
    /// [`DeviceError::Guest`] where the available index is impossible, or the chain cannot be followed.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, DeviceError> {
        let next = match self.queue.iter(memory) {
            Ok(mut available) => available.next(),
            Err(e) => return Err(self.unusable(&e)),
        };
        let Some(raw) = next else {
            return Ok(None);
        };
        let head = raw.head_index();
        let (readable, writable) = self.walk(memory, raw.clone())?;
        Ok(Some(Chain {
            head,
            readable,
            writable,
            raw,
        }))
    }

    /// Puts the last `chains` popped chains back as if they had not been popped. None of them may have been
    /// handed back with [`Ring::push`].
    pub fn unpop(&mut self, chains: u16) {
        for _ in 0..chains {
            self.queue.go_to_previous_position();
        }
    }

    /// Hands one served chain back to the driver.
    ///
    /// # Errors
    /// [`DeviceError::Guest`] where the used ring cannot be written.
    pub fn push(&mut self, memory: &GuestMemoryMmap, used: Used) -> Result<(), DeviceError> {
        self.push_all(memory, &[used])
    }

    /// Hands served chains back so that the driver sees all of them or none: a received packet that is
    /// spread over several chains must not be seen in part (virtio 1.2 §5.1.6.4).
    ///
    /// # Errors
    /// [`DeviceError::Guest`] where the used ring cannot be written.
    pub fn push_all(&mut self, memory: &GuestMemoryMmap, used: &[Used]) -> Result<(), DeviceError> {
        let Some((last, first)) = used.split_last() else {
            return Ok(());
        };
        let start = Wrapping(self.queue.next_used());
        for (i, element) in (0u16..).map(Wrapping).zip(first) {
            let slot = u64::from((start + i).0 % self.queue.size());
            let at = self.queue.used_ring() + 4 + slot * 8;
            // struct virtq_used_elem: le32 id, le32 len.
            let bytes = u64::from(element.head) | u64::from(element.len) << 32;
            memory
                .write_obj(bytes.to_le(), GuestAddress(at))
                .map_err(|e| self.unreachable(&e))?;
        }
        let skipped = u16::try_from(first.len()).map_err(|_| self.broken("too many buffers"))?;
        self.queue.set_next_used((start + Wrapping(skipped)).0);
        self.queue
            .add_used(memory, last.head, last.len)
            .map_err(|e| self.unusable(&e))
    }

    /// Interrupts the driver if it wants to hear of what was handed back since the last call.
    ///
    /// # Errors
    /// [`DeviceError`] where the ring cannot be read or the interrupt cannot be raised.
    pub fn signal(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        let now = Wrapping(self.queue.next_used());
        let before = std::mem::replace(&mut self.considered, now);
        if now == before {
            return Ok(());
        }
        // The used index must be visible before the driver's wish is read (virtio 1.2 §2.7.7.2).
        fence(Ordering::SeqCst);
        let read = |offset: u64| {
            memory
                .load::<u16>(
                    GuestAddress(self.queue.avail_ring() + offset),
                    Ordering::Relaxed,
                )
                .map(u16::from_le)
                .map_err(|e| self.unreachable(&e))
        };
        let wanted = if self.queue.event_idx_enabled() {
            let event = Wrapping(read(4 + 2 * u64::from(self.queue.size()))?);
            now - event - Wrapping(1) < now - before
        } else {
            u32::from(read(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt
                .queue(self.index)
                .map_err(DeviceError::host(self.device))?;
        }
        Ok(())
    }

    /// Asks the driver not to notify while the device is looking at the queue anyway.
    ///
    /// # Errors
    /// [`DeviceError::Guest`] where the ring cannot be written.
    pub fn disable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        self.queue
            .disable_notification(memory)
            .map_err(|e| self.unusable(&e))
    }

    /// Asks the driver to notify again. True where chains came in between, for which no notification comes.
    ///
    /// # Errors
    /// [`DeviceError::Guest`] where the ring cannot be used.
    pub fn enable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        self.queue
            .enable_notification(memory)
            .map_err(|e| self.unusable(&e))
    }

    /// Serves what is available, at most [`BUDGET`] chains, and interrupts after each. `serve` returns how
    /// many bytes it wrote to the chain. Where the budget is used up, the queue notifies itself; where its limit is
    /// reached, it waits until it is [`Ring::due`].
    ///
    /// # Errors
    /// What the ring or `serve` says.
    pub fn serve<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        mut serve: impl FnMut(Chain<'m>) -> Result<u32, DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut left = BUDGET;
        loop {
            self.disable_notification(memory)?;
            while !self.is_closed()
                && let Some(chain) = self.pop(memory)?
            {
                let (head, room) = (chain.head, chain.writable.len());
                self.spend(chain.readable.len() + room);
                let len = serve(chain)?;
                debug_assert!(len as usize <= room, "more than there is room for");
                self.push(memory, Used { head, len })?;
                self.signal(memory)?;
                left -= 1;
                if left == 0 {
                    // The driver must notify again, or what comes once we have caught up is never seen.
                    self.enable_notification(memory)?;
                    self.notify_self();
                    return Ok(());
                }
            }
            // Of a closed queue nobody needs to be told: it is served when it is due.
            if self.due.is_some() || !self.enable_notification(memory)? {
                return Ok(());
            }
        }
    }

    /// Walks a chain once. `virtio_queue` ends a chain that it cannot follow as if it were complete; what
    /// tells the two apart is whether the last descriptor it gave names a next one.
    fn walk<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Result<(Buffers<'m>, Buffers<'m>), DeviceError> {
        let mut readable = Buffers::default();
        let mut writable = Buffers::default();
        let mut count = 0;
        let mut whole = false;
        for descriptor in chain {
            count += 1;
            if count > self.queue.size() {
                // Also through an indirect table (virtio 1.2 §2.7.5.3.1).
                return Err(self.broken("a descriptor chain is longer than its queue"));
            }
            whole = !descriptor.has_next();
            let into = if descriptor.is_write_only() {
                &mut writable
            } else {
                &mut readable
            };
            let len = descriptor.len() as usize;
            for slice in memory.get_slices(descriptor.addr(), len) {
                into.push_back(slice.map_err(|e| self.unreachable(&e))?);
            }
        }
        if whole {
            Ok((readable, writable))
        } else {
            Err(self.broken("a descriptor chain loops, or names a descriptor that is not there"))
        }
    }

    fn broken(&self, what: &str) -> DeviceError {
        DeviceError::Guest {
            device: self.device,
            what: format!("queue {}: {what}", self.index),
        }
    }

    fn unusable(&self, error: &QueueError) -> DeviceError {
        self.broken(&error.to_string())
    }

    fn unreachable(&self, error: &GuestMemoryError) -> DeviceError {
        self.broken(&format!("a buffer or ring is not in guest memory: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddressSpace;

    use super::super::testing::{Desc, Driver, memory};
    use super::*;

    fn ring(driver: &Driver) -> Ring {
        driver.ring("test")
    }

    fn message(result: Result<Option<Chain<'_>>, DeviceError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_chain_comes_as_slices_and_goes_back_with_its_length() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        let mem = &*memory.memory();
        mem.write_slice(b"hello", GuestAddress(0x8000)).unwrap();
        driver.add(&[
            Desc::read(0x8000, 5),
            Desc::write(0x9000, 3),
            Desc::write(0xa000, 2),
        ]);
        let mut ring = ring(&driver);
        let mut chain = ring.pop(mem).unwrap().unwrap();
        let mut got = [0; 5];
        assert_eq!(chain.readable.read(&mut got), 5);
        assert_eq!(&got, b"hello");
        assert_eq!(chain.writable.len(), 5);
        assert_eq!(chain.writable.write(b"abcdef"), 5);
        ring.push(
            mem,
            Used {
                head: chain.head,
                len: 5,
            },
        )
        .unwrap();
        assert_eq!(driver.used(), vec![(0, 5)]);
        assert_eq!(driver.bytes(0x9000, 3), b"abc");
        assert_eq!(driver.bytes(0xa000, 2), b"de");
        assert!(ring.pop(mem).unwrap().is_none());
    }

    #[test]
    fn an_indirect_chain_is_followed() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.add_indirect(0xb000, &[Desc::read(0x8000, 16), Desc::write(0x9000, 7)]);
        let chain_memory = memory.memory();
        let chain = ring(&driver).pop(&chain_memory).unwrap().unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (16, 7));
    }

    // must-test: a malformed available index answered with unwrap()
    #[test]
    fn an_available_index_beyond_the_queue_is_the_guests_fault() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.set_available_index(9);
        let text = message(ring(&driver).pop(&memory.memory()));
        assert!(text.contains("available ring index"), "{text}");
    }

    #[test]
    fn a_looping_chain_is_the_guests_fault() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.add_raw(&[(0x8000, 1, 1, 1), (0x8000, 1, 1, 0)]);
        let text = message(ring(&driver).pop(&memory.memory()));
        assert!(text.contains("loops"), "{text}");
    }

    #[test]
    fn a_head_or_next_index_out_of_range_is_the_guests_fault() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.make_available(8);
        assert!(message(ring(&driver).pop(&memory.memory())).contains("not there"));
        let driver = Driver::new(&memory, 8);
        driver.add_raw(&[(0x8000, 1, 1, 77)]);
        assert!(message(ring(&driver).pop(&memory.memory())).contains("not there"));
    }

    // must-test: a descriptor's bounds not checked against guest memory (Firecracker CVE-2019-18960)
    #[test]
    fn a_buffer_outside_memory_is_the_guests_fault() {
        let memory = memory();
        for (address, len) in [
            (u64::MAX - 2, 1),
            (u64::MAX, 16),
            (0x10_0000 - 1, 2),
            (0x8000, u32::MAX),
        ] {
            let driver = Driver::new(&memory, 8);
            driver.add(&[Desc::write(address, len)]);
            let text = message(ring(&driver).pop(&memory.memory()));
            assert!(text.contains("not in guest memory"), "{text}");
        }
    }

    #[test]
    fn an_indirect_chain_longer_than_the_queue_is_the_guests_fault() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.add_indirect(0xb000, &[Desc::read(0x8000, 1); 9]);
        assert!(message(ring(&driver).pop(&memory.memory())).contains("longer than its queue"));
    }

    #[test]
    fn a_nested_indirect_table_is_the_guests_fault() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        driver.add_indirect(0xb000, &[Desc::read(0x8000, 1)]);
        driver.write_descriptor_at(0xb000, (0xb000, 16, 4, 0));
        assert!(message(ring(&driver).pop(&memory.memory())).contains("not there"));
    }

    #[test]
    fn chains_pushed_together_are_published_together() {
        let memory = memory();
        let driver = Driver::new(&memory, 4);
        let mem = &*memory.memory();
        let mut ring = ring(&driver);
        // Twice around the ring, so that the elements wrap.
        for round in 0..4u32 {
            let used: Vec<_> = (0..3).map(|head| Used { head, len: round }).collect();
            ring.push_all(mem, &used).unwrap();
            assert_eq!(driver.used_index(), 3 * (round as u16 + 1));
            assert_eq!(
                driver.last_used(3),
                vec![(0, round), (1, round), (2, round)]
            );
        }
    }

    #[test]
    fn interrupts_follow_the_drivers_wish() {
        let memory = memory();
        let driver = Driver::new(&memory, 8);
        let mem = &*memory.memory();
        let mut ring = ring(&driver);
        let used = Used { head: 0, len: 0 };
        ring.signal(mem).unwrap();
        assert_eq!(driver.interrupts(), 0, "nothing was used");
        ring.push(mem, used).unwrap();
        ring.signal(mem).unwrap();
        assert_eq!(driver.interrupts(), 1);
        driver.set_available_flags(1);
        ring.push(mem, used).unwrap();
        ring.signal(mem).unwrap();
        assert_eq!(driver.interrupts(), 1, "the driver wants none");

        let driver = Driver::new(&memory, 8);
        let mut ring = driver.ring_with_event_index("test");
        driver.set_used_event(2);
        ring.push_all(mem, &[used, used]).unwrap();
        ring.signal(mem).unwrap();
        assert_eq!(driver.interrupts(), 0, "index 2 is not reached");
        ring.push_all(mem, &[used, used, used]).unwrap();
        ring.signal(mem).unwrap();
        assert_eq!(driver.interrupts(), 1, "passed in the middle of a batch");
    }

    #[test]
    fn a_used_up_budget_goes_on_later() {
        let memory = memory();
        let driver = Driver::new(&memory, 256);
        for _ in 0..256 {
            driver.add(&[Desc::read(0x8000, 1)]);
        }
        let mem = &*memory.memory();
        let mut ring = ring(&driver);
        let mut served = 0;
        ring.serve(mem, |_| {
            served += 1;
            Ok(0)
        })
        .unwrap();
        assert_eq!(served, BUDGET);
        assert_eq!(driver.used_index(), 256);
        assert!(driver.notified(), "the ring notified itself");
    }
}
