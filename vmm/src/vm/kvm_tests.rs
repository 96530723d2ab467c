//! A few instructions on a real KVM: every way in which a guest ends or is ended. They run on an
//! emulating KVM, too.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use caisson_vmm_protocol::{ExitReason, VmState};
use vm_memory::{Bytes, GuestAddress};
use vm_superio::Serial;

use super::*;
use crate::arch::layout::{self, MemorySize};
use crate::arch::regs;

const CODE: u64 = 0x2_0000;

/// A machine whose boot processor runs this code; `None`, loudly, where there is no KVM.
fn machine(code: &[u8]) -> Option<(Machine, std::fs::File)> {
    let device = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(device) => device,
        Err(error) => {
            eprintln!("skipped: /dev/kvm cannot be opened: {error}");
            return None;
        }
    };
    let size = MemorySize {
        first: 64 << 20,
        added: 0,
    };
    let vm = KvmVm::new(OwnedFd::from(device), size, Content::Nothing).unwrap();
    vm.memory().write_slice(code, GuestAddress(CODE)).unwrap();
    regs::write_boot_tables(vm.memory()).unwrap();
    let vcpus = vm.create_vcpus(2, 2, GuestAddress(CODE)).unwrap();
    let console = tempfile::tempfile().unwrap();
    let serial = Serial::new(
        SerialLine(vm.interrupt_line(layout::SERIAL_GSI).unwrap()),
        Console::new(console.try_clone().unwrap(), 100).unwrap(),
    );
    let ending = Ending::new();
    let saver = vm.saver(&vcpus).unwrap();
    let bus = Arc::new(Bus::new(serial, Vec::new(), Arc::clone(&ending)));
    let vcpus = Vcpus::start(vcpus, &bus, &ending).unwrap();
    Some((Machine::new(vm, vcpus, bus, ending, saver, None), console))
}

/// `mov dx, port; mov al, value; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `jmp .`
const SPIN: [u8; 2] = [0xeb, 0xfe];

#[test]
fn each_way_to_end_has_its_reason() {
    let power_off = out(layout::SLEEP_CONTROL_PORT, 5 << 2 | 1 << 5);
    let cases = [
        (power_off, ExitReason::PoweredOff),
        (
            out(layout::RESET_PORT, layout::RESET_VALUE),
            ExitReason::Reset,
        ),
        (
            out(layout::I8042_PORT, layout::I8042_RESET),
            ExitReason::Reset,
        ),
        (out(layout::PVPANIC_PORT, 1), ExitReason::Panicked),
    ];
    for (mut code, reason) in cases {
        code.extend(SPIN);
        let Some((machine, _)) = machine(&code) else {
            return;
        };
        assert_eq!(machine.ending().wait(), reason);
        assert_eq!(machine.state(), VmState::Exited);
        machine.stop();
    }
}

#[test]
fn what_ends_nothing_goes_on_to_what_does() {
    // Another sleep state, another reset value, ports where nothing is, then the console and the end.
    let mut code = Vec::new();
    for (port, value) in [
        (layout::SLEEP_CONTROL_PORT, 1 << 2 | 1 << 5),
        (layout::SLEEP_CONTROL_PORT, 5 << 2),
        (layout::RESET_PORT, 7),
        (layout::PVPANIC_PORT, 0),
        (0xcf8, 1),
        (layout::SERIAL_PORT, b'h'),
        (layout::SERIAL_PORT, b'i'),
    ] {
        code.extend(out(port, value));
    }
    code.extend(out(layout::PVPANIC_PORT, 1));
    code.extend(SPIN);
    let Some((machine, mut console)) = machine(&code) else {
        return;
    };
    assert_eq!(machine.ending().wait(), ExitReason::Panicked);
    machine.stop();
    let mut text = String::new();
    std::io::Seek::rewind(&mut console).unwrap();
    std::io::Read::read_to_string(&mut console, &mut text).unwrap();
    assert_eq!(text, "hi");
}

#[test]
fn a_spinning_guest_is_paused_resumed_and_stopped() {
    // `inc qword [0x30000]; jmp` back to it.
    let code = [0x48, 0xff, 0x04, 0x25, 0, 0, 3, 0, 0xeb, 0xf6];
    let Some((machine, _)) = machine(&code) else {
        return;
    };
    let count = || -> u64 {
        machine
            .vm
            .memory()
            .read_obj(GuestAddress(0x3_0000))
            .unwrap()
    };
    let moves = |from: u64| {
        let begun = Instant::now();
        while count() == from {
            assert!(begun.elapsed() < Duration::from_secs(20), "it stands still");
            std::thread::yield_now();
        }
    };
    moves(0);
    for _ in 0..20 {
        machine.pause();
        machine.pause();
        assert_eq!(machine.state(), VmState::Paused);
        let stopped = count();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(count(), stopped);
        machine.resume();
        moves(stopped);
    }
    machine.ending().end(ExitReason::Killed);
    machine.stop();
    let stopped = count();
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(count(), stopped);
}
