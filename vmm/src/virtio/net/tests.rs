use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::super::Memory;
use super::super::testing::{Desc, Driver, Interrupts, activation, memory, readable, wait_until};
use super::super::worker::Worker;
use super::tap::{HEADER, MOST};
use super::*;
use crate::threads::Kind;

const BUFFER: u64 = 0x1_0000;
static THREADS: AtomicUsize = AtomicUsize::new(0);
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The worker of a device whose tap is one end of a socket pair; the test holds the other.
struct Setup {
    receive: Driver,
    transmit: Driver,
    wire: UnixDatagram,
    interrupts: Arc<Interrupts>,
    failures: std::sync::mpsc::Receiver<String>,
    worker: Option<Worker<Frames>>,
    thread: String,
    _memory: Memory,
}

impl Setup {
    fn new(features: u64, size: u16, prepare: impl FnOnce(&Setup)) -> Self {
        Self::limited(features, size, RateLimit::default(), prepare)
    }

    fn limited(features: u64, size: u16, limit: RateLimit, prepare: impl FnOnce(&Setup)) -> Self {
        let (wire, tap) = pair();
        wire.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let memory = memory();
        let interrupts = Arc::new(Interrupts::default());
        let receive = Driver::numbered(&memory, size, 0, Arc::clone(&interrupts));
        let transmit = Driver::numbered(&memory, size, 1, Arc::clone(&interrupts));
        let (start, failures) = activation(&[&receive, &transmit], features);
        let mut rings = (receive.ring(DEVICE), transmit.ring(DEVICE));
        rings.0.limit(limit);
        rings.1.limit(limit);
        let frames = Frames::new(
            Tap::from_socket(tap, false).unwrap(),
            memory.clone(),
            start.interrupt,
            rings,
            features,
        );
        let mut setup = Self {
            receive,
            transmit,
            wire,
            interrupts,
            failures,
            worker: None,
            thread: format!("net{}", THREADS.fetch_add(1, Ordering::Relaxed)),
            _memory: memory,
        };
        prepare(&setup);
        setup.worker =
            Some(Worker::spawn(Kind::Net, &setup.thread, frames, start.failure).unwrap());
        setup
    }

    fn running(features: u64) -> Self {
        Self::new(features, 16, |_| {})
    }

    fn offer(&self, len: u32) -> u16 {
        let head = self.receive.add(&[Desc::write(BUFFER, len)]);
        self.receive.notify();
        head
    }

    /// Processor time of the worker so far.
    fn processor_time(&self) -> Duration {
        let name = format!("({})", self.thread);
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let path = task.unwrap().path().join("stat");
            let stat = std::fs::read_to_string(path).unwrap_or_default();
            if stat.contains(&name) {
                let fields: Vec<_> = stat
                    .rsplit(')')
                    .next()
                    .unwrap()
                    .split_whitespace()
                    .collect();
                let ticks = |at: usize| fields[at].parse::<u64>().unwrap();
                return Duration::from_millis(10 * (ticks(11) + ticks(12)));
            }
        }
        panic!("the worker is not there");
    }

    fn reason(&self) -> String {
        self.failures.recv_timeout(Duration::from_secs(5)).unwrap()
    }
}

/// Sockets that carry messages and, unlike datagram sockets, see the other end close.
fn pair() -> (UnixDatagram, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: the call fills two descriptors, which are ours alone.
    unsafe {
        let made = libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr());
        assert_eq!(made, 0);
        let [wire, tap] = fds.map(|fd| OwnedFd::from_raw_fd(fd));
        (wire.into(), tap)
    }
}

fn frame(len: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.resize(HEADER + len, fill);
    frame
}

#[test]
fn frames_go_both_ways() {
    let s = Setup::running(0);
    s.offer(2048);
    s.wire.send(&frame(60, 7)).unwrap();
    wait_until("received", || s.receive.used_index() == 1);
    assert_eq!(s.receive.used(), vec![(0, 72)]);
    let got = s.receive.bytes(BUFFER, 72);
    assert_eq!(got[10..12], [1, 0], "num_buffers");
    assert_eq!(got[12..], [7; 60]);

    s.transmit.put(BUFFER, &frame(100, 9));
    s.transmit
        .add(&[Desc::read(BUFFER, 12), Desc::read(BUFFER + 12, 100)]);
    s.transmit.notify();
    let mut got = [0; 2048];
    assert_eq!(s.wire.recv(&mut got).unwrap(), 112);
    assert_eq!(got[..112], frame(100, 9));
    wait_until("transmitted", || s.transmit.used() == vec![(0, 0)]);
    assert_eq!(s.interrupts.queues(), 2);
}

#[test]
fn a_long_frame_is_merged_from_many_buffers_seen_at_once() {
    let s = Setup::running(MERGEABLE);
    s.wire.send(&frame(3000, 5)).unwrap();
    let mut chains = vec![];
    for i in 0..3u64 {
        chains.push(s.receive.add(&[
            Desc::write(BUFFER + 0x2000 * i, 512),
            Desc::write(BUFFER + 0x2000 * i + 512, 512),
        ]));
    }
    s.receive.notify();
    wait_until("received", || s.receive.used_index() == 3);
    assert_eq!(s.receive.used(), vec![(0, 1024), (2, 1024), (4, 964)]);
    assert_eq!(s.receive.bytes(BUFFER, 1024)[10..12], [3, 0]);
    assert_eq!(s.receive.bytes(BUFFER + 0x4000, 964), vec![5; 964]);
}

#[test]
fn the_longest_frame_goes_both_ways() {
    let s = Setup::running(0);
    s.offer((HEADER + MOST) as u32);
    s.wire.send(&frame(MOST, 3)).unwrap();
    wait_until("received", || s.receive.used_index() == 1);
    s.transmit.put(BUFFER, &frame(MOST, 4));
    s.transmit
        .add(&[Desc::read(BUFFER, (HEADER + MOST) as u32)]);
    s.transmit.notify();
    let mut got = vec![0; 2 * MOST];
    assert_eq!(s.wire.recv(&mut got).unwrap(), HEADER + MOST);
}

// must-test: net: RX freezes for good when the tap and the RX ring are both full (Firecracker CVE-2020-16843)
#[test]
fn receiving_goes_on_after_tap_and_ring_were_both_full() {
    for features in [0, MERGEABLE] {
        let s = Setup::running(features);
        s.wire.set_nonblocking(true).unwrap();
        // No buffer at all: fill the tap to the brim, then wait until the worker has stopped reading.
        let mut sent = 0u32;
        let begin = std::time::Instant::now();
        while begin.elapsed() < Duration::from_millis(100) {
            if s.wire.send(&frame(60, sent as u8)).is_ok() {
                sent += 1;
            }
        }
        assert!(sent > 10);
        s.wire.set_nonblocking(false).unwrap();
        for i in 0..sent {
            s.receive.recycle();
            s.offer(2048);
            let want = (i + 1) as u16;
            wait_until("received", || s.receive.used_index() == want);
            assert_eq!(s.receive.bytes(BUFFER, 13)[12], i as u8, "in order");
        }
        // And a later frame, for which a buffer waits.
        s.receive.recycle();
        s.offer(2048);
        s.wire.send(&frame(60, 1)).unwrap();
        wait_until("received", || s.receive.used_index() == sent as u16 + 1);
    }
}

#[test]
fn a_frame_waits_for_enough_buffers_without_spinning() {
    let s = Setup::running(MERGEABLE);
    s.wire.send(&frame(3000, 5)).unwrap();
    s.offer(1000);
    s.offer(1000);
    std::thread::sleep(Duration::from_millis(50));
    let before = s.processor_time();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(s.receive.used_index(), 0);
    assert!(
        s.processor_time() - before < Duration::from_millis(50),
        "spins"
    );
    s.offer(1012);
    wait_until("received", || s.receive.used_index() == 3);
}

#[test]
fn a_frame_too_long_for_the_driver_is_dropped_and_the_next_arrives() {
    let s = Setup::running(0);
    s.offer(100);
    s.wire.send(&frame(1000, 5)).unwrap();
    s.wire.send(&frame(60, 6)).unwrap();
    wait_until("received", || s.receive.used_index() == 1);
    assert_eq!(s.receive.bytes(BUFFER, 72)[12..], [6; 60]);

    // With merging, not even all buffers of the queue are enough.
    let s = Setup::new(MERGEABLE, 4, |s| {
        for _ in 0..4 {
            s.receive.add(&[Desc::write(BUFFER, 50)]);
        }
    });
    s.wire.send(&frame(1000, 5)).unwrap();
    s.wire.send(&frame(20, 6)).unwrap();
    wait_until("received", || s.receive.used_index() == 1);
}

#[test]
fn frames_of_impossible_length_are_lost_and_their_buffers_come_back() {
    let s = Setup::running(0);
    s.transmit.add(&[Desc::read(BUFFER, 25)]);
    s.transmit
        .add(&[Desc::read(BUFFER, (HEADER + MOST) as u32 + 1)]);
    s.transmit.add(&[Desc::write(BUFFER, 100)]);
    s.transmit.add(&[Desc::read(BUFFER, 26)]);
    s.transmit.notify();
    wait_until("used", || s.transmit.used_index() == 4);
    let mut got = [0; 2048];
    assert_eq!(s.wire.recv(&mut got).unwrap(), 26);
    assert!(!readable(&s.wire));
}

#[test]
fn a_flood_of_transmission_does_not_starve_receiving() {
    let s = Setup::new(0, 256, |_| {});
    s.receive.add(&[Desc::write(BUFFER, 2048)]);
    // Frames too short to be carried, as fast as they can be made available.
    s.transmit.add(&[Desc::read(BUFFER, 5)]);
    s.transmit.notify();
    s.wire.send(&frame(60, 1)).unwrap();
    let begin = std::time::Instant::now();
    while s.receive.used_index() == 0 {
        assert!(begin.elapsed().as_secs() < 5, "starved");
        if s.transmit.used_index() != 0 {
            s.transmit
                .set_available_index(s.transmit.used_index().wrapping_add(200));
        }
    }
}

#[test]
fn hostile_rings_end_the_machine_with_a_reason() {
    let s = Setup::running(MERGEABLE);
    s.wire.send(&frame(60, 1)).unwrap();
    s.offer(u32::MAX);
    assert!(s.reason().contains("not in guest memory"));

    let s = Setup::running(MERGEABLE);
    s.transmit.set_available_index(17);
    s.transmit.notify();
    assert!(s.reason().contains("available ring index"));

    let s = Setup::running(MERGEABLE);
    s.transmit.add_raw(&[(BUFFER, 64, 1, 0)]);
    s.transmit.notify();
    assert!(s.reason().contains("loops"));
}

#[test]
fn a_tap_that_is_gone_takes_the_link_down_and_nothing_spins() {
    let mut s = Setup::running(0);
    s.offer(2048);
    drop(std::mem::replace(
        &mut s.wire,
        UnixDatagram::unbound().unwrap(),
    ));
    wait_until("the link is down", || {
        s.interrupts.configs() == [(6, vec![0, 0])]
    });
    s.transmit.add(&[Desc::read(BUFFER, 100)]);
    s.transmit.notify();
    wait_until("buffers come back", || s.transmit.used_index() == 1);
    assert!(s.failures.try_recv().is_err());
    let before = s.processor_time();
    std::thread::sleep(Duration::from_millis(100));
    assert!(
        s.processor_time() - before < Duration::from_millis(50),
        "spins"
    );
}

#[test]
fn pausing_keeps_frames() {
    let s = Setup::running(0);
    let worker = s.worker.as_ref().unwrap();
    worker.pause();
    s.wire.send(&frame(60, 1)).unwrap();
    s.offer(2048);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(s.receive.used_index(), 0);
    worker.resume();
    wait_until("received", || s.receive.used_index() == 1);
}

#[test]
fn what_is_not_a_tap_is_refused() {
    let mac = [2, 0, 0, 0, 0, 1];
    let (socket, _) = UnixDatagram::pair().unwrap();
    let error = Net::new(socket.into(), mac, 1500).err().unwrap();
    assert!(error.to_string().contains("not a tap"), "{error}");
    let (socket, _) = UnixDatagram::pair().unwrap();
    assert!(matches!(
        Net::new(socket.into(), mac, 67),
        Err(NetError::Mtu(67))
    ));
    let (socket, _) = UnixDatagram::pair().unwrap();
    assert!(matches!(
        Net::new(socket.into(), [1; 6], 1500),
        Err(NetError::GroupAddress)
    ));
}

/// A tap of its own in a network namespace of its own; `None`, and a word about it, where that is not allowed.
pub(super) fn tap(name: &str, flags: libc::c_int) -> Option<OwnedFd> {
    // SAFETY: unshare takes a number and acts on this thread alone; open returns a descriptor that is ours; the
    // ifreq is a plain structure that the ioctl reads and writes.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNET) != 0 {
            println!("skipped: no right to make a network namespace");
            return None;
        }
        let fd = libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if fd < 0 {
            println!("skipped: no /dev/net/tun");
            return None;
        }
        let fd = OwnedFd::from_raw_fd(fd);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        assert_eq!(
            libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request),
            0
        );
        Some(fd)
    }
}

#[test]
fn a_real_tap_is_served_until_its_interface_is_deleted() {
    const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let Some(fd) = tap("caisson-t0", libc::IFF_TAP | libc::IFF_NO_PI) else {
        return;
    };
    assert!(matches!(Net::new(fd, [2; 6], 1500), Err(NetError::NotATap)));
    let Some(fd) = tap("caisson-t1", FLAGS) else {
        return;
    };
    let mut device = Net::new(fd, [2, 0, 0, 0, 0, 9], 1450).unwrap();
    assert_eq!(device.config(), [2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0xaa, 5]);

    let memory = memory();
    let interrupts = Arc::new(Interrupts::default());
    let receive = Driver::numbered(&memory, 16, 0, Arc::clone(&interrupts));
    let transmit = Driver::numbered(&memory, 16, 1, Arc::clone(&interrupts));
    let (start, failures) = activation(&[&receive, &transmit], device.features());
    device.activate(start).unwrap();
    // Down: the frame is lost, and nothing else happens.
    transmit.add(&[Desc::read(BUFFER, 100)]);
    transmit.notify();
    wait_until("used", || transmit.used_index() == 1);

    let ip = |arguments: &[&str]| {
        let done = std::process::Command::new("ip").args(arguments).status();
        done.is_ok_and(|status| status.success())
    };
    assert!(
        ip(&["link", "set", "caisson-t1", "up"]),
        "iproute2 is needed"
    );
    // The interface says hello over IPv6 by itself; any frame will do.
    receive.add(&[Desc::write(BUFFER, 2048)]);
    receive.notify();
    wait_until("received", || receive.used_index() == 1);

    assert!(ip(&["link", "delete", "caisson-t1"]));
    wait_until("the link is down", || {
        interrupts.configs() == [(6, vec![0, 0])]
    });
    assert!(failures.try_recv().is_err());
    device.reset();
}

#[test]
fn each_direction_keeps_to_the_limit_and_loses_nothing_by_it() {
    let limit = RateLimit {
        bytes: 0,
        operations: 20,
    };
    let s = Setup::limited(0, 16, limit, |_| {});
    s.transmit.put(BUFFER, &frame(60, 9));
    let begin = Instant::now();
    for _ in 0..10 {
        s.transmit.add(&[Desc::read(BUFFER, 72)]);
    }
    s.transmit.notify();
    let mut got = [0; 2048];
    for _ in 0..10 {
        assert_eq!(s.wire.recv(&mut got).unwrap(), 72);
    }
    // Half a second, but for what may be done at once.
    assert!(begin.elapsed() >= Duration::from_millis(300));

    for _ in 0..10 {
        s.receive.add(&[Desc::write(BUFFER, 2048)]);
    }
    s.receive.notify();
    let begin = Instant::now();
    for _ in 0..10 {
        s.wire.send(&frame(60, 1)).unwrap();
    }
    wait_until("all are received", || s.receive.used_index() == 10);
    assert!(begin.elapsed() >= Duration::from_millis(300));
}
