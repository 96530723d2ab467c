//! A guest whose driver does what an input says: what a good driver does, and everything else.

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::input::Input;
use crate::virtio::queue::Ring;
use crate::virtio::worker::{Handler, Poll};
use crate::virtio::{ActiveQueue, DeviceError, Interrupt, Memory};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Memory is here, and behind a hole, as on a machine with much of it.
const LOW: u64 = 0x2_0000;
/// That part.
pub const HIGH: u64 = 0x4_0000;
/// Its bytes.
pub const HIGH_LEN: usize = 0x1_0000;
/// The rings of a queue take so much, from address 0 on. What a good driver gives lies behind all of them.
const STRIDE: u64 = 0x3000;
const BUFFERS: u64 = 0x1_0000;
/// Steps of an input; what is behind them is not looked at.
const MOST_STEPS: usize = 96;
/// More turns than any work takes that an input can make: a worker that is still busy then is so for ever.
const MOST_TURNS: usize = 4000;

/// Interrupts that go nowhere.
pub struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn queue(&self, _: u16) -> io::Result<()> {
        Ok(())
    }

    fn config(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn config_silently(&self, _: u64, _: &[u8]) {}

    fn by_kernel(&self) -> io::Result<EventFd> {
        EventFd::new(EFD_NONBLOCK)
    }
}

/// A device in service.
pub trait Device {
    /// What serves it.
    type Handler: Handler;

    /// What serves it.
    fn handler(&mut self) -> &mut Self::Handler;

    /// A step of the device's own: a request of its protocol, or something that happens on the host.
    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>);

    /// Panics where something is wrong that must not be, whatever the guest did.
    fn check(&mut self) {}
}

struct Driver {
    base: u64,
    size: u16,
    notify: EventFd,
    descriptor: u16,
    available: u16,
}

impl Driver {
    fn available_ring(&self) -> u64 {
        self.base + 0x1000
    }
}

/// The guest.
pub struct Guest {
    /// Its memory.
    pub memory: Memory,
    drivers: Vec<Driver>,
    poll: Poll,
    /// Where the next buffer of a good driver is.
    next: u64,
}

impl Guest {
    /// A guest with one queue for each size, which `input` makes smaller, and the queues in service.
    pub fn new<const N: usize>(
        device: &'static str,
        event_index: bool,
        sizes: [u16; N],
        input: &mut Input<'_>,
    ) -> (Self, [Ring; N]) {
        let map = GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), LOW as usize),
            (GuestAddress(HIGH), HIGH_LEN),
        ])
        .expect("memory");
        let memory = Memory::new(map);
        let selected = input.byte();
        let drivers: Vec<_> = (0u64..)
            .zip(sizes)
            .map(|(index, most)| Driver {
                base: STRIDE * index,
                size: [16, 4, 1, 32][usize::from(selected >> (2 * index)) & 3].min(most),
                notify: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
                descriptor: 0,
                available: 0,
            })
            .collect();
        let rings = std::array::from_fn(|index| {
            let driver = &drivers[index];
            let mut queue = Queue::new(driver.size).expect("a size that is a power of two");
            let at = |address: u64| (Some(address as u32), Some(0));
            let (low, high) = at(driver.base);
            queue.set_desc_table_address(low, high);
            let (low, high) = at(driver.available_ring());
            queue.set_avail_ring_address(low, high);
            let (low, high) = at(driver.base + 0x2000);
            queue.set_used_ring_address(low, high);
            queue.set_event_idx(event_index);
            queue.set_ready(true);
            let active = ActiveQueue {
                index: index as u16,
                queue,
                notify: driver.notify.try_clone().expect("a second handle"),
            };
            Ring::new(device, active, Arc::new(NoInterrupt), &memory.memory())
                .expect("rings that are in memory")
        });
        let guest = Self {
            memory,
            drivers,
            poll: Poll::new().expect("an epoll"),
            next: BUFFERS,
        };
        (guest, rings)
    }

    /// What a handler waits with.
    pub fn poll(&self) -> &Poll {
        &self.poll
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        // Where there is no memory a guest's own write goes nowhere.
        let _ = self.memory.memory().write(bytes, GuestAddress(address));
    }

    fn write_descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(at, &bytes);
    }

    /// Makes a chain available: addresses, lengths and whether the device writes there.
    fn chain(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) {
        let driver = &self.drivers[queue];
        let head = driver.descriptor;
        let at = |n: usize| (usize::from(head) + n) as u16 % driver.size;
        for (n, (address, len, write)) in buffers.iter().enumerate() {
            let last = n + 1 == buffers.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let slot = driver.base + 16 * u64::from(at(n));
            self.write_descriptor(slot, *address, *len, flags, at(n + 1));
        }
        let next = at(buffers.len());
        self.drivers[queue].descriptor = next;
        self.make_available(queue, head);
    }

    /// Room for bytes of a good driver, which are gone when its memory has been used up once.
    fn room(&mut self, len: u32) -> u64 {
        if self.next + u64::from(len) > LOW {
            self.next = BUFFERS;
        }
        let at = self.next;
        self.next = (self.next + u64::from(len)).min(LOW).next_multiple_of(8);
        at
    }

    /// A request as a good driver makes it: bytes that the device reads, then room for what it writes, each in
    /// buffers of their own.
    pub fn request(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) {
        let mut buffers = Vec::new();
        for bytes in readable {
            // An input has fewer bytes than memory.
            let len = bytes.len() as u32;
            let at = self.room(len);
            self.put(at, bytes);
            buffers.push((at, len, false));
        }
        for len in writable {
            buffers.push((HIGH, *len, true));
        }
        self.chain(queue, &buffers);
        self.notify(queue);
    }

    /// As [`Guest::request`], with so many more bytes at the end that the device reads, whatever they are.
    pub fn request_with(&mut self, queue: usize, head: &[u8], more: u32) {
        let at = self.room(head.len() as u32);
        self.put(at, head);
        self.chain(
            queue,
            &[(at, head.len() as u32, false), (HIGH, more, false)],
        );
        self.notify(queue);
    }

    fn make_available(&mut self, queue: usize, head: u16) {
        let driver = &mut self.drivers[queue];
        let slot = u64::from(driver.available % driver.size);
        driver.available = driver.available.wrapping_add(1);
        let (ring, index) = (driver.available_ring(), driver.available);
        self.put(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.put(ring + 2, &index.to_le_bytes());
    }

    fn notify(&self, queue: usize) {
        let _ = self.drivers[queue].notify.write(1);
    }

    fn address(input: &mut Input<'_>) -> u64 {
        let (kind, value) = (input.byte(), u64::from(input.word()));
        match kind {
            0..0x80 => BUFFERS + value,
            0x80..0xc0 => HIGH + value,
            0xc0..0xe0 => value,
            0xe0..0xf0 => LOW - value % 256,
            _ => input.quad(),
        }
    }

    /// A step that any driver can make, good or not.
    fn step(&mut self, kind: u8, input: &mut Input<'_>) {
        let queue = usize::from(input.byte()) % self.drivers.len();
        let (base, size) = (self.drivers[queue].base, self.drivers[queue].size);
        match kind {
            0 => {
                let count = usize::from(input.byte() % 5) + 1;
                let mut buffers = Vec::with_capacity(count);
                for _ in 0..count {
                    let (address, len) = (Self::address(input), input.length());
                    let write = input.byte();
                    if write & 2 != 0 {
                        self.put(address, input.counted());
                    }
                    buffers.push((address, len, write & 1 != 0));
                }
                self.chain(queue, &buffers);
                self.notify(queue);
            }
            1 => {
                let slot = base + 16 * u64::from(input.word() % size);
                let (address, len) = (Self::address(input), input.length());
                self.write_descriptor(slot, address, len, input.word(), input.word());
            }
            2 => self.make_available(queue, input.word()),
            3 => {
                let index = input.word();
                self.drivers[queue].available = index;
                let ring = self.drivers[queue].available_ring();
                self.put(ring + 2, &index.to_le_bytes());
            }
            4 => {
                let address = Self::address(input);
                self.put(address, input.counted());
            }
            5 => {
                // The flags, and the used index after which an interrupt is wanted.
                let ring = self.drivers[queue].available_ring();
                self.put(ring, &input.word().to_le_bytes());
                self.put(ring + 4 + 2 * u64::from(size), &input.word().to_le_bytes());
            }
            6 => {
                let table = Self::address(input);
                let count = u64::from(input.byte() % 8);
                for n in 0..count {
                    let (address, len) = (Self::address(input), input.length());
                    let flags = input.word();
                    self.write_descriptor(
                        table.wrapping_add(16 * n),
                        address,
                        len,
                        flags,
                        n as u16 + 1,
                    );
                }
                let head = self.drivers[queue].descriptor;
                let slot = base + 16 * u64::from(head);
                let (len, flags) = (16 * count as u32, INDIRECT | (input.byte() & 3) as u16);
                self.write_descriptor(slot, table, len, flags, 0);
                self.drivers[queue].descriptor = (head + 1) % size;
                self.make_available(queue, head);
                self.notify(queue);
            }
            _ => self.notify(queue),
        }
    }

    /// Has the handler do what is to be done, as its worker would.
    fn serve(&self, handler: &mut impl Handler) -> Result<(), DeviceError> {
        for _ in 0..MOST_TURNS {
            let ready = self.poll.ready().expect("an epoll that waits");
            if ready.is_empty() {
                return Ok(());
            }
            for (token, events) in ready {
                handler.handle(token, events, &self.poll)?;
            }
        }
        panic!("the worker is busy for ever");
    }

    /// Does what the input says until its end, or that of the machine. `hostile`: also what no good driver does.
    pub fn run(mut self, device: &mut impl Device, mut input: Input<'_>, hostile: bool) {
        let mut steps = 0;
        let mut result = device.handler().start(&self.poll);
        while result.is_ok() && !input.is_empty() && steps < MOST_STEPS {
            steps += 1;
            let kind = input.byte() & 15;
            if kind < 8 || !hostile {
                device.act(&mut self, &mut input);
            } else {
                self.step(kind - 8, &mut input);
            }
            result = self.serve(device.handler());
            device.check();
        }
        match result {
            Ok(()) | Err(DeviceError::Guest { .. }) => {}
            Err(error) => panic!("a guest made its host fail: {error}"),
        }
    }
}
