//! The rings in guest memory, and what their descriptors point at.

use caisson_vmm_protocol::ExitReason;

use super::Host;
use super::driver::*;
use super::machine::{FREE, MEMORY_MIB, Program};

const END: u64 = (MEMORY_MIB as u64) << 20;

type Attack = fn(&mut Program, &Queue);

/// A chain of one buffer to read and one to write, so that it suits every device's queues a little.
fn chain(p: &mut Program, queue: &Queue, readable: (u64, u32), writable: (u64, u32)) {
    queue.descriptor(p, 0, readable, NEXT, 1);
    queue.descriptor(p, 1, writable, WRITE, 0);
    queue.heads(p, 0);
}

/// Attacks on a ring that a device works on. Some end the machine.
const ATTACKS: [(&str, Attack); 12] = [
    // must-test: a descriptor's bounds not checked against guest memory (Firecracker CVE-2019-18960)
    ("an address in a device's window", |p, q| {
        chain(p, q, (WINDOWS, 4096), (WINDOWS, 4096));
    }),
    ("an address behind all memory", |p, q| {
        chain(p, q, (1 << 40, 4096), (END - 4, 4096));
    }),
    ("an address that wraps around", |p, q| {
        chain(p, q, (u64::MAX - 7, 64), (u64::MAX - 7, u32::MAX));
    }),
    // must-test: block: get_host_address without the length (Dragonball a957054dd3)
    ("a length of 4 GiB", |p, q| {
        chain(p, q, (q.buffer(), u32::MAX), (q.buffer(), u32::MAX));
    }),
    ("lengths of nothing", |p, q| {
        chain(p, q, (q.buffer(), 0), (q.buffer(), 0));
    }),
    ("a chain that is a circle", |p, q| {
        q.descriptor(p, 0, (q.buffer(), 64), NEXT, 1);
        q.descriptor(p, 1, (q.buffer(), 64), NEXT | WRITE, 0);
        q.heads(p, 0);
    }),
    ("a next descriptor that is not there", |p, q| {
        q.descriptor(p, 0, (q.buffer(), 64), NEXT, SIZE + 5);
        q.heads(p, 0);
    }),
    ("a head that is not there", |p, q| q.heads(p, 0x7fff)),
    // must-test: a malformed available index answered with unwrap()
    ("an index far ahead", |p, q| {
        chain(p, q, (q.buffer(), 64), (q.buffer(), 64));
        p.add16(q.available + 2, 0x8000);
    }),
    ("indirect tables that are none", |p, q| {
        q.descriptor(p, 0, (WINDOWS, 64), INDIRECT, 0);
        q.descriptor(p, 1, (q.descriptors, 17), INDIRECT, 0);
        q.heads(p, 0);
        p.write16(q.available + 4, 1);
    }),
    // must-test: the same descriptor head in flight twice (Cloud Hypervisor CVE-2026-45782)
    ("one head many times", |p, q| {
        chain(p, q, (q.buffer(), 64), (q.buffer() + 0x800, 64));
        q.offer(p, SIZE - 1);
    }),
    ("a table that changes while it is read", |p, q| {
        chain(p, q, (q.buffer(), 64), (q.buffer() + 0x800, 64));
        q.offer(p, SIZE - 1);
        p.storm(q.descriptors, 0x7f, 3000);
        q.notify(p);
        p.storm(q.available, 0x1f, 3000);
    }),
];

#[test]
fn rings_that_are_not_what_they_should_be() {
    let Some(host) = Host::new() else { return };
    // Both disks are one kind of device.
    for (name, device, _) in DEVICES.into_iter().filter(|one| one.1 != LAYERS) {
        let mut blamed = 0;
        for (what, attack) in ATTACKS {
            let end = host.attack(&format!("{name}: {what}"), |p| {
                for queue in drive(p, device) {
                    attack(p, &queue);
                    queue.offer(p, 1);
                    p.wait16_briefly(queue.used_index(), 1);
                }
            });
            blamed += u32::from(matches!(end.reason, ExitReason::GuestError(_)));
        }
        assert!(blamed > 3, "{name} minds nothing");
    }
}

#[test]
fn rings_where_no_memory_is() {
    let Some(host) = Host::new() else { return };
    let console = host.survived("rings elsewhere", |p| {
        for (_, device, queues) in DEVICES {
            for place in [WINDOWS, END - 16, END, 1 << 40, u64::MAX - 63, FREE + 1] {
                begin(p, device);
                for index in 0..queues {
                    let mut queue = Queue::new(device, index);
                    queue.clear(p);
                    queue.used = place;
                    queue.configure(p);
                }
                activate(p, device);
                p.show(register(device, STATUS));
                p.write32(register(device, NOTIFY), 0);
            }
        }
    });
    // Each was refused: the device wants a reset.
    assert_eq!(
        console.matches("0000004f").count(),
        DEVICES.len() * 6,
        "{console}"
    );
}

// must-test: memory never returned to the host
#[test]
fn reports_of_pages_that_are_not_free() {
    let Some(host) = Host::new() else { return };
    let report = |p: &mut Program, address: u64, length: u32| {
        let queue = drive(p, BALLOON)[2];
        // What a good driver says of memory that it does not use; it can be used again at once.
        let free = FREE + (16 << 20);
        p.fill(free, 0xaa, 0x1000);
        queue.descriptor(p, 0, (free, 0x1000), WRITE, 0);
        queue.heads(p, 0);
        queue.offer(p, 1);
        queue.drain(p);
        p.show(free).write32(free, 0x5555_5555).show(free);
        queue.descriptor(p, 0, (address, length), WRITE, 0);
        queue.offer(p, 1);
        p.wait16(queue.used_index(), 2);
    };
    let console = host.survived("free pages", |p| report(p, FREE + (17 << 20), 1 << 20));
    assert!(console.contains("00000000\n55555555\n"), "{console}");
    // What the device finds there next is zeroes; the guest may be gone before that.
    let rings = Queue::new(BALLOON, 2).descriptors;
    host.attack("report of its own rings", |p| report(p, rings, 0x1_0000));
    for (what, address, length) in [
        ("half a page", FREE, 0x800),
        ("a window", WINDOWS, 0x1000),
        ("an address that wraps around", u64::MAX - 0xfff, 0x2000),
    ] {
        let end = host.attack(&format!("report of {what}"), |p| report(p, address, length));
        assert!(
            matches!(end.reason, ExitReason::GuestError(_)),
            "{what}: {:?}",
            end.reason
        );
    }
}

/// Random requests in chains that are right: bytes to read, room to write, a byte for a status.
fn storm(p: &mut Program, queue: &Queue, template: &[u8], mask: u64, turns: u64) {
    let (request, reply) = (queue.buffer(), queue.buffer() + 0x1000);
    queue.descriptor(p, 0, (request, 0x400), NEXT, 1);
    queue.descriptor(p, 1, (reply, 0x400), NEXT | WRITE, 2);
    queue.descriptor(p, 2, (reply + 0x800, 1), WRITE, 0);
    queue.heads(p, 0);
    p.repeat(turns, |p| {
        p.put(request, template);
        p.storm(request, mask, 3);
        queue.offer(p, 1);
        queue.drain(p);
    });
}

#[test]
fn any_request_in_a_good_ring() {
    let Some(host) = Host::new() else { return };
    // A packet from this guest to the host; a request of the file system for its root.
    let packet = [3u64, 2].map(u64::to_le_bytes).concat();
    let request = [
        [0x400u32, 1, 7, 0, 1, 0].map(u32::to_le_bytes).concat(),
        vec![0; 16],
    ]
    .concat();
    for (name, device, index, template, mask) in [
        ("disk", DISK, 0, &b""[..], 0xf),
        ("layers", LAYERS, 0, b"", 0xf),
        ("net", NET, 1, b"", 0x1f),
        ("vsock", VSOCK, 1, &packet, 0x3f),
        ("fs", FS, 1, &request, 0x7f),
    ] {
        let end = host.attack(&format!("{name}: any request"), |p| {
            let queue = drive(p, device)[index];
            storm(p, &queue, template, mask, 200);
        });
        assert_eq!(end.reason, ExitReason::PoweredOff, "{name}");
    }
}

#[test]
fn a_frame_that_the_kernel_refuses_holds_its_ring_up_until_a_reset() {
    let Some(host) = Host::new() else { return };
    let frame = |p: &mut Program| {
        let queue = drive(p, VHOST)[1];
        queue.descriptor(p, 0, (queue.buffer(), 0x400), 0, 0);
        queue.heads(p, 0);
        queue
    };
    let console = host.survived("vhost: any header", |p| {
        p.repeat(30, |p| {
            let queue = frame(p);
            p.storm(queue.buffer(), 0xf, 3);
            queue.offer(p, 1);
            p.wait16_briefly(queue.used_index(), 1);
        });
        // Needs a checksum far behind its end.
        let queue = frame(p);
        p.write64(queue.buffer(), 1 | 0x7fff << 48);
        queue.offer(p, 1);
        p.wait16_briefly(queue.used_index(), 1);
        p.show(queue.used_index());
        let queue = frame(p);
        queue.offer(p, 1);
        p.wait16(queue.used_index(), 1);
        p.show(queue.used_index());
    });
    assert!(console.ends_with("00000001\ndone\n"), "{console}");
}
