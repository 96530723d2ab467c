//! The whole device, driven from both ends.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::Duration;

use caisson_vmm_protocol::{READY_PORT, SETTLED_PORT};

use super::packet::{Header, MAX_PAYLOAD, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::testing::{CID, Guest, LONG, MOMENT, Peer, noise, read_all};
use super::{MAX_CONNECTIONS, Vsock, VsockError};
use crate::virtio::testing::{Desc, wait_until};
use crate::virtio::{DeviceError, VirtioDevice};

#[test]
fn the_device_says_who_the_guest_is() {
    let guest = Guest::asleep();
    assert_eq!(guest.device.config(), [CID as u8, 0, 0, 0, 0, 0, 0, 0]);
    for cid in [0, 2, u32::MAX] {
        let made = Vsock::new(cid, None, std::sync::Arc::new(|_| ()));
        assert!(matches!(made, Err(VsockError::BadCid(c)) if c == cid));
    }
}

#[test]
fn bytes_pass_both_ways_and_each_direction_ends_by_itself() {
    let guest = Guest::awake();
    let (mut client, peer) = guest.connect(1024);
    client.write_all(b"question").unwrap();
    assert_eq!(peer.take_bytes(8), b"question");
    client.shutdown(Shutdown::Write).unwrap();
    let (shut, _) = guest.expect(op::SHUTDOWN);
    assert_eq!(shut.flags, SHUTDOWN_SEND);
    // The other direction still works.
    peer.push(b"answer");
    peer.say(op::SHUTDOWN, SHUTDOWN_SEND);
    assert_eq!(read_all(&client), b"answer");
    let (shut, _) = guest.expect(op::SHUTDOWN);
    assert_eq!(shut.flags, SHUTDOWN_BOTH);
    peer.say(op::RST, 0);
    guest.flush();
    guest.expect_silence();
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone_before_it_is_asked_for_others() {
    const BUFFER: u64 = 0x9_0000;
    let mut guest = Guest::asleep();
    guest.device.begin_anew();
    guest.wake();
    guest.post_all();
    let connector = guest.connector();
    let connected = std::thread::spawn(move || connector.connect(1025, LONG).is_ok());
    assert!(guest.packet(MOMENT).is_none(), "it has no event buffers");
    for number in 0..3 {
        guest.event.add(&[Desc::write(BUFFER + number * 8, 4)]);
    }
    guest.event.notify();
    wait_until("an event", || guest.event.used_index() == 1);
    let (head, length) = guest.event.last_used(1)[0];
    assert_eq!((head, length), (0, 4));
    assert_eq!(guest.event.bytes(BUFFER, 4), [0; 4]);
    assert!(guest.packet(MOMENT).is_none(), "it has not heard");
    guest.event.make_available(0);
    guest.event.notify();
    guest.accept(1025);
    assert!(connected.join().unwrap());
    assert_eq!(guest.event.used_index(), 1);
}

#[test]
fn the_guests_half_close_leaves_the_other_direction_open() {
    let guest = Guest::awake();
    let (mut client, peer) = guest.connect(1);
    peer.say(op::SHUTDOWN, SHUTDOWN_SEND);
    assert_eq!(read_all(&client), b"");
    client.write_all(b"more").unwrap();
    assert_eq!(peer.take_bytes(4), b"more");
    drop(client);
    assert_eq!(
        guest.expect(op::SHUTDOWN).0.flags & SHUTDOWN_SEND,
        SHUTDOWN_SEND
    );
}

#[test]
fn a_guest_that_does_not_receive_fails_the_clients_writes() {
    let guest = Guest::awake();
    let (mut client, peer) = guest.connect(1);
    peer.say(op::SHUTDOWN, SHUTDOWN_RECEIVE);
    wait_until("writes fail", || client.write_all(b"x").is_err());
    peer.push(b"still sends");
    peer.say(op::SHUTDOWN, SHUTDOWN_BOTH);
    assert_eq!(read_all(&client), b"still sends");
}

#[test]
fn what_a_client_wrote_before_it_closed_reaches_the_guest() {
    let guest = Guest::awake();
    let (mut client, peer) = guest.connect(1);
    let bytes = noise(100_000);
    client.write_all(&bytes).unwrap();
    drop(client);
    let mut got = Vec::new();
    let shut = loop {
        let (more, end) = peer.take(LONG);
        got.extend(more);
        // The end of its data may be seen before its going.
        if let Some(end) = end.filter(|h| h.flags == SHUTDOWN_BOTH) {
            break end;
        }
    };
    assert!(got == bytes);
    assert_eq!(shut.op, op::SHUTDOWN);
}

#[test]
fn a_refused_client_is_closed() {
    let guest = Guest::awake();
    let mut client = guest.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.requested(9);
    guest.send(
        Header {
            op: op::RST,
            ..Peer::new(&guest, request.src_port, 9).header(op::RST)
        },
        &[],
    );
    assert_eq!(read_all(&client), b"");
    let mut client = guest.client();
    client.write_all(b"HELLO\n").unwrap();
    assert!(matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)));
}

#[test]
fn a_connection_from_inside_waits_for_the_driver_and_for_the_answer() {
    let mut guest = Guest::asleep();
    let connector = guest.connector();
    let caller = std::thread::spawn(move || {
        let refused = connector.connect(7, LONG).map(drop);
        (refused, connector.connect(8, LONG))
    });
    std::thread::sleep(MOMENT);
    guest.wake();
    guest.post_all();
    let request = guest.requested(7);
    Peer::new(&guest, request.src_port, 7).say(op::RST, 0);
    let peer = guest.accept(8);
    let (refused, accepted) = caller.join().unwrap();
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let mut stream = accepted.unwrap();
    stream.write_all(b"ping").unwrap();
    assert_eq!(peer.take_bytes(4), b"ping");
    peer.push(b"pong");
    let mut pong = [0; 4];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"pong");
}

#[test]
fn a_caller_that_has_gone_is_not_connected() {
    let guest = Guest::awake();
    let late = guest.connector().connect(7, MOMENT).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::TimedOut);
    let request = guest.requested(7);
    guest.expect(op::RST);
    // The guest's answer comes too late.
    Peer::new(&guest, request.src_port, 7).say(op::RESPONSE, 0);
    guest.expect(op::RST);
}

#[test]
fn the_guest_can_only_say_that_it_is_ready_and_settled() {
    let guest = Guest::awake();
    let said = [
        (1024, 0),
        (READY_PORT, 1),
        (READY_PORT, 1),
        (0, 1),
        (SETTLED_PORT, 2),
        (READY_PORT, 2),
        (SETTLED_PORT, 2),
    ];
    for (port, readies) in said {
        let peer = Peer::new(&guest, port, 5555);
        peer.say(op::REQUEST, 0);
        let (reset, _) = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (port, 5555));
        assert_eq!(guest.readies.load(Ordering::SeqCst), readies);
    }
}

#[test]
fn the_device_sends_no_more_than_the_guest_has_room_for() {
    let guest = Guest::awake();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    let peer = Peer::new(&guest, guest.requested(1).src_port, 1);
    peer.buf_alloc.set(10);
    peer.say(op::RESPONSE, 0);
    client.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"0123456789");
    // It asks once, and not again while the answer is that there is no room.
    let (asked, _) = guest.packet(LONG).unwrap();
    assert_eq!(asked.op, op::CREDIT_REQUEST);
    peer.say(op::CREDIT_UPDATE, 0);
    guest.expect_silence();
    peer.fwd_cnt.set(4);
    peer.say(op::CREDIT_UPDATE, 0);
    assert_eq!(guest.expect(op::RW).1, b"abcd");
    peer.fwd_cnt.set(14);
    peer.say(op::CREDIT_UPDATE, 0);
    assert_eq!(guest.expect(op::RW).1, b"ef");
}

#[test]
fn a_slow_reader_holds_up_nobody_else_and_loses_nothing() {
    let guest = Guest::awake();
    let (slow, peer) = guest.connect(1);
    let chunk = noise(MAX_PAYLOAD as usize);
    let mut sent = 0;
    // Until the socket and the backlog are full.
    while peer.credit() >= MAX_PAYLOAD {
        peer.push(&chunk);
        sent += 1;
        guest.flush();
        peer.take(Duration::from_millis(5));
    }
    let (mut other, second) = guest.connect(2);
    second.push(b"through");
    let mut got = [0; 7];
    other.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"through");
    // The guest closes, which is confirmed at once; the reader still gets all of it.
    peer.say(op::SHUTDOWN, SHUTDOWN_BOTH);
    guest.expect(op::RST);
    let all = read_all(&slow);
    assert_eq!(all.len(), sent * chunk.len());
    assert!(all.chunks(chunk.len()).all(|c| c == chunk));
}

// must-test: vsock header read twice from guest memory, changed in between (Cloud Hypervisor 929df76e1)
// must-test: vsock descriptor bounds not checked against guest memory (Firecracker CVE-2019-18960)
// must-test: EPOLLIN/EPOLLOUT busy spin on a half-closed vsock stream
#[test]
fn a_half_closed_stream_that_nobody_may_read_does_not_keep_the_worker_busy() {
    let guest = Guest::awake();
    Peer::new(&guest, READY_PORT, 1).say(op::REQUEST, 0);
    guest.expect(op::RST);
    // The client has closed and left data for which the guest has no room.
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\nleft over").unwrap();
    let peer = Peer::new(&guest, guest.requested(1).src_port, 1);
    peer.buf_alloc.set(0);
    peer.say(op::RESPONSE, 0);
    guest.flush();
    drop(client);
    while guest.packet(MOMENT).is_some() {}
    // Another has half-closed, and one's guest end has, while the backlog is full.
    let (half, _) = guest.connect(2);
    half.shutdown(Shutdown::Write).unwrap();
    while guest.packet(MOMENT).is_some() {}
    let (_full, third) = guest.connect(3);
    while third.credit() >= MAX_PAYLOAD {
        third.push(&vec![1; MAX_PAYLOAD as usize]);
        guest.flush();
        third.take(Duration::from_millis(5));
    }
    third.say(op::SHUTDOWN, SHUTDOWN_SEND);
    while guest.packet(MOMENT).is_some() {}
    let before = guest.worker_time();
    std::thread::sleep(Duration::from_millis(500));
    let busy = Duration::from_nanos(guest.worker_time() - before);
    assert!(busy < Duration::from_millis(50), "{busy:?} of 500 ms");
}

#[test]
fn packets_wait_for_receive_buffers() {
    let mut guest = Guest::asleep();
    guest.wake();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.expect_silence();
    guest.post_all();
    let peer = guest.accept(1);
    guest.reposts.set(false);
    // More than all buffers hold.
    let bytes = noise(400_000);
    let writer = {
        let (mut client, bytes) = (client.try_clone().unwrap(), bytes.clone());
        std::thread::spawn(move || client.write_all(&bytes))
    };
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        let (more, end) = peer.take(MOMENT);
        assert!(end.is_none());
        got.extend(more);
        guest.repost();
        peer.say(op::CREDIT_UPDATE, 0);
    }
    assert!(got == bytes);
    writer.join().unwrap().unwrap();
}

// must-test: the RX gate hung after pause and resume
#[test]
fn what_comes_during_a_pause_is_served_after_it() {
    let mut guest = Guest::awake();
    let (_standing, host_port) = {
        let (client, peer) = guest.connect(1);
        (client, peer.host_port)
    };
    for round in 0..20_u8 {
        guest.device.pause();
        let mut client = guest.client();
        Peer::new(&guest, host_port, 1).say(op::CREDIT_REQUEST, 0);
        client.write_all(b"CONNECT 2\n").unwrap();
        client.write_all(&[round]).unwrap();
        let early = guest.packet(Duration::from_millis(2));
        assert!(early.is_none(), "{early:?}");
        guest.device.resume();
        // The answer to the guest and the client's request, in either order.
        let mut both = [guest.packet(LONG).unwrap().0, guest.packet(LONG).unwrap().0];
        both.sort_by_key(|h| h.op);
        assert_eq!(both.map(|h| h.op), [op::REQUEST, op::CREDIT_UPDATE]);
        let second = Peer::new(&guest, both[0].src_port, 2);
        second.say(op::RESPONSE, 0);
        assert_eq!(guest.expect(op::RW).1, [round]);
        second.say(op::RST, 0);
        guest.flush();
    }
}

#[test]
fn a_reset_ends_connections_and_the_device_can_be_activated_again() {
    let mut guest = Guest::awake();
    let chunk = noise(50_000);
    let client = {
        let (client, peer) = guest.connect(1);
        peer.push(&chunk);
        guest.flush();
        client
    };
    // Sent, and perhaps not seen by the worker yet.
    guest.device.reset();
    assert!(read_all(&client) == chunk);
    let mut again = Guest::asleep();
    std::mem::swap(&mut again.device, &mut guest.device);
    again.wake();
    again.post_all();
    let connector = again.connector();
    let caller = std::thread::spawn(move || connector.connect(5, LONG));
    again.accept(5);
    caller.join().unwrap().unwrap();
}

#[test]
fn what_the_guest_sent_last_is_delivered_when_the_machine_ends() {
    for _ in 0..20 {
        let guest = Guest::awake();
        let (client, peer) = guest.connect(1);
        let bytes = noise(60_000);
        peer.push(&bytes);
        peer.push(b"tail");
        let reader = std::thread::spawn(move || read_all(&client));
        drop(guest.device);
        let got = reader.join().unwrap();
        assert_eq!(got.len(), bytes.len() + 4);
        assert!(got.ends_with(b"tail"));
    }
}

#[test]
fn a_stopped_device_lets_nobody_wait() {
    let guest = Guest::awake();
    let connector = guest.connector();
    let waiting = connector.clone();
    let caller = std::thread::spawn(move || waiting.connect(5, LONG).map(drop));
    guest.requested(5);
    drop(guest);
    let kind = |r: io::Result<()>| r.unwrap_err().kind();
    assert_eq!(kind(caller.join().unwrap()), ErrorKind::ConnectionRefused);
    assert_eq!(
        kind(connector.connect(5, LONG).map(drop)),
        ErrorKind::NotConnected
    );
}

#[test]
fn connections_are_bounded() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let guest = Guest::awake();
    let mut clients = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let mut client = guest.client();
        client.write_all(b"CONNECT 1\n").unwrap();
        guest.requested(1);
        clients.push(client);
    }
    let mut refused = guest.client();
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    let error = guest.connector().connect(1, LONG).unwrap_err();
    assert!(error.to_string().contains("1024"), "{error}");
    // A client that goes makes room.
    drop(clients.pop());
    guest.expect(op::RST);
    let mut client = guest.client();
    client.write_all(b"CONNECT 3\n").unwrap();
    guest.requested(3);
}

#[test]
fn streams_are_exact_in_both_directions() {
    const LEN: usize = 16 << 20;
    let guest = Guest::awake();
    let (client, peer) = guest.connect(1);
    let bytes = noise(LEN);
    std::thread::scope(|scope| {
        let (mut out, back) = (client.try_clone().unwrap(), client);
        let sent = &bytes;
        scope.spawn(move || {
            out.write_all(sent).unwrap();
            out.shutdown(Shutdown::Write).unwrap();
        });
        let reader = scope.spawn(move || read_all(&back));
        // The guest is an echo: what it has taken it sends back, as credit allows.
        let mut taken = Vec::new();
        let (mut echoed, mut ended) = (0, false);
        while !ended || echoed < taken.len() {
            let (more, end) = peer.take(Duration::from_millis(1));
            ended |= end.is_some();
            taken.extend(more);
            while echoed < taken.len() && peer.credit() > 0 {
                let n = (peer.credit().min(MAX_PAYLOAD) as usize).min(taken.len() - echoed);
                peer.push(&taken[echoed..echoed + n]);
                echoed += n;
            }
            peer.say(op::CREDIT_UPDATE, 0);
        }
        assert!(taken == bytes);
        peer.say(op::SHUTDOWN, SHUTDOWN_SEND);
        assert!(reader.join().unwrap() == bytes);
    });
    assert!(!guest.has_failed());
}

#[test]
fn an_activation_without_its_queues_is_an_error() {
    let mut guest = Guest::asleep();
    let (activation, _failures) = crate::virtio::testing::activation(&[&guest.receive], 0);
    assert!(matches!(
        guest.device.activate(activation),
        Err(DeviceError::Host { .. })
    ));
}
