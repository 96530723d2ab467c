//! The registers of devices, and ports.

use caisson_vmm_protocol::ExitReason;

use super::driver::*;
use super::machine::{FREE, Program};
use super::{CONSOLE_LIMIT, Host};

/// Whether the machine still works: the entropy device answers.
fn still_works(p: &mut Program) {
    let queue = drive(p, RNG)[0];
    random_bytes(p, &queue, 1);
}

#[test]
fn any_value_in_any_register() {
    let Some(host) = Host::new() else { return };
    let console = host.survived("register storm", |p| {
        for (_, device, _) in DEVICES {
            p.storm(register(device, 0), 0xfff, 600);
            // From each state that a driver can come to.
            begin(p, device);
            p.storm(register(device, QUEUE_SIZE), 0x7f, 200);
            drive(p, device);
            p.storm(register(device, DEVICE_FEATURES), 0x3f, 100);
            p.storm(register(device, DESCRIPTORS), 0x3f, 100);
        }
        still_works(p);
    });
    assert!(console.contains("00000001\ndone"), "{console}");
}

// must-test: queue_select out of range (Cloud Hypervisor 082fdc4d0)
#[test]
fn queues_that_a_device_does_not_have() {
    let Some(host) = Host::new() else { return };
    let console = host.survived("queue_select", |p| {
        for (_, device, queues) in DEVICES {
            begin(p, device);
            for select in [u32::from(queues), 63, 0xffff, 0x1_0000, 1 << 31, u32::MAX] {
                p.write32(register(device, QUEUE_SELECT), select);
                p.show(register(device, QUEUE_SIZE_MAX));
                p.storm(register(device, QUEUE_SIZE), 0xc, 4);
                p.storm(register(device, DESCRIPTORS), 0x3c, 64);
                p.write32(register(device, QUEUE_READY), 1);
                p.show(register(device, QUEUE_READY));
                p.write32(register(device, NOTIFY), select);
            }
        }
        still_works(p);
    });
    let zeros = console.lines().filter(|line| *line == "00000000").count();
    assert!(zeros >= DEVICES.len() * 6 * 2, "{console}");
}

// must-test: queue addresses and sizes rewritten by the guest after activation (Firecracker CVE-2026-5747)
#[test]
fn queues_stay_where_they_were_at_activation() {
    let Some(host) = Host::new() else { return };
    let elsewhere = FREE + (16 << 20);
    let console = host.survived("moved queues", |p| {
        p.fill(elsewhere, 0xaa, 0x1_0000);
        let mut rng = None;
        for (_, device, _) in DEVICES {
            for queue in drive(p, device) {
                for address in [WINDOWS, u64::MAX - 4, elsewhere] {
                    let moved = Queue {
                        descriptors: address,
                        available: address,
                        used: address,
                        ..queue
                    };
                    moved.configure(p);
                }
                p.write32(register(device, QUEUE_SIZE), 0xffff);
                rng = (device == RNG).then_some(queue).or(rng);
            }
        }
        let rng = rng.unwrap();
        random_bytes(p, &rng, 1);
        p.show(elsewhere).show(elsewhere + 2);
    });
    assert!(
        console.contains("00000001\naaaaaaaa\naaaaaaaa\ndone"),
        "{console}"
    );
}

#[test]
fn a_driver_cannot_skip_a_step() {
    let Some(host) = Host::new() else { return };
    let console = host.survived("states", |p| {
        for (_, device, _) in DEVICES {
            let status = register(device, STATUS);
            // At once to the end; with features that are not offered; without queues.
            p.write32(status, 0).write32(status, 4).show(status);
            p.write32(status, 0xf).show(status);
            begin(p, device);
            p.write32(status, 0).write32(status, 1).write32(status, 3);
            p.write32(register(device, DRIVER_FEATURES), u32::MAX);
            p.write32(status, 0xb).show(status);
            begin(p, device);
            activate(p, device);
            p.show(status);
            p.write32(status, 0);
        }
        still_works(p);
    });
    // Not begun, not begun, features refused, in need of a reset: whatever the device.
    let states = "00000000\n00000000\n00000003\n0000004f\n";
    assert!(
        console.starts_with(&states.repeat(DEVICES.len())),
        "{console}"
    );
}

#[test]
fn resets_and_doorbells_without_end() {
    let Some(host) = Host::new() else { return };
    let console = host.survived("resets", |p| {
        p.repeat(20, |p| {
            for (_, device, _) in DEVICES {
                for queue in drive(p, device) {
                    // Queues that take room, so that the reset comes while a device holds it.
                    if device == RNG || ([NET, VHOST, VSOCK].contains(&device) && queue.index == 0)
                    {
                        queue.heads(p, 0);
                        queue.descriptor(p, 0, (queue.buffer(), 64), WRITE, 0);
                        queue.offer(p, 1);
                    }
                    queue.notify(p);
                }
                p.write32(register(device, STATUS), 0);
            }
        });
        for (_, device, _) in DEVICES {
            drive(p, device);
        }
        p.repeat(300, |p| {
            for (_, device, queues) in DEVICES {
                for index in (0..u32::from(queues)).chain([queues.into(), u32::MAX]) {
                    p.write32(register(device, NOTIFY), index);
                }
            }
        });
        still_works(p);
    });
    assert!(console.contains("00000001\ndone"), "{console}");
}

#[test]
fn configuration_spaces_end_where_they_end() {
    let Some(host) = Host::new() else { return };
    host.survived("configuration", |p| {
        for (_, device, _) in DEVICES {
            drive(p, device);
            for offset in [0, 1, 7, 8, 35, 39, 40, 41, 60, 64, 0x7ff, 0xefc, 0xef8] {
                let at = register(device, CONFIG + offset);
                p.show(at);
                p.write8(at, 0xff).write16(at, 0xffff);
                p.write32(at, u32::MAX).write64(at, u64::MAX);
            }
        }
        // Beside the windows: nothing is there.
        for at in [
            WINDOWS - 8,
            register(DEVICES.len() as u64, 0),
            register(127, 0xff8),
            register(128, 0),
        ] {
            p.show(at).write64(at, u64::MAX);
        }
        still_works(p);
    });
}

#[test]
fn ports_and_a_console_flood() {
    let Some(host) = Host::new() else { return };
    let end = host.attack("console flood", |p| {
        // All ports but those that end the machine, and the last one, which is the console's.
        for port in (0..0x700).filter(|port| ![0x64, 0x505, 0x600, 0x602].contains(port)) {
            p.out8(port, 0xa5, 1);
        }
        // The 16550 as it was: no divisor latch, no loop.
        p.out8(0x3fb, 3, 1).out8(0x3fc, 0, 1);
        p.out8(0x3f8, b'x', 2 * CONSOLE_LIMIT);
    });
    assert_eq!(end.reason, ExitReason::PoweredOff);
    let kept = end.console.len() as u64;
    assert!(
        (CONSOLE_LIMIT / 2..CONSOLE_LIMIT + 4096).contains(&kept),
        "{kept}"
    );
}
