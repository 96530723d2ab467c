//! One input of the fuzz target `bus`: what vCPUs read and write on ports and in the windows of devices.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vm_superio::Serial;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Bus, Console, Ending, SerialLine};
use crate::arch::layout;
use crate::fuzzing::input::Input;
use crate::transport::mmio::MmioTransport;
use crate::virtio::{Activation, DeviceError, Memory, VirtioDevice};

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 0x3000_0021;
const SIZES: [u16; 2] = [8, 256];
const WINDOWS: usize = 2;
const MOST_STEPS: usize = 200;

/// What the driver made of a device.
#[derive(Default)]
struct Seen {
    active: AtomicBool,
    fails: AtomicBool,
}

/// A device that insists on what a transport owes it.
struct Checked {
    seen: Arc<Seen>,
    config: [u8; 20],
}

impl VirtioDevice for Checked {
    fn name(&self) -> &'static str {
        "virtio-checked"
    }

    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.seen.fails.load(Ordering::Relaxed) {
            return Err(DeviceError::Guest {
                device: self.name(),
                what: "it fails".into(),
            });
        }
        let was = self.seen.active.swap(true, Ordering::Relaxed);
        assert!(!was, "activated twice");
        assert_eq!(activation.features & !FEATURES, 0, "not offered");
        assert_ne!(activation.features & 1 << VIRTIO_F_VERSION_1, 0);
        assert_eq!(activation.queues.len(), SIZES.len());
        for (index, (active, most)) in activation.queues.iter().zip(SIZES).enumerate() {
            let size = active.queue.size();
            assert_eq!(usize::from(active.index), index);
            assert!(size.is_power_of_two() && size <= most, "a queue of {size}");
            assert!(active.queue.is_valid(&*activation.memory.memory()));
        }
        Ok(())
    }

    fn reset(&mut self) {
        let was = self.seen.active.swap(false, Ordering::Relaxed);
        assert!(was, "reset while it was not active");
    }

    fn pause(&mut self) {
        assert!(self.seen.active.load(Ordering::Relaxed));
    }

    fn resume(&mut self) {
        assert!(self.seen.active.load(Ordering::Relaxed));
    }
}

struct Machine {
    bus: Bus,
    ending: Arc<Ending>,
    seen: Vec<Arc<Seen>>,
}

impl Machine {
    fn new() -> Self {
        let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x8000)]);
        let memory = Memory::new(map.expect("memory"));
        let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let ending = Ending::new();
        let seen: Vec<Arc<Seen>> = (0..WINDOWS).map(|_| Arc::default()).collect();
        let windows = seen.iter().map(|seen| {
            let device = Checked {
                seen: Arc::clone(seen),
                config: [7; 20],
            };
            let sink = ending.failure_sink();
            MmioTransport::new(Box::new(device), memory.clone(), event(), sink).expect("a window")
        });
        let null = File::options().write(true).open("/dev/null");
        let console = Console::new(null.expect("/dev/null"), 1 << 20).expect("a console");
        Self {
            bus: Bus::new(
                Serial::new(SerialLine(event()), console),
                windows.collect(),
                Arc::clone(&ending),
            ),
            ending,
            seen,
        }
    }

    fn register(&self, window: usize, offset: u32, value: u32) {
        let address = layout::device_address(window) + u64::from(offset);
        self.bus.memory_write(address, &value.to_le_bytes());
    }

    fn status(&self, window: usize) -> u32 {
        let mut status = [0; 4];
        let address = layout::device_address(window) + u64::from(reg::VIRTIO_MMIO_STATUS);
        self.bus.memory_read(address, &mut status);
        u32::from_le_bytes(status)
    }

    /// What a good driver does before its queues.
    fn negotiate(&self, window: usize, features: u64) {
        for status in [0, 1, 3] {
            self.register(window, reg::VIRTIO_MMIO_STATUS, status);
        }
        for half in [0, 1] {
            self.register(window, reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let features = (features >> (32 * half)) as u32;
            self.register(window, reg::VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.register(window, reg::VIRTIO_MMIO_STATUS, 11);
    }

    /// A queue, with what the input says in place of good values.
    fn queue(&self, window: usize, input: &mut Input<'_>) {
        let (index, wrong) = (u32::from(input.byte()), input.byte());
        self.register(window, reg::VIRTIO_MMIO_QUEUE_SEL, index);
        let mut say = |bit: u8, good: u64| match wrong & bit {
            0 => good,
            _ => input.quad(),
        };
        let base = 0x4000 * u64::from(index % 2);
        let size = say(1, 8) as u32;
        let (descriptors, driver, device) =
            (say(2, base), say(4, base + 0x1000), say(8, base + 0x2000));
        let values = [
            (reg::VIRTIO_MMIO_QUEUE_NUM, size),
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors as u32),
            (reg::VIRTIO_MMIO_QUEUE_DESC_HIGH, (descriptors >> 32) as u32),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, driver as u32),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH, (driver >> 32) as u32),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, device as u32),
            (reg::VIRTIO_MMIO_QUEUE_USED_HIGH, (device >> 32) as u32),
            (reg::VIRTIO_MMIO_QUEUE_READY, u32::from(wrong & 16 == 0)),
        ];
        for (register, value) in values {
            self.register(window, register, value);
        }
    }

    fn address(input: &mut Input<'_>) -> u64 {
        match input.byte() {
            0xff => input.quad(),
            0xfe => layout::device_address(0) - u64::from(input.byte()),
            byte => {
                let offset = u64::from(input.byte()) | u64::from(byte & 0x1e) << 7;
                layout::device_address(usize::from(byte & 1)) + offset
            }
        }
    }

    fn port(input: &mut Input<'_>) -> u16 {
        const KNOWN: [u16; 8] = [
            layout::SERIAL_PORT,
            layout::PVPANIC_PORT,
            layout::SLEEP_CONTROL_PORT,
            layout::SLEEP_STATUS_PORT,
            layout::RESET_PORT,
            layout::I8042_PORT,
            layout::SERIAL_PORT + 1,
            layout::SERIAL_PORT + 3,
        ];
        match input.byte() {
            0xff => input.word(),
            byte => KNOWN[usize::from(byte) & 7] + u16::from(byte >> 5),
        }
    }

    fn step(&self, input: &mut Input<'_>) {
        let kind = input.byte();
        let window = usize::from(kind >> 7) % WINDOWS;
        match kind & 15 {
            0..3 => {
                let address = Self::address(input);
                let count = usize::from(input.byte() % 9);
                self.bus.memory_write(address, input.bytes(count));
            }
            3 | 4 => {
                let address = Self::address(input);
                let count = usize::from(input.byte() % 9);
                self.bus.memory_read(address, &mut [0; 8][..count.min(8)]);
            }
            5 | 6 => {
                let port = Self::port(input);
                let count = usize::from(input.byte() % 5);
                self.bus.port_write(port, input.bytes(count));
            }
            7 | 8 => {
                let port = Self::port(input);
                let count = usize::from(input.byte() % 5);
                self.bus.port_read(port, &mut [0; 4][..count.min(4)]);
            }
            9 => {
                let refused = if kind & 16 != 0 { input.quad() } else { 0 };
                self.negotiate(window, FEATURES ^ refused);
            }
            10 | 11 => self.queue(window, input),
            12 => self.register(window, reg::VIRTIO_MMIO_STATUS, 15),
            13 => {
                self.bus.pause();
                self.bus.resume();
            }
            14 => self.seen[window]
                .fails
                .store(kind & 16 != 0, Ordering::Relaxed),
            _ => {
                let value = input.byte().into();
                self.register(window, reg::VIRTIO_MMIO_STATUS, value);
            }
        }
    }

    fn check(&self) {
        const DRIVER_OK: u32 = 4;
        const NEEDS_RESET: u32 = 64;
        for (window, seen) in self.seen.iter().enumerate() {
            let status = self.status(window);
            let runs = status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK;
            let active = seen.active.load(Ordering::Relaxed);
            assert_eq!(active, runs, "the status is {status:#x}");
        }
    }
}

/// Ports and windows.
pub fn bus(data: &[u8]) {
    let machine = Machine::new();
    let mut input = Input::new(data);
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        machine.step(&mut input);
        machine.check();
    }
    machine.bus.stop();
    let all = machine.seen.iter();
    let stopped = all.clone().all(|seen| !seen.active.load(Ordering::Relaxed));
    assert!(stopped, "a device goes on after the machine's end");
    // Whatever it is; a reason must be one that can be told.
    drop(machine.ending.reason());
}
