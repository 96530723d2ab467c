//! The virtio-mmio transport (virtio 1.2 §4.2): one device behind a window of registers.
//!
//! What the driver writes is hostile. The status only goes forward (§3.1.1); features are fixed once
//! FEATURES_OK is set, queue addresses and sizes once the queue is ready or the device active. What it reads is in
//! [`Registers`], which follow what it writes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::registers::{CONFIG, Registers};
use crate::virtio::{Activation, ActiveQueue, FailureSink, Interrupt, Memory, VirtioDevice};

/// "virt" in little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CAIS");
/// The driver's notification register.
pub const QUEUE_NOTIFY: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// The register in which the driver says what it has heard of, and the value that means queues and nothing else, which never
/// changes anything.
pub const HEARD_OF_QUEUES: (u64, u32) = (
    reg::VIRTIO_MMIO_INTERRUPT_ACK as u64,
    reg::VIRTIO_MMIO_INT_VRING,
);

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// The interrupt line of one device: a status register and an irqfd.
///
/// While the device is active the status says that queues have used buffers, whether some have or not. A driver that is told
/// of them without cause looks and finds nothing; and what always says the same nobody has to set before the line is raised,
/// which may be the kernel's to do, nor to take back when the driver has heard.
struct MmioInterrupt {
    registers: Arc<Registers>,
    line: EventFd,
}

impl MmioInterrupt {
    /// Tells the driver to look at the configuration space and the status again.
    fn changed(&self) -> io::Result<()> {
        let generation = self.registers.get(reg::VIRTIO_MMIO_CONFIG_GENERATION);
        self.registers.set(
            reg::VIRTIO_MMIO_CONFIG_GENERATION,
            generation.wrapping_add(1),
        );
        self.registers.add(
            reg::VIRTIO_MMIO_INTERRUPT_STATUS,
            reg::VIRTIO_MMIO_INT_CONFIG,
        );
        self.line.write(1)
    }

    /// The driver has heard of these.
    fn heard(&self, bits: u32) {
        self.registers.remove(
            reg::VIRTIO_MMIO_INTERRUPT_STATUS,
            bits & reg::VIRTIO_MMIO_INT_CONFIG,
        );
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: u16) -> io::Result<()> {
        self.line.write(1)
    }

    fn config(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.config_silently(offset, bytes);
        self.changed()
    }

    fn config_silently(&self, offset: u64, bytes: &[u8]) {
        self.registers.set_config(offset, bytes);
    }

    fn by_kernel(&self) -> io::Result<EventFd> {
        self.line.try_clone()
    }
}

/// What the driver has said of one queue.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// What the driver has said of a device, and what it has still to hear.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowState {
    /// The device's type (virtio 1.2 §5).
    device: u32,
    status: u32,
    active: bool,
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    interrupt_status: u32,
    generation: u32,
    queues: Vec<QueueState>,
}

/// One queue of a window.
struct Slot {
    max_size: u16,
    said: QueueState,
    notify: EventFd,
}

impl QueueState {
    fn new(max_size: u16) -> Self {
        Self {
            size: max_size.into(),
            ..Self::default()
        }
    }
}

impl Slot {
    fn new(max_size: u16) -> io::Result<Self> {
        Ok(Self {
            max_size,
            said: QueueState::new(max_size),
            notify: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    fn reset(&mut self) {
        self.said = QueueState::new(self.max_size);
    }

    /// The queue, if all that the driver said of it is valid. One that was in service before goes on where its used
    /// ring says that it was: a parked device has served all that it took.
    fn build(&self, memory: &Memory, event_idx: bool, goes_on: bool) -> Option<Queue> {
        if !self.said.ready {
            return None;
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue
            .try_set_size(u16::try_from(self.said.size).ok()?)
            .ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.said.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.said.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.said.device))
            .ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        let memory = memory.memory();
        if goes_on {
            // le16 flags, le16 idx (virtio 1.2 §2.7.8).
            let index = GuestAddress(self.said.device.checked_add(2)?);
            let used = memory.load::<u16>(index, Ordering::Acquire).ok()?;
            let used = u16::from_le(used);
            queue.set_next_avail(used);
            queue.set_next_used(used);
        }
        queue.is_valid(&*memory).then_some(queue)
    }
}

/// A device behind a register window.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    interrupt: Arc<MmioInterrupt>,
    failure: FailureSink,
    slots: Vec<Slot>,
    status: u32,
    active: bool,
    queue_select: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
}

impl MmioTransport {
    /// Puts a device behind a window whose interrupt is `line` (an irqfd).
    ///
    /// # Errors
    /// What the system says when it has no more eventfds.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        line: EventFd,
        failure: FailureSink,
    ) -> io::Result<Self> {
        let slots = device
            .queue_sizes()
            .iter()
            .map(|size| Slot::new(*size))
            .collect::<io::Result<_>>()?;
        let registers = registers_of(device.as_ref());
        let transport = Self {
            device,
            memory,
            interrupt: Arc::new(MmioInterrupt { registers, line }),
            failure,
            slots,
            status: 0,
            active: false,
            queue_select: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
        };
        transport.publish();
        Ok(transport)
    }

    /// What the driver reads.
    pub fn registers(&self) -> &Arc<Registers> {
        &self.interrupt.registers
    }

    /// The events by which the driver notifies each queue, in order; for ioeventfds on [`QUEUE_NOTIFY`].
    pub fn notify_events(&self) -> impl Iterator<Item = &EventFd> {
        self.slots.iter().map(|slot| &slot.notify)
    }

    /// Writes to the window. What the driver may not write now is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
            && offset < CONFIG
        {
            self.write_register(offset as u32, u32::from_le_bytes(bytes));
            self.publish();
        }
    }

    /// Parks the device's worker.
    pub fn pause(&mut self) {
        if self.active {
            self.device.pause();
        }
    }

    /// Lets the device's worker go on.
    pub fn resume(&mut self) {
        if self.active {
            self.device.resume();
        }
    }

    /// Stops the device for good, as at the machine's end.
    pub fn stop(&mut self) {
        self.reset();
    }

    /// What a clone of this device needs, whose worker is parked.
    pub fn save(&self) -> WindowState {
        WindowState {
            device: self.device.device_type(),
            status: self.status,
            active: self.active,
            queue_select: self.queue_select,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            interrupt_status: self.registers().get(reg::VIRTIO_MMIO_INTERRUPT_STATUS)
                & reg::VIRTIO_MMIO_INT_CONFIG,
            generation: self.registers().get(reg::VIRTIO_MMIO_CONFIG_GENERATION),
            queues: self.slots.iter().map(|slot| slot.said).collect(),
        }
    }

    /// Goes on where a device like this one was. Its rings are in the memory already. Where they are not, the device
    /// needs a reset, and its driver hears of that.
    ///
    /// # Errors
    /// A sentence, where it was the state of another device.
    pub fn restore(&mut self, state: &WindowState) -> Result<(), String> {
        let (name, kind) = (self.device.name(), self.device.device_type());
        if (state.device, state.queues.len()) != (kind, self.slots.len()) {
            return Err(format!(
                "a device of type {} with {} queues was in the place of {name}",
                state.device,
                state.queues.len()
            ));
        }
        if state.driver_features & !self.device.features() != 0 {
            return Err(format!(
                "{name} had features then that it has no more: {:#x}",
                state.driver_features
            ));
        }
        self.status = state.status;
        self.queue_select = state.queue_select;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.registers().set(
            reg::VIRTIO_MMIO_INTERRUPT_STATUS,
            state.interrupt_status & reg::VIRTIO_MMIO_INT_CONFIG,
        );
        self.registers()
            .set(reg::VIRTIO_MMIO_CONFIG_GENERATION, state.generation);
        for (slot, said) in self.slots.iter_mut().zip(&state.queues) {
            slot.said = *said;
        }
        if state.active {
            self.activate(true);
        }
        self.publish();
        Ok(())
    }

    /// Has the registers say what depends on what the driver has written.
    fn publish(&self) {
        let slot = self.slots.get(self.queue_select as usize);
        let features = half(self.device.features(), self.device_features_select);
        for (register, value) in [
            (reg::VIRTIO_MMIO_DEVICE_FEATURES, features),
            (
                reg::VIRTIO_MMIO_QUEUE_NUM_MAX,
                slot.map_or(0, |slot| slot.max_size.into()),
            ),
            (
                reg::VIRTIO_MMIO_QUEUE_READY,
                slot.map_or(0, |slot| slot.said.ready.into()),
            ),
            (reg::VIRTIO_MMIO_STATUS, self.status),
        ] {
            self.registers().set(register, value);
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.heard(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            reg::VIRTIO_MMIO_QUEUE_READY => self.write_ready(value),
            _ => self.write_queue(offset, value),
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let mask = u64::from(u32::MAX) << shift;
        self.driver_features = (self.driver_features & !mask) | u64::from(value) << shift;
    }

    /// The driver can touch queues only between FEATURES_OK and DRIVER_OK.
    fn configurable(&mut self) -> Option<&mut QueueState> {
        if self.active || self.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return None;
        }
        let slot = self.slots.get_mut(self.queue_select as usize);
        slot.map(|slot| &mut slot.said)
    }

    fn write_ready(&mut self, value: u32) {
        if let Some(slot) = self.configurable() {
            slot.ready = value == 1;
        }
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        let Some(slot) = self.configurable().filter(|slot| !slot.ready) else {
            return;
        };
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => slot.size = value,
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut slot.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut slot.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut slot.driver, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut slot.driver, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut slot.device, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut slot.device, value),
            _ => {}
        }
    }

    /// A notification that did not take the ioeventfd's way.
    fn notify(&self, value: u32) {
        if let Some(slot) = self.slots.get(value as usize) {
            // A full counter is a notification that is still to be seen.
            let _ = slot.notify.write(1);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let new = value & !self.status;
        // Bits are never taken back but by a reset (§2.1.1); the device's own bit is not the driver's.
        if value & self.status & !NEEDS_RESET != self.status & !NEEDS_RESET {
            return;
        }
        if new & FAILED != 0 {
            self.status |= FAILED;
            return;
        }
        match (self.status & !NEEDS_RESET, new) {
            (0, ACKNOWLEDGE) => self.status |= ACKNOWLEDGE,
            (ACKNOWLEDGE, DRIVER) => self.status |= DRIVER,
            (s, FEATURES_OK) if s == ACKNOWLEDGE | DRIVER => {
                let offered = self.device.features();
                let wanted = self.driver_features;
                if wanted & !offered == 0 && wanted & (1 << VIRTIO_F_VERSION_1) != 0 {
                    self.status |= FEATURES_OK;
                }
            }
            (s, DRIVER_OK) if s == ACKNOWLEDGE | DRIVER | FEATURES_OK => {
                self.status |= DRIVER_OK;
                self.activate(false);
            }
            _ => {}
        }
    }

    fn activate(&mut self, goes_on: bool) {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues: Option<Vec<_>> = self
            .slots
            .iter()
            .take(self.device.queues(self.driver_features))
            .enumerate()
            .map(|(index, slot)| {
                Some(ActiveQueue {
                    index: u16::try_from(index).ok()?,
                    queue: slot.build(&self.memory, event_idx, goes_on)?,
                    notify: slot.notify.try_clone().ok()?,
                })
            })
            .collect();
        // Before its worker can raise the line.
        let (status, queues_used) = (
            reg::VIRTIO_MMIO_INTERRUPT_STATUS,
            reg::VIRTIO_MMIO_INT_VRING,
        );
        self.registers().add(status, queues_used);
        let activated = queues.is_some_and(|queues| {
            let activation = Activation {
                memory: self.memory.clone(),
                interrupt: self.interrupt.clone(),
                queues,
                features: self.driver_features,
                failure: Arc::clone(&self.failure),
            };
            match self.device.activate(activation) {
                Ok(()) => true,
                Err(error) => {
                    (self.failure)(error);
                    false
                }
            }
        });
        if activated {
            self.active = true;
        } else {
            self.registers().remove(status, queues_used);
            self.status |= NEEDS_RESET;
            self.publish();
            // A driver that does not hear of it finds the bit in the status all the same.
            let _ = self.interrupt.changed();
        }
    }

    fn reset(&mut self) {
        if self.active {
            self.device.reset();
        }
        self.active = false;
        self.status = 0;
        self.driver_features = 0;
        (
            self.queue_select,
            self.device_features_select,
            self.driver_features_select,
        ) = (0, 0, 0);
        self.registers().set(reg::VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        self.slots.iter_mut().for_each(Slot::reset);
    }
}

/// What of a device's registers never changes.
fn registers_of(device: &dyn VirtioDevice) -> Arc<Registers> {
    let registers = Registers::new(device.config());
    for (register, value) in [
        (reg::VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
        (reg::VIRTIO_MMIO_VERSION, VERSION),
        (reg::VIRTIO_MMIO_DEVICE_ID, device.device_type()),
        (reg::VIRTIO_MMIO_VENDOR_ID, VENDOR),
        // There is no shared memory: its length is all ones (§4.2.2.1).
        (reg::VIRTIO_MMIO_SHM_LEN_LOW, u32::MAX),
        (reg::VIRTIO_MMIO_SHM_LEN_HIGH, u32::MAX),
        (reg::VIRTIO_MMIO_SHM_BASE_LOW, u32::MAX),
        (reg::VIRTIO_MMIO_SHM_BASE_HIGH, u32::MAX),
    ] {
        registers.set(register, value);
    }
    registers
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = (*register & !u64::from(u32::MAX)) | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = (*register & u64::from(u32::MAX)) | u64::from(value) << 32;
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
