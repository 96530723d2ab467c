//! A driver of virtio-mmio devices (virtio 1.2 §4.2) for a [`Program`]: as little as it takes to get at a device's queues.

use super::machine::{FREE, Program};

/// The windows of the devices, in the order in which [`super::guest`] has them.
pub const DISK: u64 = 0;
pub const LAYERS: u64 = 1;
pub const NET: u64 = 2;
/// A network device that the host's kernel serves.
pub const VHOST: u64 = 3;
pub const VSOCK: u64 = 4;
pub const RNG: u64 = 5;
pub const BALLOON: u64 = 6;
pub const FS: u64 = 7;
/// All of them, with the number of their queues.
pub const DEVICES: [(&str, u64, u16); 8] = [
    ("disk", DISK, 1),
    ("layers", LAYERS, 1),
    ("net", NET, 2),
    ("vhost", VHOST, 2),
    ("vsock", VSOCK, 3),
    ("rng", RNG, 1),
    ("balloon", BALLOON, 3),
    ("fs", FS, 2),
];
/// Where the windows are, and how large they are.
pub const WINDOWS: u64 = 0xd000_0000;
pub const WINDOW: u64 = 0x1000;

/// Registers.
pub const DEVICE_FEATURES: u64 = 0x10;
pub const DRIVER_FEATURES: u64 = 0x20;
pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
pub const QUEUE_SELECT: u64 = 0x30;
pub const QUEUE_SIZE_MAX: u64 = 0x34;
pub const QUEUE_SIZE: u64 = 0x38;
pub const QUEUE_READY: u64 = 0x44;
pub const NOTIFY: u64 = 0x50;
pub const STATUS: u64 = 0x70;
pub const DESCRIPTORS: u64 = 0x80;
pub const AVAILABLE: u64 = 0x90;
pub const USED: u64 = 0xa0;
pub const CONFIG: u64 = 0x100;

/// Flags of descriptors.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// Entries of each queue.
pub const SIZE: u16 = 8;

/// A register of a device.
pub fn register(device: u64, offset: u64) -> u64 {
    WINDOWS + device * WINDOW + offset
}

/// A queue of a device: where its rings are, which each queue has at a place of its own.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    pub device: u64,
    pub index: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl Queue {
    pub fn new(device: u64, index: u16) -> Self {
        let base = FREE + (device * 8 + u64::from(index)) * 0x1_0000;
        Self {
            device,
            index,
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x8000,
        }
    }

    /// Memory of this queue's own for what the descriptors point at: 4 KiB.
    pub fn buffer(&self) -> u64 {
        self.descriptors + 0xc000
    }

    /// The index that the device writes.
    pub fn used_index(&self) -> u64 {
        self.used + 2
    }

    /// Tells the device where the rings are, wherever that is.
    pub fn configure(&self, p: &mut Program) {
        p.write32(register(self.device, QUEUE_SELECT), self.index.into());
        p.write32(register(self.device, QUEUE_SIZE), SIZE.into());
        for (offset, address) in [
            (DESCRIPTORS, self.descriptors),
            (AVAILABLE, self.available),
            (USED, self.used),
        ] {
            p.write32(register(self.device, offset), address as u32);
            p.write32(register(self.device, offset + 4), (address >> 32) as u32);
        }
        p.write32(register(self.device, QUEUE_READY), 1);
    }

    /// Empties the rings.
    pub fn clear(&self, p: &mut Program) {
        p.fill(self.descriptors, 0, 0x1_0000);
    }

    pub fn descriptor(
        &self,
        p: &mut Program,
        index: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let at = self.descriptors + 16 * u64::from(index);
        let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
        p.write64(at, address).write64(at + 8, rest);
    }

    /// Makes all entries of the ring of available chains this one.
    pub fn heads(&self, p: &mut Program, head: u16) {
        for slot in 0..u64::from(SIZE) {
            p.write16(self.available + 4 + 2 * slot, head);
        }
    }

    /// Makes so many more chains available, and tells the device.
    pub fn offer(&self, p: &mut Program, count: u16) {
        p.add16(self.available + 2, count);
        self.notify(p);
    }

    /// Waits until the device is done with all that was offered.
    pub fn drain(&self, p: &mut Program) {
        p.wait_same(self.used_index(), self.available + 2);
    }

    pub fn notify(&self, p: &mut Program) {
        p.write32(register(self.device, NOTIFY), self.index.into());
    }
}

/// Resets a device and comes to the point where queues can be set up.
pub fn begin(p: &mut Program, device: u64) {
    let status = register(device, STATUS);
    p.write32(status, 0).write32(status, 1).write32(status, 3);
    // VIRTIO_F_VERSION_1, and what a queue depends on: VIRTIO_BALLOON_F_REPORTING.
    let more = if device == BALLOON { 1 << 5 } else { 0 };
    p.write32(register(device, DRIVER_FEATURES_SELECT), 1);
    p.write32(register(device, DRIVER_FEATURES), 1);
    p.write32(register(device, DRIVER_FEATURES_SELECT), 0);
    p.write32(register(device, DRIVER_FEATURES), more);
    p.write32(status, 0xb);
}

/// The last step: the device works from here on.
pub fn activate(p: &mut Program, device: u64) {
    p.write32(register(device, STATUS), 0xf);
}

/// Sets a device up with all its queues, empty.
pub fn drive(p: &mut Program, device: u64) -> Vec<Queue> {
    let count = DEVICES[device as usize].2;
    let queues: Vec<_> = (0..count).map(|index| Queue::new(device, index)).collect();
    begin(p, device);
    for queue in &queues {
        queue.clear(p);
        queue.configure(p);
    }
    activate(p, device);
    queues
}

/// Asks the entropy device for bytes and waits for them: whether the machine still works. `turn` counts the questions
/// since the device was set up, from 1.
pub fn random_bytes(p: &mut Program, queue: &Queue, turn: u16) {
    queue.descriptor(p, 0, (queue.buffer(), 64), WRITE, 0);
    queue.heads(p, 0);
    queue.offer(p, 1);
    p.wait16(queue.used_index(), turn);
    // The index, and behind it the head of the first chain that was used, which is 0.
    p.show(queue.used_index());
}
