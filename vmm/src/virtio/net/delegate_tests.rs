//! The network device in the kernel's service, on a real tap: where there is vhost-net, and said aloud where not.

use std::fs::File;
use std::process::Command;
use std::sync::mpsc::Receiver;

use super::super::testing::{Desc, Driver, Interrupts, activation, memory, wait_until};
use super::super::{Activation, Memory};
use super::tests::tap;
use super::*;

const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const BUFFER: u64 = 0x1_0000;
const HEADER: u32 = 12;

/// A device whose tap is in a network namespace of this thread's own.
struct Setup {
    name: &'static str,
    device: Net,
    memory: Memory,
    interrupts: Arc<Interrupts>,
    receive: Driver,
    transmit: Driver,
}

impl Setup {
    fn new(name: &'static str) -> Option<Self> {
        let Ok(vhost) = File::options()
            .read(true)
            .write(true)
            .open("/dev/vhost-net")
        else {
            println!("skipped: no /dev/vhost-net");
            return None;
        };
        let tap = tap(name, FLAGS)?;
        let device = Net::by_kernel(tap, vhost.into(), [2, 0, 0, 0, 0, 9], 1450).unwrap();
        // No frames of the interface's own.
        for command in [
            format!("link set {name} addrgenmode none"),
            format!("link set {name} up"),
        ] {
            ip(&command);
        }
        let memory = memory();
        let interrupts = Arc::new(Interrupts::default());
        let driver = |index| Driver::numbered(&memory, 16, index, Arc::clone(&interrupts));
        Some(Self {
            name,
            device,
            receive: driver(0),
            transmit: driver(1),
            memory: memory.clone(),
            interrupts,
        })
    }

    fn activation(&self) -> (Activation, Receiver<String>) {
        activation(&[&self.receive, &self.transmit], self.device.features())
    }

    fn activate(&mut self) -> Receiver<String> {
        let (activation, failures) = self.activation();
        self.device.activate(activation).unwrap();
        failures
    }

    /// The driver sets its rings up anew.
    fn renew(&mut self) {
        let driver =
            |index| Driver::numbered(&self.memory, 16, index, Arc::clone(&self.interrupts));
        (self.receive, self.transmit) = (driver(0), driver(1));
    }

    /// Sends a frame from the guest.
    fn send(&self) {
        self.transmit.put(BUFFER, &[0; HEADER as usize]);
        self.transmit.put(BUFFER + 12, &[0xff; 60]);
        self.transmit.add(&[Desc::read(BUFFER, HEADER + 60)]);
        self.transmit.notify();
    }

    /// Frames that have come out of the tap.
    fn arrived(&self) -> u64 {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = table.lines().find(|line| line.contains(self.name)).unwrap();
        let mut columns = line.split(':').nth(1).unwrap().split_whitespace();
        columns.nth(1).unwrap().parse().unwrap()
    }

    /// Has the host send a frame to the guest.
    fn answer(&self) {
        ip(&format!("addr replace 10.98.9.1/24 dev {}", self.name));
        // An address that nobody has is asked for.
        let socket = std::net::UdpSocket::bind("10.98.9.1:0").unwrap();
        socket.send_to(b"x", "10.98.9.2:9").unwrap();
    }
}

fn ip(command: &str) {
    let done = Command::new("ip").args(command.split(' ')).status();
    assert!(done.unwrap().success(), "ip {command}; iproute2 is needed");
}

#[test]
fn what_is_not_vhost_net_is_refused() {
    let other = File::open("/dev/null").unwrap();
    let error = Vhost::new(other.into()).err().unwrap().to_string();
    assert!(error.contains("vhost-net"), "{error}");
}

#[test]
fn the_kernel_carries_frames_until_it_is_told_otherwise() {
    let Some(mut s) = Setup::new("caisson-v0") else {
        return;
    };
    // Before the device is active: it is looked at all the same.
    s.send();
    let failures = s.activate();
    wait_until("transmitted", || s.transmit.used() == [(0, 0)]);
    wait_until("it came out", || s.arrived() == 1);
    s.receive.add(&[Desc::write(BUFFER + 0x1000, 2048)]);
    s.receive.notify();
    s.answer();
    wait_until("received", || s.receive.used_index() == 1);
    let got = s.receive.bytes(BUFFER + 0x1000, 26);
    assert_eq!(
        got[10..18],
        [1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        "to all"
    );
    let event = s.interrupts.kernels().unwrap();
    let mut told = 0;
    wait_until("the driver was told of both", || {
        told += event.read().unwrap_or(0);
        told >= 2
    });
    assert_eq!(s.interrupts.queues(), 0, "not by us");

    s.device.pause();
    s.send();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(s.transmit.used_index(), 1);
    s.device.resume();
    wait_until("transmitted", || s.transmit.used_index() == 2);

    s.device.reset();
    s.send();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(s.transmit.used_index(), 2);
    // And from the beginning, more often than anybody needs.
    for _ in 0..50 {
        s.renew();
        let _failures = s.activate();
        s.send();
        wait_until("transmitted", || s.transmit.used_index() == 1);
        s.device.reset();
    }
    // As a clone: the rings go on where they were.
    s.send();
    let (mut start, failed) = s.activation();
    for queue in &mut start.queues {
        let used = if queue.index == 0 { 0 } else { 1 };
        virtio_queue::QueueT::set_next_avail(&mut queue.queue, used);
        virtio_queue::QueueT::set_next_used(&mut queue.queue, used);
    }
    s.device.activate(start).unwrap();
    wait_until("transmitted", || s.transmit.used_index() == 2);
    assert!(failures.try_recv().is_err() && failed.try_recv().is_err());

    ip(&format!("link delete {}", s.name));
    wait_until("the link is down", || {
        s.interrupts.configs() == [(6, vec![0, 0])]
    });
    s.device.pause();
    s.device.resume();
    s.device.reset();
    assert!(failed.try_recv().is_err());
}

#[test]
fn rings_that_the_kernel_cannot_use_end_the_machine_with_a_reason() {
    let Some(mut s) = Setup::new("caisson-v1") else {
        return;
    };
    let bad: [fn(&Driver); 3] = [
        |driver| driver.set_available_index(17),
        |driver| driver.add_raw(&[(u64::MAX - 7, 64, 0, 0)]),
        |driver| driver.add_raw(&[(BUFFER, 64, 1, 0)]),
    ];
    for attack in bad {
        s.renew();
        let failures = s.activate();
        attack(&s.transmit);
        s.transmit.notify();
        let reason = failures.recv_timeout(std::time::Duration::from_secs(5));
        let reason = reason.unwrap();
        assert!(reason.contains("broke the device's rules"), "{reason}");
        s.device.reset();
    }
    // The device is as good as before.
    s.renew();
    let _failures = s.activate();
    s.send();
    wait_until("transmitted", || s.transmit.used_index() == 1);

    // Nor does it take rings that are not in memory.
    s.device.reset();
    let (mut start, failures) = s.activation();
    virtio_queue::QueueT::set_used_ring_address(
        &mut start.queues[1].queue,
        Some(0x10_0000 - 16),
        Some(0),
    );
    s.device.activate(start).unwrap();
    let reason = failures.recv_timeout(std::time::Duration::from_secs(5));
    assert!(reason.unwrap().contains("not in guest memory"));
}
