//! The guest's side of a vsock device, for its tests: a driver that talks packets over fake rings.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::connection::BUF_ALLOC;
use super::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use super::{Vsock, VsockConnector};
use crate::virtio::testing::{Desc, Driver, Interrupts, activation, memory};
use crate::virtio::{Memory, VirtioDevice};

pub const CID: u32 = 42;
/// Receive buffers of the driver, and their payload's size.
pub const SLOTS: u64 = 64;
pub const SLOT_PAYLOAD: u32 = 4096;
const SLOT_BYTES: u64 = 0x1100;
const RECEIVE_BASE: u64 = 0x1_0000;
const SEND_HEADER: u64 = 0x8_0000;
const SEND_PAYLOAD: u64 = 0x8_1000;
/// Longer than anything takes; a test that waits so long has failed.
pub const LONG: Duration = Duration::from_secs(10);
/// Long enough to see that nothing comes.
pub const MOMENT: Duration = Duration::from_millis(100);

/// A device with a guest that the test plays.
pub struct Guest {
    pub device: Vsock,
    pub memory: Memory,
    pub receive: Driver,
    pub transmit: Driver,
    pub event: Driver,
    pub failures: Option<mpsc::Receiver<String>>,
    directory: tempfile::TempDir,
    /// How often the guest was found ready.
    pub readies: Arc<AtomicUsize>,
    /// The worker's thread, once the guest was found ready.
    pub thread: Arc<AtomicI32>,
    seen: Cell<u16>,
    sent: Cell<u16>,
    /// Whether buffers go back to the device once they were read.
    pub reposts: Cell<bool>,
    held: RefCell<VecDeque<u16>>,
}

impl Guest {
    /// A device whose driver is not up yet.
    pub fn asleep() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let readies = Arc::new(AtomicUsize::new(0));
        let thread = Arc::new(AtomicI32::new(0));
        let ready = {
            let (readies, thread) = (Arc::clone(&readies), Arc::clone(&thread));
            Arc::new(move |_| {
                thread.store(nix::unistd::gettid().as_raw(), Ordering::SeqCst);
                readies.fetch_add(1, Ordering::SeqCst);
            })
        };
        let memory = memory();
        let interrupts = Arc::<Interrupts>::default();
        let queue = |size, index| Driver::numbered(&memory, size, index, Arc::clone(&interrupts));
        Self {
            device: Vsock::new(CID, Some(listener.into()), ready).unwrap(),
            receive: queue(128, 0),
            transmit: queue(128, 1),
            event: queue(16, 2),
            memory: memory.clone(),
            failures: None,
            directory,
            readies,
            thread,
            seen: Cell::new(0),
            sent: Cell::new(0),
            reposts: Cell::new(true),
            held: RefCell::default(),
        }
    }

    /// Brings the driver up, without receive buffers.
    pub fn wake(&mut self) {
        let drivers = [&self.receive, &self.transmit, &self.event];
        let (activation, failures) = activation(&drivers, 0);
        self.failures = Some(failures);
        self.device.activate(activation).unwrap();
    }

    /// A guest with its driver up and all receive buffers posted.
    pub fn awake() -> Self {
        let mut guest = Self::asleep();
        guest.wake();
        guest.post_all();
        guest
    }

    pub fn post_all(&self) {
        for slot in 0..SLOTS {
            let at = RECEIVE_BASE + slot * SLOT_BYTES;
            self.receive.add(&[
                Desc::write(at, HEADER_LEN as u32),
                Desc::write(at + 0x80, SLOT_PAYLOAD),
            ]);
        }
        self.receive.notify();
    }

    pub fn connector(&self) -> VsockConnector {
        self.device.connector()
    }

    /// A client of the listener that has said nothing yet.
    pub fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        client.set_write_timeout(Some(LONG)).unwrap();
        client
    }

    /// A client and the guest's end of an established connection.
    pub fn connect(&self, port: u32) -> (UnixStream, Peer<'_>) {
        let mut client = self.client();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let peer = self.accept(port);
        let mut line = vec![0; format!("OK {}\n", peer.host_port).len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", peer.host_port).into_bytes());
        (client, peer)
    }

    /// Takes the next request for a connection and accepts it.
    pub fn accept(&self, port: u32) -> Peer<'_> {
        let request = self.requested(port);
        let peer = Peer::new(self, request.src_port, port);
        peer.say(op::RESPONSE, 0);
        peer
    }

    pub fn requested(&self, port: u32) -> Header {
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        assert_eq!(request.src_cid, HOST_CID);
        assert_eq!(request.dst_cid, u64::from(CID));
        assert_eq!(request.buf_alloc, BUF_ALLOC);
        request
    }

    /// The next packet, if one comes in time.
    pub fn packet(&self, time: Duration) -> Option<(Header, Vec<u8>)> {
        let end = Instant::now() + time;
        loop {
            let index = self.receive.used_index();
            let new = index.wrapping_sub(self.seen.get());
            let used = self.receive.last_used(new);
            if new > 0 && self.receive.used_index() == index {
                let (head, len) = used[0];
                self.seen.set(self.seen.get().wrapping_add(1));
                let at = RECEIVE_BASE + u64::from(head / 2) * SLOT_BYTES;
                let bytes = self.receive.bytes(at, HEADER_LEN);
                let header = Header::from_bytes(&bytes.try_into().unwrap());
                assert_eq!(len, HEADER_LEN as u32 + header.len, "{header:?}");
                let payload = self.receive.bytes(at + 0x80, header.len as usize);
                self.held.borrow_mut().push_back(head as u16);
                if self.reposts.get() {
                    self.repost();
                }
                return Some((header, payload));
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Gives the buffers that were read back to the device.
    pub fn repost(&self) {
        for head in self.held.borrow_mut().drain(..) {
            self.receive.make_available(head);
        }
        self.receive.notify();
    }

    /// The next packet with this operation. Credit updates in between do not matter.
    pub fn expect(&self, wanted: u16) -> (Header, Vec<u8>) {
        loop {
            let (header, payload) = self.packet(LONG).expect("a packet of the device");
            if header.op == wanted {
                return (header, payload);
            }
            assert!(
                matches!(header.op, op::CREDIT_UPDATE | op::CREDIT_REQUEST),
                "wanted {wanted}, got {header:?}"
            );
        }
    }

    pub fn expect_silence(&self) {
        assert_eq!(self.packet(MOMENT), None);
    }

    /// Sends a packet as it is, whatever it says of itself. Waits until the device has the last one.
    pub fn send(&self, header: Header, payload: &[u8]) {
        self.flush();
        self.transmit.recycle();
        self.transmit.put(SEND_HEADER, &header.to_bytes());
        self.transmit.put(SEND_PAYLOAD, payload);
        let head = Desc::read(SEND_HEADER, HEADER_LEN as u32);
        if payload.is_empty() {
            self.transmit.add(&[head]);
        } else {
            let data = Desc::read(SEND_PAYLOAD, payload.len() as u32);
            self.transmit.add(&[head, data]);
        }
        self.sent.set(self.sent.get().wrapping_add(1));
        self.transmit.notify();
    }

    /// Waits until the device has taken what was sent.
    pub fn flush(&self) {
        let begin = Instant::now();
        while self.transmit.used_index() != self.sent.get() {
            assert!(begin.elapsed() < LONG, "the device does not take packets");
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Nanoseconds that the device's worker has run. The guest must have said that it is ready.
    pub fn worker_time(&self) -> u64 {
        let thread = self.thread.load(Ordering::SeqCst);
        let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    }

    pub fn failure(&self) -> String {
        let failures = self.failures.as_ref().unwrap();
        failures.recv_timeout(LONG).expect("the device to fail")
    }

    pub fn has_failed(&self) -> bool {
        self.failures.as_ref().unwrap().try_recv().is_ok()
    }
}

/// The guest's end of a connection.
pub struct Peer<'g> {
    guest: &'g Guest,
    pub host_port: u32,
    pub port: u32,
    pub buf_alloc: Cell<u32>,
    pub fwd_cnt: Cell<u32>,
    sent: Cell<u32>,
    host_fwd: Cell<u32>,
}

impl<'g> Peer<'g> {
    pub fn new(guest: &'g Guest, host_port: u32, port: u32) -> Self {
        Self {
            guest,
            host_port,
            port,
            buf_alloc: Cell::new(BUF_ALLOC),
            fwd_cnt: Cell::new(0),
            sent: Cell::new(0),
            host_fwd: Cell::new(0),
        }
    }

    pub fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: self.port,
            dst_port: self.host_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc.get(),
            fwd_cnt: self.fwd_cnt.get(),
            ..Header::default()
        }
    }

    pub fn say(&self, op: u16, flags: u32) {
        let header = self.header(op);
        self.guest.send(Header { flags, ..header }, &[]);
    }

    /// Sends data without regard for credit.
    pub fn push(&self, bytes: &[u8]) {
        let header = self.header(op::RW);
        let len = bytes.len() as u32;
        self.sent.set(self.sent.get().wrapping_add(len));
        self.guest.send(Header { len, ..header }, bytes);
    }

    /// Bytes that the device has room for, as far as it has said.
    pub fn credit(&self) -> u32 {
        BUF_ALLOC - self.sent.get().wrapping_sub(self.host_fwd.get())
    }

    /// Takes the device's packets; returns the data, and the last other operation than credit.
    pub fn take(&self, time: Duration) -> (Vec<u8>, Option<Header>) {
        let mut data = Vec::new();
        let mut time = time;
        while let Some((header, payload)) = self.guest.packet(time) {
            assert_eq!(
                (header.src_port, header.dst_port),
                (self.host_port, self.port)
            );
            self.host_fwd.set(header.fwd_cnt);
            data.extend(payload);
            match header.op {
                op::RW => self
                    .fwd_cnt
                    .set(self.fwd_cnt.get().wrapping_add(header.len)),
                op::CREDIT_UPDATE => {}
                op::CREDIT_REQUEST => self.say(op::CREDIT_UPDATE, 0),
                _ => return (data, Some(header)),
            }
            time = Duration::ZERO;
        }
        (data, None)
    }

    /// Takes data until there is so much.
    pub fn take_bytes(&self, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            let (more, end) = self.take(LONG);
            assert!(end.is_none() && !more.is_empty(), "{end:?}");
            data.extend(more);
            self.say(op::CREDIT_UPDATE, 0);
        }
        data
    }
}

/// Bytes that differ from their neighbours near and far.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// All bytes until the end.
pub fn read_all(mut from: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    bytes
}
