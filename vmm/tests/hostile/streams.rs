//! The vsock device: floods, and streams that nobody answers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use caisson_vmm_protocol::READY_PORT;

use super::Host;
use super::driver::*;
use super::machine::Program;

/// Operations (virtio 1.2 §5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
/// Clients that connect and get no answer.
const CLIENTS: usize = 200;

/// A header from this guest's port 7 to the host.
fn header(port: u32, operation: u16, length: u32) -> Vec<u8> {
    let mut bytes = [3u64, 2].map(u64::to_le_bytes).concat();
    bytes.extend([7u32, port, length].map(u32::to_le_bytes).concat());
    bytes.extend([1u16, operation].map(u16::to_le_bytes).concat());
    // Flags, and credit that is a lie.
    bytes.extend([3u32, u32::MAX, u32::MAX].map(u32::to_le_bytes).concat());
    bytes
}

/// Sends one packet again and again, each time from another port.
fn flood(p: &mut Program, queue: &Queue, packet: &[u8], times: u64) {
    let at = queue.buffer();
    p.put(at, packet);
    queue.descriptor(p, 0, (at, 44), NEXT, 1);
    queue.descriptor(p, 1, (at + 0x100, 0x100), 0, 0);
    queue.heads(p, 0);
    p.repeat(times, |p| {
        queue.offer(p, 1);
        queue.drain(p);
        p.add16(at + 16, 1);
    });
}

#[test]
fn packets_of_connections_that_are_not_there() {
    let Some(host) = Host::new() else { return };
    host.survived("vsock flood", |p| {
        let queues = drive(p, VSOCK);
        for operation in [
            REQUEST,
            RESPONSE,
            RST,
            SHUTDOWN,
            RW,
            CREDIT_UPDATE,
            CREDIT_REQUEST,
            0,
            99,
        ] {
            for port in [0, 1, READY_PORT, 1 << 30, u32::MAX] {
                flood(p, &queues[1], &header(port, operation, 64), 40);
            }
            flood(p, &queues[1], &header(9, operation, u32::MAX), 10);
        }
    });
}

#[test]
fn streams_that_the_guest_leaves_half_open() {
    let Some(host) = Host::new() else { return };
    let mut vm = host.boot(|p| {
        let queues = drive(p, VSOCK);
        // Takes what comes, answers nothing, and goes on for a while.
        let receive = &queues[0];
        for index in 0..SIZE {
            let at = receive.buffer() + 0x400 * u64::from(index);
            receive.descriptor(p, index, (at, 0x400), WRITE, 0);
            p.write16(receive.available + 4 + 2 * u64::from(index), index);
        }
        receive.offer(p, SIZE);
        p.wait16(receive.used_index(), SIZE);
        p.say("taken\n");
        p.repeat(200, |p| {
            p.spin(100_000);
        });
    });
    let socket = vm.dir.path().join("vsock");
    let clients: Vec<_> = (0..CLIENTS)
        .map(|i| {
            let mut client = UnixStream::connect(&socket).unwrap();
            // Every second one does not even say where it wants to go.
            let line = if i % 2 == 0 { "CONNECT 1024\n" } else { "CONN" };
            client.write_all(line.as_bytes()).unwrap();
            client
        })
        .collect();
    vm.wait_for("taken");
    // The rest of the process does not wait for the guest.
    assert_eq!(vm.status().version, caisson_vmm_protocol::PROTOCOL_VERSION);
    host.end("half-open streams", vm);
    for mut client in clients {
        client
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        assert!(answer.is_empty(), "nobody answered: {answer:?}");
    }
}
