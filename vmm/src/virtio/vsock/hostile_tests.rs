//! A guest that breaks the rules ends its connection or, where a ring is no ring, its machine; never the process.

use std::sync::{Arc, Mutex};

use super::connection::BUF_ALLOC;
use super::packet::{HEADER_LEN, Header, MAX_PAYLOAD, SHUTDOWN_BOTH, op};
use super::testing::{CID, Guest, LONG, noise, read_all};
use crate::virtio::testing::{Desc, wait_until};
use std::io::Write;

#[test]
fn a_guest_that_claims_to_have_taken_more_than_was_sent_is_reset() {
    let guest = Guest::awake();
    let (_client, peer) = guest.connect(1);
    peer.fwd_cnt.set(1);
    peer.say(op::CREDIT_UPDATE, 0);
    guest.expect(op::RST);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_reset() {
    let guest = Guest::awake();
    let (slow, peer) = guest.connect(1);
    let chunk = noise(MAX_PAYLOAD as usize);
    for _ in 0..64 {
        peer.push(&chunk);
    }
    let reset = std::iter::from_fn(|| guest.packet(LONG)).find(|(h, _)| h.op == op::RST);
    assert!(reset.is_some());
    // What came before the breach is good, and bounded by the backlog and the socket.
    let all = read_all(&slow);
    assert!(all.chunks(chunk.len()).all(|c| c == chunk));
    assert!(all.len() <= 2 * BUF_ALLOC as usize, "{}", all.len());
    assert!(!guest.has_failed());
}

#[test]
fn packets_that_lie_about_themselves_end_their_connection_only() {
    let guest = Guest::awake();
    let (_bystander, good) = guest.connect(99);
    let lies: [fn(Header) -> Header; 6] = [
        |h| Header { len: 5, ..h },
        |h| Header {
            len: MAX_PAYLOAD + 1,
            ..h
        },
        |h| Header { len: u32::MAX, ..h },
        |h| Header { kind: 2, ..h },
        |h| Header { op: 77, ..h },
        |h| Header {
            op: op::REQUEST,
            ..h
        },
    ];
    for lie in lies {
        let (client, peer) = guest.connect(1);
        guest.send(lie(peer.header(op::RW)), b"four");
        let (reset, _) = guest.expect(op::RST);
        assert_eq!(reset.src_port, peer.host_port);
        assert_eq!(read_all(&client), b"");
    }
    good.push(b"fine");
    assert!(!guest.has_failed());
}

#[test]
fn packets_from_or_to_others_are_dropped() {
    let guest = Guest::awake();
    let (client, peer) = guest.connect(1);
    let header = Header {
        len: 1,
        ..peer.header(op::RW)
    };
    guest.send(
        Header {
            src_cid: 41,
            ..header
        },
        b"x",
    );
    guest.send(
        Header {
            dst_cid: 3,
            ..header
        },
        b"x",
    );
    guest.send(
        Header {
            src_cid: u64::from(CID) | 1 << 32,
            ..header
        },
        b"x",
    );
    guest.flush();
    guest.expect_silence();
    // The right IDs and another port: no such connection.
    guest.send(
        Header {
            src_port: 2,
            ..header
        },
        b"x",
    );
    guest.expect(op::RST);
    peer.push(b"y");
    peer.say(op::SHUTDOWN, SHUTDOWN_BOTH);
    assert_eq!(read_all(&client), b"y");
}

#[test]
fn a_header_that_changes_while_it_is_read_is_harmless() {
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
    #[derive(PartialEq)]
    enum Flips {
        On,
        Off,
        Over,
    }
    let guest = Guest::awake();
    let memory = guest.memory.clone();
    let flips = Arc::new(Mutex::new(Flips::Off));
    let flipping = Arc::clone(&flips);
    let flipper = std::thread::spawn(move || {
        let mut len = 4_u32;
        loop {
            let flips = flipping.lock().unwrap();
            if *flips == Flips::Over {
                return;
            }
            if *flips == Flips::On {
                len ^= u32::MAX;
                let at = GuestAddress(0x8_0000 + 24);
                memory.memory().write_obj(len, at).unwrap();
            }
        }
    });
    for _ in 0..300 {
        let (client, peer) = guest.connect(1);
        let header = Header {
            len: 4,
            ..peer.header(op::RW)
        };
        *flips.lock().unwrap() = Flips::On;
        guest.send(header, b"data");
        guest.flush();
        *flips.lock().unwrap() = Flips::Off;
        peer.say(op::SHUTDOWN, SHUTDOWN_BOTH);
        let got = read_all(&client);
        assert!(got == b"data" || got.is_empty(), "{got:?}");
        guest.expect(op::RST);
        if got.is_empty() {
            // That was for the wrong length; the end of what was reset already gets another.
            guest.expect(op::RST);
        }
    }
    *flips.lock().unwrap() = Flips::Over;
    flipper.join().unwrap();
    assert!(!guest.has_failed());
}

#[test]
fn rings_that_cannot_be_used_end_the_machine_with_a_reason() {
    let guest = Guest::awake();
    guest
        .transmit
        .add(&[Desc::read(0xf_ffff, HEADER_LEN as u32)]);
    guest.transmit.notify();
    assert!(guest.failure().contains("not in guest memory"));

    let mut guest = Guest::asleep();
    guest.wake();
    guest
        .receive
        .add(&[Desc::write(0x1_0000, HEADER_LEN as u32)]);
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    assert!(guest.failure().contains("only 44 bytes"));
}

#[test]
fn a_packet_without_a_whole_header_is_dropped() {
    let guest = Guest::awake();
    guest.transmit.add(&[Desc::read(0x8_0000, 43)]);
    guest.transmit.add(&[Desc::write(0x8_0000, 64)]);
    guest.transmit.notify();
    wait_until("both are used", || guest.transmit.used_index() == 2);
    guest.expect_silence();
    assert!(!guest.has_failed());
}
