//! The driver's side of a queue, for tests of devices: it lays rings out in a fake guest memory of 1 MiB.
//!
//! Rings lie below 0x8000; tests put buffers at 0x8000 and above.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::Ring;
use super::{Activation, ActiveQueue, FailureSink, Interrupt, Memory};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Address, length, flags, next: a descriptor as it is in memory.
pub type Raw = (u64, u32, u16, u16);

/// One buffer of a chain.
#[derive(Clone, Copy)]
pub struct Desc {
    address: u64,
    len: u32,
    flags: u16,
}

impl Desc {
    /// A buffer that the device reads.
    pub fn read(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            flags: 0,
        }
    }

    /// A buffer that the device writes.
    pub fn write(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            flags: WRITE,
        }
    }
}

/// 1 MiB of guest memory.
pub fn memory() -> Memory {
    let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    Memory::new(map)
}

/// Counts the interrupts of a device.
#[derive(Default)]
pub struct Interrupts {
    queue: AtomicUsize,
    config: Mutex<Vec<(u64, Vec<u8>)>>,
    silent: Mutex<Vec<(u64, Vec<u8>)>>,
    kernel: Mutex<Option<EventFd>>,
}

impl Interrupts {
    /// Interrupts for used buffers so far.
    pub fn queues(&self) -> usize {
        self.queue.load(Ordering::SeqCst)
    }

    /// Configuration changes so far: where, and what is there now.
    pub fn configs(&self) -> Vec<(u64, Vec<u8>)> {
        self.config.lock().unwrap().clone()
    }

    /// Those of which the driver was not told.
    pub fn silent_configs(&self) -> Vec<(u64, Vec<u8>)> {
        self.silent.lock().unwrap().clone()
    }

    /// The event that the kernel was given in place of [`Interrupt::queue`].
    pub fn kernels(&self) -> Option<EventFd> {
        let kernel = self.kernel.lock().unwrap();
        kernel.as_ref().map(|event| event.try_clone().unwrap())
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, _index: u16) -> io::Result<()> {
        self.queue.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn config(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.config.lock().unwrap().push((offset, bytes.to_vec()));
        Ok(())
    }

    fn config_silently(&self, offset: u64, bytes: &[u8]) {
        self.silent.lock().unwrap().push((offset, bytes.to_vec()));
    }

    fn by_kernel(&self) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        *self.kernel.lock().unwrap() = Some(event.try_clone()?);
        Ok(event)
    }
}

/// The driver of one queue.
pub struct Driver {
    memory: Memory,
    index: u16,
    size: u16,
    base: u64,
    interrupts: Arc<Interrupts>,
    notify: EventFd,
    next_descriptor: std::cell::Cell<u16>,
}

impl Driver {
    /// A driver whose rings begin at address 0. `size` is at most 256.
    pub fn new(memory: &Memory, size: u16) -> Self {
        Self::numbered(memory, size, 0, Arc::default())
    }

    /// The driver of a device's queue `index` (0 to 2) that shares its interrupts with others.
    pub fn numbered(memory: &Memory, size: u16, index: u16, interrupts: Arc<Interrupts>) -> Self {
        assert!(size <= 256 && index < 3);
        let driver = Self {
            memory: memory.clone(),
            index,
            size,
            base: 0x2800 * u64::from(index),
            interrupts,
            notify: EventFd::new(EFD_NONBLOCK).unwrap(),
            next_descriptor: std::cell::Cell::new(0),
        };
        let zeros = vec![0; 0x2800];
        driver.put(driver.base, &zeros);
        driver
    }

    fn available(&self) -> u64 {
        self.base + 0x1000
    }

    fn used_base(&self) -> u64 {
        self.base + 0x1400
    }

    /// Writes bytes to guest memory.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    /// Reads bytes from guest memory.
    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .memory()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn get16(&self, address: u64) -> u16 {
        let bytes = self.bytes(address, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    fn get32(&self, address: u64) -> u32 {
        u32::from(self.get16(address)) | u32::from(self.get16(address + 2)) << 16
    }

    /// Writes a descriptor anywhere.
    pub fn write_descriptor_at(&self, at: u64, (address, len, flags, next): Raw) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(at, &bytes);
    }

    fn take_descriptors(&self, count: usize) -> u16 {
        let first = self.next_descriptor.get();
        let next = first + u16::try_from(count).unwrap();
        assert!(
            next <= self.size,
            "the test uses more descriptors than there are"
        );
        self.next_descriptor.set(next);
        first
    }

    /// Lets the test use all descriptors again.
    pub fn recycle(&self) {
        self.next_descriptor.set(0);
    }

    /// Makes a chain of these buffers available; returns its head.
    pub fn add(&self, chain: &[Desc]) -> u16 {
        let first = self.take_descriptors(chain.len());
        for (i, desc) in (first..).zip(chain) {
            let last = usize::from(i - first) + 1 == chain.len();
            let flags = desc.flags | if last { 0 } else { NEXT };
            self.write_descriptor_at(
                self.base + 16 * u64::from(i),
                (desc.address, desc.len, flags, if last { 0 } else { i + 1 }),
            );
        }
        self.make_available(first);
        first
    }

    /// Makes a chain of descriptors exactly as given available; they begin at index 0.
    pub fn add_raw(&self, chain: &[Raw]) {
        for (i, raw) in (0u64..).zip(chain) {
            self.write_descriptor_at(self.base + 16 * i, *raw);
        }
        self.make_available(0);
    }

    /// Makes a chain available whose descriptors are in an indirect table at this address.
    pub fn add_indirect(&self, table: u64, chain: &[Desc]) -> u16 {
        for (i, desc) in chain.iter().enumerate() {
            let last = i + 1 == chain.len();
            let flags = desc.flags | if last { 0 } else { NEXT };
            let next = if last {
                0
            } else {
                u16::try_from(i).unwrap() + 1
            };
            self.write_descriptor_at(table + 16 * i as u64, (desc.address, desc.len, flags, next));
        }
        let head = self.take_descriptors(1);
        let len = u32::try_from(16 * chain.len()).unwrap();
        self.write_descriptor_at(self.base + 16 * u64::from(head), (table, len, INDIRECT, 0));
        self.make_available(head);
        head
    }

    /// Puts a head into the available ring.
    pub fn make_available(&self, head: u16) {
        let index = self.get16(self.available() + 2);
        let slot = u64::from(index % self.size);
        self.put(self.available() + 4 + 2 * slot, &head.to_le_bytes());
        self.set_available_index(index.wrapping_add(1));
    }

    /// Sets the available index as it is.
    pub fn set_available_index(&self, index: u16) {
        self.put(self.available() + 2, &index.to_le_bytes());
    }

    /// Sets the available ring's flags.
    pub fn set_available_flags(&self, flags: u16) {
        self.put(self.available(), &flags.to_le_bytes());
    }

    /// Sets the used index after which the driver wants an interrupt.
    pub fn set_used_event(&self, index: u16) {
        self.put(
            self.available() + 4 + 2 * u64::from(self.size),
            &index.to_le_bytes(),
        );
    }

    /// The used index.
    pub fn used_index(&self) -> u16 {
        self.get16(self.used_base() + 2)
    }

    /// The last `count` used elements: head and length.
    pub fn last_used(&self, count: u16) -> Vec<(u32, u32)> {
        let end = self.used_index();
        (0..count)
            .map(|i| {
                let slot = end.wrapping_sub(count).wrapping_add(i) % self.size;
                let at = self.used_base() + 4 + 8 * u64::from(slot);
                (self.get32(at), self.get32(at + 4))
            })
            .collect()
    }

    /// All used elements, of a ring that did not wrap.
    pub fn used(&self) -> Vec<(u32, u32)> {
        self.last_used(self.used_index())
    }

    /// Interrupts so far.
    pub fn interrupts(&self) -> usize {
        self.interrupts.queues()
    }

    /// Notifies the device.
    pub fn notify(&self) {
        self.notify.write(1).unwrap();
    }

    /// Whether a notification is pending; takes it.
    pub fn notified(&self) -> bool {
        self.notify.read().is_ok()
    }

    /// The queue as the transport hands it to the device.
    pub fn active(&self, event_index: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(self.base), Some(0));
        queue.set_avail_ring_address(low(self.available()), Some(0));
        queue.set_used_ring_address(low(self.used_base()), Some(0));
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        ActiveQueue {
            index: self.index,
            queue,
            notify: self.notify.try_clone().unwrap(),
        }
    }

    /// The queue in service.
    pub fn ring(&self, device: &'static str) -> Ring {
        self.in_service(device, false)
    }

    /// The queue in service, with `VIRTIO_F_EVENT_IDX`.
    pub fn ring_with_event_index(&self, device: &'static str) -> Ring {
        self.in_service(device, true)
    }

    fn in_service(&self, device: &'static str, event_index: bool) -> Ring {
        let interrupt = Arc::clone(&self.interrupts) as Arc<dyn Interrupt>;
        Ring::new(
            device,
            self.active(event_index),
            interrupt,
            &self.memory.memory(),
        )
        .unwrap()
    }
}

/// What a device gets when these drivers are ready, and where its failure shows.
pub fn activation(drivers: &[&Driver], features: u64) -> (Activation, mpsc::Receiver<String>) {
    let (failed, failures) = mpsc::channel();
    let failure: FailureSink = Arc::new(move |error| {
        let _ = failed.send(error.to_string());
    });
    let activation = Activation {
        memory: drivers[0].memory.clone(),
        interrupt: Arc::clone(&drivers[0].interrupts) as Arc<dyn Interrupt>,
        queues: drivers.iter().map(|driver| driver.active(false)).collect(),
        features,
        failure,
    };
    (activation, failures)
}

/// Waits up to 30 seconds, for a machine with much else to do, until something holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = std::time::Instant::now();
    while !holds() {
        assert!(begin.elapsed().as_secs() < 30, "never: {what}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Whether a descriptor is readable now.
pub fn readable(fd: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd for the length of the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}
