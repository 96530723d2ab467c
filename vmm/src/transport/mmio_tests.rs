use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use vm_memory::GuestMemoryMmap;

use super::*;
use crate::virtio::DeviceError;

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1;
/// A driver that accepts this does without the second queue.
const ONE_QUEUE: u64 = 2;
const V1: u64 = 1 << VIRTIO_F_VERSION_1;

/// A device that only notes what happens to it.
#[derive(Default)]
struct Seen {
    activations: AtomicUsize,
    resets: AtomicUsize,
    last: Mutex<Option<Activation>>,
}

struct Device {
    seen: Arc<Seen>,
    fails: bool,
}

impl VirtioDevice for Device {
    fn name(&self) -> &'static str {
        "virtio-test"
    }

    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8, 16]
    }

    fn queues(&self, features: u64) -> usize {
        if features & ONE_QUEUE == 0 { 2 } else { 1 }
    }

    fn features(&self) -> u64 {
        FEATURES | ONE_QUEUE
    }

    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.fails {
            return Err(DeviceError::Guest {
                device: "virtio-test",
                what: "it fails".into(),
            });
        }
        self.seen.activations.fetch_add(1, Ordering::SeqCst);
        *self.seen.last.lock().unwrap() = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.seen.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}
}

/// A driver that can misbehave.
struct Driver {
    transport: MmioTransport,
    seen: Arc<Seen>,
    line: EventFd,
    failures: Arc<AtomicUsize>,
}

impl Driver {
    fn new(fails: bool) -> Self {
        let seen = Arc::new(Seen::default());
        let device = Device {
            seen: Arc::clone(&seen),
            fails,
        };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let failures = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&failures);
        let sink: FailureSink = Arc::new(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let transport = MmioTransport::new(
            Box::new(device),
            Memory::new(memory),
            line.try_clone().unwrap(),
            sink,
        );
        Self {
            transport: transport.unwrap(),
            seen,
            line,
            failures,
        }
    }

    fn read(&self, register: u32) -> u32 {
        self.transport.registers().get(register)
    }

    fn write(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    fn set_status(&mut self, status: u32) {
        self.write(reg::VIRTIO_MMIO_STATUS, status);
    }

    fn negotiate(&mut self, features: u64) {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for select in 0..2 {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(
                reg::VIRTIO_MMIO_DRIVER_FEATURES,
                (features >> (32 * select)) as u32,
            );
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn queue(&mut self, index: u32, size: u32, base: u32) {
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        self.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base);
        self.write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x400);
        self.write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x800);
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn driver_ok(&mut self) {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn active(features: u64) -> Self {
        let mut driver = Self::new(false);
        driver.negotiate(features);
        driver.queue(0, 8, 0x1000);
        driver.queue(1, 16, 0x2000);
        driver.driver_ok();
        driver
    }

    fn activations(&self) -> usize {
        self.seen.activations.load(Ordering::SeqCst)
    }
}

#[test]
fn a_driver_that_keeps_the_rules_gets_its_device() {
    let driver = Driver::active(FEATURES);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(driver.activations(), 1);
    assert_eq!(
        driver.status(),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    let activation = driver.seen.last.lock().unwrap().take().unwrap();
    assert_eq!(activation.features, FEATURES);
    let queues = &activation.queues;
    assert_eq!(queues.len(), 2);
    assert_eq!((queues[0].queue.size(), queues[1].queue.size()), (8, 16));
    assert_eq!(queues[1].queue.desc_table(), 0x2000);
    assert!(queues[0].queue.event_idx_enabled());
    // An interrupt reaches the line and the register, and the driver takes it back.
    activation.interrupt.queue(0).unwrap();
    activation.interrupt.config(1, &[9]).unwrap();
    assert_eq!(driver.line.read().unwrap(), 2);
    let mut driver = driver;
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_CONFIG_GENERATION), 1);
    assert_eq!(
        driver.read(reg::VIRTIO_MMIO_CONFIG).to_le_bytes(),
        [1, 9, 3, 4]
    );
    driver.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 3);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
}

#[test]
fn an_interrupt_means_all_queues_until_a_reset() {
    let mut driver = Driver::active(FEATURES);
    let activation = driver.seen.last.lock().unwrap().take().unwrap();
    let status = |driver: &Driver| driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
    assert_eq!(status(&driver), 1);
    let event = activation.interrupt.by_kernel().unwrap();
    event.write(1).unwrap();
    assert_eq!(driver.line.read().unwrap(), 1, "it is the line itself");
    // Taken back or not, the next one may have come meanwhile.
    driver.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(status(&driver), 1);
    activation.interrupt.config(0, &[]).unwrap();
    assert_eq!(status(&driver), 3);
    driver.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 3);
    assert_eq!(status(&driver), 1);
    // Of a template's device only what it has still to hear is kept.
    assert_eq!(driver.transport.save().interrupt_status, 0);
    driver.set_status(0);
    assert_eq!(status(&driver), 0);
}

#[test]
fn features_need_version_1_and_must_have_been_offered() {
    for wanted in [0, V1 | 1 << 20, FEATURES | 1 << 63] {
        let mut driver = Driver::new(false);
        driver.negotiate(wanted);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "{wanted:#x}");
        driver.driver_ok();
        assert_eq!(driver.activations(), 0);
    }
    let mut driver = Driver::new(false);
    driver.negotiate(V1);
    // Too late: what was agreed stays.
    driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    assert_eq!(driver.transport.driver_features, V1);
    // Nor is there a third half.
    driver.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_DEVICE_FEATURES), 0);
}

#[test]
fn the_status_only_goes_forward() {
    let mut driver = Driver::new(false);
    driver.set_status(DRIVER_OK);
    assert_eq!(driver.status(), 0);
    driver.set_status(ACKNOWLEDGE | DRIVER);
    assert_eq!(driver.status(), 0);
    driver.set_status(ACKNOWLEDGE);
    driver.set_status(ACKNOWLEDGE | DRIVER);
    driver.set_status(DRIVER);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    driver.set_status(ACKNOWLEDGE | DRIVER | NEEDS_RESET);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    driver.set_status(ACKNOWLEDGE | DRIVER | FAILED);
    driver.driver_ok();
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FAILED);
    assert_eq!(driver.activations(), 0);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
}

// must-test: queue addresses and sizes rewritten by the guest after activation
#[test]
fn an_active_queue_cannot_be_changed() {
    let mut driver = Driver::active(V1);
    for (register, value) in [
        (reg::VIRTIO_MMIO_QUEUE_NUM, 4),
        (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0xdead_0000),
        (reg::VIRTIO_MMIO_QUEUE_DESC_HIGH, 0xdead),
        (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0xdead_0000),
        (reg::VIRTIO_MMIO_QUEUE_USED_HIGH, 0xdead),
        (reg::VIRTIO_MMIO_QUEUE_READY, 0),
    ] {
        driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
        driver.write(register, value);
    }
    let slot = &driver.transport.slots[0];
    assert_eq!((slot.said.size, slot.said.ready), (8, true));
    assert_eq!(
        (slot.said.descriptors, slot.said.driver, slot.said.device),
        (0x1000, 0x1400, 0x1800)
    );
    // DRIVER_OK again changes nothing either.
    driver.driver_ok();
    assert_eq!(driver.activations(), 1);
}

#[test]
fn a_ready_queue_is_fixed_before_activation_too() {
    let mut driver = Driver::new(false);
    driver.write(reg::VIRTIO_MMIO_QUEUE_NUM, 4);
    assert_eq!(driver.transport.slots[0].said.size, 8, "before FEATURES_OK");
    driver.negotiate(V1);
    driver.queue(0, 8, 0x1000);
    driver.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x5000);
    assert_eq!(driver.transport.slots[0].said.descriptors, 0x1000);
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    driver.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x5000);
    assert_eq!(driver.transport.slots[0].said.descriptors, 0x5000);
}

// must-test: queue_select out of range
#[test]
fn a_queue_that_does_not_exist_reads_as_zero_and_takes_nothing() {
    let mut driver = Driver::active(V1);
    for index in [2, 0xffff, u32::MAX] {
        driver.queue(index, 8, 0x3000);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
        driver.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, index);
    }
    driver.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    let events: Vec<_> = driver.transport.notify_events().collect();
    assert!(events[0].read().is_err());
    assert_eq!(events[1].read().unwrap(), 1);
}

#[test]
fn queues_that_are_not_valid_do_not_reach_the_device() {
    // Size, base: not a power of two, zero, too large, unaligned, outside of memory, around its end.
    for (size, base) in [
        (7, 0x1000),
        (0, 0x1000),
        (16, 0x1000),
        (1 << 16 | 8, 0x1000),
        (8, 0x1001),
        (8, 0x20_0000),
        (8, 0xf_ff00),
    ] {
        let mut driver = Driver::new(false);
        driver.negotiate(V1);
        driver.queue(0, size, base);
        driver.queue(1, 16, 0x2000);
        driver.driver_ok();
        assert_eq!(driver.activations(), 0, "{size} {base:#x}");
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{size} {base:#x}");
        // The machine goes on; a reset makes the device usable.
        assert_eq!(driver.failures.load(Ordering::SeqCst), 0);
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        driver.negotiate(V1);
        driver.queue(0, 8, 0x1000);
        driver.queue(1, 16, 0x2000);
        driver.driver_ok();
        assert_eq!(driver.activations(), 1);
    }
}

#[test]
fn a_reset_stops_the_device_and_forgets_its_queues() {
    let mut driver = Driver::active(V1);
    driver.set_status(0);
    assert_eq!(driver.seen.resets.load(Ordering::SeqCst), 1);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(driver.transport.driver_features, 0);
    // Resetting what is not active does not reach the device.
    driver.set_status(0);
    assert_eq!(driver.seen.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn a_device_that_cannot_start_is_reported() {
    let mut driver = Driver::new(true);
    driver.negotiate(V1);
    driver.queue(0, 8, 0x1000);
    driver.queue(1, 16, 0x2000);
    driver.driver_ok();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert_eq!(driver.failures.load(Ordering::SeqCst), 1);
}

#[test]
fn accesses_of_odd_width_or_place_do_nothing() {
    let mut driver = Driver::active(V1);
    driver
        .transport
        .write(reg::VIRTIO_MMIO_STATUS.into(), &[0; 2]);
    driver
        .transport
        .write(reg::VIRTIO_MMIO_STATUS.into(), &[0; 8]);
    driver
        .transport
        .write(u64::from(reg::VIRTIO_MMIO_STATUS) + 1, &[0; 4]);
    assert_ne!(driver.status(), 0);
    // Nor does what is written to the configuration space.
    driver
        .transport
        .write(reg::VIRTIO_MMIO_CONFIG.into(), &[9; 4]);
    assert_eq!(
        driver.read(reg::VIRTIO_MMIO_CONFIG).to_le_bytes(),
        [1, 2, 3, 4]
    );
}

#[test]
fn a_clones_device_goes_on_where_its_templates_was() {
    let template = Driver::active(FEATURES);
    template.transport.interrupt.config(0, &[8]).unwrap();
    // The device has served 5 of queue 0, and the second queue's index has gone round.
    let memory = template.transport.memory.memory();
    let set = |at, used: u16| memory.write_obj(used.to_le(), GuestAddress(at)).unwrap();
    set(template.transport.slots[0].said.device + 2, 5);
    set(template.transport.slots[1].said.device + 2, 0xfff0);
    let saved = serde_json::to_string(&template.transport.save()).unwrap();

    let mut clone = Driver::new(false);
    clone.transport.memory = template.transport.memory.clone();
    let state = serde_json::from_str(&saved).unwrap();
    clone.transport.restore(&state).unwrap();
    assert_eq!(clone.activations(), 1);
    let activation = clone.seen.last.lock().unwrap().take().unwrap();
    assert_eq!(activation.features, FEATURES);
    for (queue, used) in activation.queues.iter().zip([5, 0xfff0]) {
        assert_eq!(
            (queue.queue.next_avail(), queue.queue.next_used()),
            (used, used)
        );
    }
    for register in [reg::VIRTIO_MMIO_STATUS, reg::VIRTIO_MMIO_INTERRUPT_STATUS] {
        assert_eq!(clone.read(register), template.read(register));
    }
    assert_eq!(clone.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    // The configuration is its own, as its network address is.
    assert_eq!(
        clone.read(reg::VIRTIO_MMIO_CONFIG).to_le_bytes(),
        [1, 2, 3, 4]
    );

    // A device that was not in use is not, and one that is another is refused.
    let idle = Driver::new(false).transport.save();
    let mut clone = Driver::new(false);
    clone.transport.restore(&idle).unwrap();
    assert_eq!(clone.activations(), 0);
    let other = saved.replace("\"device\":42", "\"device\":1");
    let other = serde_json::from_str(&other).unwrap();
    let error = clone.transport.restore(&other).unwrap_err();
    assert!(error.contains("type 1"), "{error}");
    let more = saved.replace(
        &format!("\"driver_features\":{FEATURES}"),
        "\"driver_features\":255",
    );
    let more = serde_json::from_str(&more).unwrap();
    assert!(clone.transport.restore(&more).is_err());
}

#[test]
fn a_queue_without_its_feature_need_not_be_ready() {
    for (features, status) in [(V1 | ONE_QUEUE, 0xf), (V1, 0xf | NEEDS_RESET)] {
        let mut driver = Driver::new(false);
        driver.negotiate(features);
        driver.queue(0, 8, 0x1000);
        driver.driver_ok();
        assert_eq!(driver.status(), status);
        let last = driver.seen.last.lock().unwrap();
        let queues = last.as_ref().map(|activation| activation.queues.len());
        assert_eq!(queues, (status == 0xf).then_some(1));
    }
}
