use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::super::testing::{Desc, Driver, activation, memory, wait_until};
use super::super::{Memory, VirtioDevice};
use super::*;

const HEADER: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x9000;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// A device on an image of `sectors` sectors, each filled with its number, and its driver.
struct Setup {
    device: Block,
    driver: Driver,
    image: tempfile::NamedTempFile,
    _memory: Memory,
    failures: std::sync::mpsc::Receiver<String>,
    requests: u16,
}

impl Setup {
    fn new(sectors: u8, read_only: bool) -> Self {
        Self::limited(sectors, read_only, RateLimit::default())
    }

    fn limited(sectors: u8, read_only: bool, limit: RateLimit) -> Self {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        for sector in 0..sectors {
            image.write_all(&[sector; 512]).unwrap();
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(image.path())
            .unwrap();
        let memory = memory();
        let driver = Driver::new(&memory, 256);
        let device = Block::new(file.into(), "disk-0", read_only).unwrap();
        let mut device = device.limited(limit);
        let (start, failures) = activation(&[&driver], 0);
        device.activate(start).unwrap();
        Self {
            device,
            driver,
            image,
            _memory: memory,
            failures,
            requests: 0,
        }
    }

    /// Sends a request with these buffers between header and status; returns status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Desc]) -> (u8, u32) {
        self.driver.recycle();
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.driver.put(HEADER, &header);
        self.driver.put(STATUS, &[0xff]);
        let mut chain = vec![Desc::read(HEADER, 16)];
        chain.extend(data);
        chain.push(Desc::write(STATUS, 1));
        self.driver.add(&chain);
        self.driver.notify();
        self.requests += 1;
        wait_until("the request is used", || {
            self.driver.used_index() == self.requests
        });
        (
            self.driver.bytes(STATUS, 1)[0],
            self.driver.last_used(1)[0].1,
        )
    }

    fn image(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        File::open(self.image.path())
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn reads_and_writes_reach_the_image() {
    let mut s = Setup::new(8, false);
    let parts = [Desc::write(DATA, 512), Desc::write(DATA + 0x1000, 1024)];
    assert_eq!(s.request(0, 2, &parts), (OK, 1537));
    assert_eq!(s.driver.bytes(DATA, 512), vec![2; 512]);
    assert_eq!(s.driver.bytes(DATA + 0x1000 + 512, 512), vec![4; 512]);

    s.driver.put(DATA, &[0xaa; 1024]);
    assert_eq!(s.request(1, 6, &[Desc::read(DATA, 1024)]), (OK, 1));
    assert_eq!(s.image()[6 * 512..], [0xaa; 1024]);
    assert_eq!(s.image()[..512], [0; 512]);
    assert_eq!(s.request(4, 0, &[]), (OK, 1));
    assert_eq!(s.driver.interrupts(), 3);
}

#[test]
fn identity_and_configuration_are_told() {
    let mut s = Setup::new(8, false);
    assert_eq!(s.request(8, 0, &[Desc::write(DATA, 20)]), (OK, 21));
    assert_eq!(s.driver.bytes(DATA, 20)[..7], *b"disk-0\0");
    assert_eq!(s.device.config()[..8], 8_u64.to_le_bytes());
    assert_eq!(s.device.config()[12..16], 254_u32.to_le_bytes());
    assert_eq!(s.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
}

// must-test: block: I/O outside the region, and sector arithmetic that overflows
#[test]
fn what_is_not_on_the_disk_is_an_io_error() {
    let mut s = Setup::new(8, false);
    let before = s.image();
    for sector in [8, 7, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(s.request(0, sector, &[Desc::write(DATA, 1024)]), (IOERR, 1));
        assert_eq!(s.request(1, sector, &[Desc::read(DATA, 1024)]), (IOERR, 1));
    }
    assert_eq!(s.request(0, 0, &[Desc::write(DATA, 100)]), (IOERR, 1));
    assert_eq!(s.request(1, 0, &[Desc::read(DATA, 513)]), (IOERR, 1));
    assert_eq!(s.image(), before);
}

#[test]
fn discard_and_write_zeroes_zero_the_range() {
    let mut s = Setup::new(64, false);
    s.driver.put(DATA, &range(8, 8, 0));
    assert_eq!(s.request(11, 0, &[Desc::read(DATA, 16)]), (OK, 1));
    s.driver
        .put(DATA, &[range(16, 2, 0), range(20, 1, 1)].concat());
    assert_eq!(s.request(13, 0, &[Desc::read(DATA, 32)]), (OK, 1));
    let image = s.image();
    assert_eq!(image.len(), 64 * 512);
    for (sector, zero) in [
        (7, false),
        (16, true),
        (17, true),
        (18, false),
        (20, true),
        (21, false),
    ] {
        let bytes = &image[sector * 512..][..512];
        assert_eq!(bytes == [0; 512], zero, "sector {sector}");
    }
}

#[test]
fn bad_ranges_are_refused_before_any_is_acted_upon() {
    let mut s = Setup::new(8, false);
    let before = s.image();
    let zero = |s: &mut Setup, bytes: &[u8]| {
        s.driver.put(DATA, bytes);
        s.request(13, 0, &[Desc::read(DATA, bytes.len() as u32)]).0
    };
    assert_eq!(
        zero(&mut s, &[range(0, 1, 0), range(7, 2, 0)].concat()),
        IOERR
    );
    assert_eq!(zero(&mut s, &range(u64::MAX, 2, 0)), IOERR);
    assert_eq!(zero(&mut s, &range(0, u32::MAX, 0)), IOERR);
    assert_eq!(zero(&mut s, &range(0, 1, 0)[..15]), IOERR);
    assert_eq!(zero(&mut s, &range(0, 1, 0).repeat(17)), IOERR);
    assert_eq!(zero(&mut s, &range(0, 1, 2)), UNSUPP);
    assert_eq!(s.image(), before);
}

#[test]
fn a_read_only_disk_refuses_every_way_to_write() {
    let mut s = Setup::new(8, true);
    let before = s.image();
    assert_ne!(s.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(s.device.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    s.driver.put(DATA, &range(0, 1, 0));
    assert_eq!(s.request(1, 0, &[Desc::read(DATA, 512)]), (IOERR, 1));
    assert_eq!(s.request(11, 0, &[Desc::read(DATA, 16)]), (IOERR, 1));
    assert_eq!(s.request(13, 0, &[Desc::read(DATA, 16)]), (IOERR, 1));
    assert_eq!(s.image(), before);
    assert_eq!(s.request(0, 1, &[Desc::write(DATA, 512)]), (OK, 513));
}

#[test]
fn unknown_requests_and_short_headers_get_a_status() {
    let mut s = Setup::new(8, false);
    assert_eq!(s.request(99, 0, &[]), (UNSUPP, 1));
    s.driver.recycle();
    s.driver
        .add(&[Desc::read(HEADER, 15), Desc::write(STATUS, 1)]);
    s.driver.notify();
    wait_until("used", || s.driver.used_index() == 2);
    assert_eq!(s.driver.bytes(STATUS, 1), [IOERR]);
}

#[test]
fn an_error_of_the_host_is_an_io_error_and_the_device_lives_on() {
    let mut s = Setup::new(8, false);
    // The image shrinks under the device, so that the host has no data to give.
    s.image.as_file().set_len(512).unwrap();
    assert_eq!(s.request(0, 4, &[Desc::write(DATA, 512)]), (IOERR, 1));
    assert_eq!(s.request(0, 0, &[Desc::write(DATA, 512)]), (OK, 513));
    assert!(s.failures.try_recv().is_err());
}

#[test]
fn a_host_that_refuses_to_write_is_an_io_error() {
    let disk = memfd_with_seal(8 * 512, libc::F_SEAL_WRITE);
    let memory = memory();
    let driver = Driver::new(&memory, 256);
    let mut device = Block::new(disk, "sealed", false).unwrap();
    let (start, failures) = activation(&[&driver], 0);
    device.activate(start).unwrap();
    driver.put(HEADER, &1u64.to_le_bytes());
    driver.add(&[
        Desc::read(HEADER, 16),
        Desc::read(DATA, 512),
        Desc::write(STATUS, 1),
    ]);
    driver.notify();
    wait_until("used", || driver.used_index() == 1);
    assert_eq!(driver.bytes(STATUS, 1), [IOERR]);
    assert!(failures.try_recv().is_err());
}

fn memfd_with_seal(len: u64, seal: libc::c_int) -> OwnedFd {
    // SAFETY: a valid name; the descriptor that comes back is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"disk".as_ptr(), libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    // SAFETY: takes numbers only.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seal) };
    assert_eq!(sealed, 0);
    file.into()
}

#[test]
fn a_request_without_room_for_a_status_ends_the_machine_with_a_reason() {
    let s = Setup::new(8, false);
    s.driver.add(&[Desc::read(HEADER, 16)]);
    s.driver.notify();
    let reason = s.failures.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(reason.contains("no room for its status"), "{reason}");
}

// must-test: block: get_host_address without the length (Dragonball a957054dd3)
#[test]
fn buffers_outside_memory_end_the_machine_with_a_reason() {
    let s = Setup::new(8, false);
    s.driver.add(&[
        Desc::read(HEADER, 16),
        Desc::write(0x10_0000 - 512, 1024),
        Desc::write(STATUS, 1),
    ]);
    s.driver.notify();
    let reason = s.failures.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(reason.contains("not in guest memory"), "{reason}");
}

// must-test: the same descriptor head in flight twice (Cloud Hypervisor CVE-2026-45782)
#[test]
fn the_same_head_twice_is_served_twice_one_after_the_other() {
    let mut s = Setup::new(8, false);
    assert_eq!(s.request(0, 1, &[Desc::write(DATA, 512)]), (OK, 513));
    s.driver.make_available(0);
    s.driver.make_available(0);
    s.driver.notify();
    wait_until("both are used", || s.driver.used_index() == 3);
    assert_eq!(s.driver.last_used(2), vec![(0, 513), (0, 513)]);
}

#[test]
fn reset_gives_the_disk_back() {
    let mut s = Setup::new(8, false);
    s.device.reset();
    let driver = Driver::new(&s._memory, 256);
    s.device.activate(activation(&[&driver], 0).0).unwrap();
    s.driver = driver;
    assert_eq!(s.request(0, 1, &[Desc::write(DATA, 512)]), (OK, 513));
}

// must-test: image format guessed from content (Cloud Hypervisor CVE-2026-27211)
#[test]
fn a_disk_is_raw_whatever_is_in_it() {
    let mut s = Setup::new(4, false);
    // A qcow2 header, version 3, of a terabyte, with a file of the host behind it.
    let mut header = b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\x01\0\0\0\0\x0b".to_vec();
    header.extend([0, 0, 0, 16, 0, 0, 1, 0, 0, 0, 0, 0]);
    header.resize(256, 0);
    header.extend(b"/etc/shadow");
    header.resize(512, 0);
    s.driver.put(DATA, &header);
    assert_eq!(s.request(1, 0, &[Desc::read(DATA, 512)]), (OK, 1));
    // Opened anew, as after a restart.
    let file = OpenOptions::new().read(true).open(s.image.path()).unwrap();
    let device = Block::new(file.into(), "disk-0", true).unwrap();
    assert_eq!(device.config()[..8], 4_u64.to_le_bytes());
    assert_eq!(
        s.request(0, 0, &[Desc::write(DATA + 0x1000, 512)]),
        (OK, 513)
    );
    assert_eq!(s.driver.bytes(DATA + 0x1000, 512), header);
}

// must-test: a bind-mounted directory mistaken for a block device (Kata CVE-2026-24054)
#[test]
fn what_is_not_a_disk_is_refused() {
    let refused = |file: OwnedFd, serial: &str, read_only| {
        Block::new(file, serial, read_only)
            .err()
            .unwrap()
            .to_string()
    };
    let directory = tempfile::tempdir().unwrap();
    let open = File::open(directory.path()).unwrap();
    assert!(refused(open.into(), "d", true).contains("neither a regular file"));
    let null = File::open("/dev/null").unwrap();
    assert!(refused(null.into(), "d", true).contains("neither a regular file"));

    let image = tempfile::NamedTempFile::new().unwrap();
    let open = || OwnedFd::from(File::open(image.path()).unwrap());
    assert!(refused(open(), "d", true).contains("smaller than a sector"));
    image.as_file().set_len(1024).unwrap();
    assert!(refused(open(), "d", false).contains("not open for writing"));
    assert!(refused(open(), "", true).contains("1 to 20"));
    assert!(refused(open(), "a serial with spaces", true).contains("1 to 20"));
    assert!(refused(open(), &"x".repeat(21), true).contains("1 to 20"));
    assert!(Block::new(open(), &"x".repeat(20), true).is_ok());
}

#[test]
fn a_limit_slows_requests_down_and_loses_none() {
    let limit = RateLimit {
        bytes: 0,
        operations: 50,
    };
    let mut s = Setup::limited(8, false, limit);
    let begin = Instant::now();
    for _ in 0..25 {
        assert_eq!(s.request(0, 2, &[Desc::write(DATA, 512)]), (OK, 513));
    }
    // Half a second, but for what may be done at once.
    assert!(begin.elapsed() >= Duration::from_millis(350));
    // A request of more than a second's bytes is served whole, and the one behind it waits.
    let limit = RateLimit {
        bytes: 1024,
        operations: 0,
    };
    let mut s = Setup::limited(8, false, limit);
    let begin = Instant::now();
    assert_eq!(s.request(0, 4, &[Desc::write(DATA, 2048)]), (OK, 2049));
    assert_eq!(s.driver.bytes(DATA, 512), vec![4; 512]);
    assert_eq!(s.request(0, 1, &[Desc::write(DATA, 512)]), (OK, 513));
    assert!(begin.elapsed() >= Duration::from_millis(1500));
    // A pause does not wait for the limit.
    s.device.pause();
    s.device.resume();
    assert_eq!(s.request(4, 0, &[]), (OK, 1));
}
