use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::super::testing::{Desc, Driver, Interrupts, activation, memory, wait_until};
use super::*;

/// The device's memory in these tests: 8 blocks of 32 KiB from here on.
const START: u64 = 0x8_0000;
const BLOCK: u64 = 0x8000;

struct Machine {
    memory: Memory,
    driver: Driver,
    interrupts: Arc<Interrupts>,
    device: Mem,
    failures: Receiver<String>,
    asked: u16,
}

impl Machine {
    fn new(plugged: bool) -> Self {
        let memory = memory();
        let interrupts: Arc<Interrupts> = Arc::default();
        let driver = Driver::numbered(&memory, 64, 0, Arc::clone(&interrupts));
        let mut device = Mem::of(Blocks::new(START, 8 * BLOCK, BLOCK, plugged));
        let (start, failures) = activation(&[&driver], 0);
        device.activate(start).unwrap();
        Self {
            memory,
            driver,
            interrupts,
            device,
            failures,
            asked: 0,
        }
    }

    fn send(&mut self, request: &[u8], room: u32) {
        self.driver.put(0x5000, request);
        self.driver.put(0x6000, &[0xee; RESPONSE]);
        self.driver.recycle();
        self.driver.add(&[
            Desc::read(0x5000, request.len() as u32),
            Desc::write(0x6000, room),
        ]);
        self.driver.notify();
    }

    /// The answer to a request, and what of it is said of the state.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        self.send(&request(kind, address, count), RESPONSE as u32);
        self.asked += 1;
        let asked = self.asked;
        wait_until("answered", || self.driver.used_index() == asked);
        let answer = self.driver.bytes(0x6000, RESPONSE);
        let half = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (half(0), half(8))
    }

    /// What the driver finds as `plugged_size`.
    fn plugged(&self) -> u64 {
        let told = self.interrupts.silent_configs();
        let (offset, bytes) = told.last().unwrap();
        assert_eq!(*offset, PLUGGED_SIZE);
        u64::from_le_bytes(bytes.as_slice().try_into().unwrap())
    }
}

fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; REQUEST];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

#[test]
fn the_driver_is_told_what_is_wanted_and_takes_it_in_use() {
    let mut machine = Machine::new(false);
    let wanted = (REQUESTED_SIZE, (8 * BLOCK).to_le_bytes().to_vec());
    wait_until("told", || machine.interrupts.configs().len() == 1);
    assert_eq!(machine.interrupts.configs(), [wanted]);
    assert_eq!(machine.ask(PLUG, START, 6), ACK);
    assert_eq!(machine.plugged(), 6 * BLOCK);
    assert_eq!(machine.ask(STATE, START, 6), (0, 0));
    assert_eq!(machine.ask(STATE, START + 6 * BLOCK, 2), (0, 1));
    assert_eq!(machine.ask(STATE, START, 8), (0, 2));
    assert_eq!(machine.ask(PLUG, START + 6 * BLOCK, 2), ACK);
    assert_eq!(machine.plugged(), 8 * BLOCK);
    // Of what it does by itself the driver is not told.
    assert_eq!(machine.interrupts.configs().len(), 1);
    // What is usable ends behind what is wanted.
    assert_eq!(machine.ask(PLUG, START + 8 * BLOCK, 1), NACK);
    assert!(machine.failures.try_recv().is_err());
}

#[test]
fn what_is_given_back_is_zero_and_can_be_had_again() {
    let mut machine = Machine::new(true);
    machine.driver.put(START, &[7; 3 * BLOCK as usize]);
    assert_eq!(machine.ask(UNPLUG, START + BLOCK, 1), ACK);
    assert_eq!(machine.plugged(), 7 * BLOCK);
    for (block, byte) in [(0, 7), (1, 0), (2, 7)] {
        let found = machine.driver.bytes(START + block * BLOCK, BLOCK as usize);
        assert!(found.iter().all(|b| *b == byte), "block {block}");
    }
    assert_eq!(machine.ask(PLUG, START + BLOCK, 1), ACK);
    assert_eq!(machine.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(machine.plugged(), 0);
    assert_eq!(machine.driver.bytes(START, 16), [0; 16]);
    // All that was there before is in use already, so nobody is told.
    assert!(machine.interrupts.configs().is_empty());
}

#[test]
fn what_is_in_use_outlives_a_reset() {
    let mut machine = Machine::new(false);
    assert_eq!(machine.ask(PLUG, START, 8), ACK);
    machine.device.reset();
    machine.driver = Driver::numbered(&machine.memory, 64, 0, Arc::clone(&machine.interrupts));
    machine.asked = 0;
    let (start, _failures) = activation(&[&machine.driver], 0);
    machine.device.activate(start).unwrap();
    assert_eq!(machine.ask(STATE, START, 8), (0, 0));
    assert_eq!(machine.ask(PLUG, START, 1), ERROR);
}

#[test]
fn requests_for_what_is_not_there_are_refused() {
    let mut machine = Machine::new(false);
    assert_eq!(machine.ask(PLUG, START, 4), ACK);
    for (kind, address, count) in [
        (PLUG, START, 1),
        (PLUG, START + 3 * BLOCK, 2),
        (PLUG, START + 5 * BLOCK, 4),
        (PLUG, START + 1, 1),
        (PLUG, START, 0),
        (PLUG, START - BLOCK, 1),
        (PLUG, 0, u16::MAX),
        (PLUG, u64::MAX, 1),
        (UNPLUG, START + 3 * BLOCK, 2),
        (UNPLUG, START + 4 * BLOCK, 1),
        (UNPLUG, START, u16::MAX),
        (STATE, START + 8 * BLOCK, 1),
        (STATE, START, 9),
        (4, START, 1),
        (u16::MAX, START, 1),
    ] {
        let answer = machine.ask(kind, address, count);
        assert_eq!(answer, ERROR, "{kind}, {address:#x}, {count}");
    }
    assert_eq!(machine.plugged(), 4 * BLOCK);
    assert!(machine.failures.try_recv().is_err());
}

#[test]
fn a_request_without_its_bytes_or_room_is_the_guests_fault() {
    for (length, room, what) in [
        (REQUEST - 1, RESPONSE, "shorter than 24 bytes"),
        (REQUEST, RESPONSE - 1, "no room for the answer"),
    ] {
        let mut machine = Machine::new(false);
        machine.send(&request(PLUG, START, 1)[..length], room as u32);
        let reason = machine.failures.recv_timeout(Duration::from_secs(30));
        let reason = reason.unwrap();
        assert!(reason.contains("virtio-mem driver broke"), "{reason}");
        assert!(reason.contains(what), "{reason}");
    }
}

#[test]
fn the_configuration_is_as_the_driver_expects_it() {
    let device = Mem::new(96 << 20, false);
    let field = |at: usize| u64::from_le_bytes(device.config()[at..at + 8].try_into().unwrap());
    assert_eq!(device.config().len(), CONFIG);
    assert_eq!((field(0), field(8)), (layout::ADDED_BLOCK, 0));
    assert_eq!(
        (field(16), field(24)),
        (layout::ADDED.0, layout::ADDED_MOST)
    );
    // Usable is a whole block of Linux', wanted is less.
    assert_eq!((field(32), field(40), field(48)), (128 << 20, 0, 96 << 20));
    let restored = Mem::new(96 << 20, true);
    assert_eq!(restored.config()[40..48], restored.config()[48..56]);
}
