//! What a hostile guest sends.

use std::fs;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::super::VirtioDevice;
use super::super::testing::{Desc, Driver, activation, memory, wait_until};
use super::tests::*;
use super::{Fs, FsError, ShareRoot};

#[test]
fn sizes_that_lie_are_refused_without_taking_memory_for_them() {
    let mut s = Setup::new();
    fs::write(s.share().join("f"), "f").unwrap();
    let f = s.lookup(ROOT, "f").unwrap();
    let handle = s.open(OPEN, f, libc::O_RDWR).unwrap();
    let name = terminated("user.x");
    let xattr = [words(&[u32::MAX, 0]), name].concat();
    assert_eq!(s.ask(GETXATTR, f, &xattr).0, libc::ENOSYS);
    assert!(s.read(READ, f, handle, u32::MAX).0 != 0);
    assert!(s.read(READDIR, ROOT, handle, u32::MAX).0 != 0);
    // More than there is to write: what is there is written.
    s.ask(WRITE, f, &write_in(handle, b"abc", u32::MAX, libc::O_RDWR));
    assert_eq!(fs::read(s.share().join("f")).unwrap(), b"abc");
    let ioctl = [
        handle.to_le_bytes().to_vec(),
        words(&[0, 0, 0, 0, u32::MAX, 0]),
    ]
    .concat();
    assert!(s.ask(IOCTL, f, &ioctl).0 != 0);
    assert!(s.ask(SETUPMAPPING, f, &[0xff; 40]).0 != 0);
    assert_eq!(s.ask(99, ROOT, &[]).0, libc::ENOSYS);
    // The length in the header is more than there is, and less than the header.
    for len in [u32::MAX, 1 << 20, 0, 39] {
        let mut bytes = request(0, 0, LOOKUP, ROOT, b"f\0");
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        s.send(&bytes);
        let reply = s.requests.bytes(REPLY, 16);
        assert!(i32::from_le_bytes(reply[4..8].try_into().unwrap()) < 0);
    }
    assert!(s.failures.try_recv().is_err());
}

/// Flags that the kernel refuses to set (F_SETFL) on a file that is open. The passthrough would close its descriptor.
#[test]
fn flags_that_a_guest_states_later_do_not_reach_the_open_file() {
    let mut s = Setup::new();
    fs::write(s.share().join("f"), "f").unwrap();
    fs::create_dir(s.share().join("d")).unwrap();
    let (f, d) = (s.lookup(ROOT, "f").unwrap(), s.lookup(ROOT, "d").unwrap());
    for flags in [
        0,
        libc::O_PATH,
        libc::O_NOATIME,
        libc::O_ASYNC,
        libc::O_DIRECT,
    ] {
        let created = create_in(libc::O_RDWR | flags, &format!("new{flags}"));
        assert_eq!(s.ask(CREATE, ROOT, &created).0, 0);
        let handle = s.open(OPEN, f, libc::O_RDWR | flags).unwrap();
        for later in [0, -1, libc::O_PATH, libc::O_NOATIME, libc::O_ASYNC] {
            let read = s.ask(READ, f, &read_in(handle, 9, later));
            assert_eq!(read, (0, b"f".to_vec()), "{flags:o} {later:o}");
            let plain = later & !libc::O_APPEND;
            assert_eq!(s.write(f, handle, b"f", plain), 0, "{flags:o} {later:o}");
        }
        let list = s.open(OPENDIR, d, flags).unwrap();
        for later in [0, -1] {
            let read = s.ask(READ, d, &read_in(list, 9, later));
            assert_eq!(read.0, libc::EISDIR, "{flags:o} {later:o}");
            assert!(s.write(d, list, b"x", later) != 0, "{flags:o} {later:o}");
        }
        assert_eq!(s.read(READDIR, d, list, 4096).0, 0);
    }
    assert!(s.failures.try_recv().is_err());
}

#[test]
fn a_file_that_may_only_be_appended_to_is_only_appended_to() {
    let mut s = Setup::new();
    let path = s.share().join("log");
    fs::write(&path, "1").unwrap();
    let file = fs::File::open(&path).unwrap();
    let set = |flags: libc::c_int| {
        // SAFETY: the request reads an int (Linux, ioctl_iflags(2)).
        unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const flags) == 0 }
    };
    const FS_APPEND_FL: libc::c_int = 0x20;
    if !set(FS_APPEND_FL) {
        println!("skipped: no file can be made append-only here");
        return;
    }
    let log = s.lookup(ROOT, "log").unwrap();
    let appending = libc::O_RDWR | libc::O_APPEND;
    assert_eq!(s.open(OPEN, log, libc::O_RDWR), Err(libc::EPERM));
    let handle = s.open(OPEN, log, appending).unwrap();
    for expected in ["12", "123"] {
        assert_eq!(s.write(log, handle, b"x", libc::O_RDWR), libc::EPERM);
        let next = &expected.as_bytes()[expected.len() - 1..];
        assert_eq!(s.write(log, handle, next, appending), 0);
        let read = s.ask(READ, log, &read_in(handle, 9, libc::O_RDWR));
        assert_eq!(read, (0, expected.as_bytes().to_vec()));
    }
    assert!(set(0), "the file can go again");
    assert!(s.failures.try_recv().is_err());
}

#[test]
fn forgetting_needs_no_answer_on_the_priority_queue() {
    let mut s = Setup::new();
    fs::write(s.share().join("f"), "f").unwrap();
    let f = s.lookup(ROOT, "f").unwrap();
    let many = request(
        0,
        0,
        BATCH_FORGET,
        0,
        &[words(&[u32::MAX, 0]), vec![0; 16]].concat(),
    );
    let mut one = words(&[1, 0]);
    one.extend([f.to_le_bytes(), 1u64.to_le_bytes()].concat());
    let one = request(0, 0, BATCH_FORGET, 0, &one);
    for (i, bytes) in [many, one].iter().enumerate() {
        let at = REQUEST + 0x1000 * i as u64;
        s.priority.put(at, bytes);
        s.priority.add(&[Desc::read(at, bytes.len() as u32)]);
    }
    s.priority.notify();
    wait_until("used", || s.priority.used() == vec![(0, 0), (1, 0)]);
    assert_eq!(s.open(OPEN, f, libc::O_RDONLY), Err(libc::EBADF));
}

#[test]
fn any_bytes_get_an_answer_and_none_ends_the_machine() {
    let mut s = Setup::new();
    fs::create_dir(s.share().join("d")).unwrap();
    fs::write(s.share().join("f"), "f").unwrap();
    s.lookup(ROOT, "d").unwrap();
    let f = s.lookup(ROOT, "f").unwrap();
    s.open(OPEN, f, libc::O_RDWR).unwrap();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..2000 {
        let opcode = (random() % 54) as u32;
        let body: Vec<u8> = (0..random() % 120)
            .map(|_| {
                if random() % 3 == 0 {
                    random() as u8
                } else {
                    (random() % 4) as u8
                }
            })
            .collect();
        let bytes = request(random() as u32 % 3, 0, opcode, random() % 5, &body);
        let cut = if random() % 8 == 0 {
            random() as usize % 40
        } else {
            0
        };
        s.send(&bytes[..bytes.len() - cut.min(body.len())]);
    }
    s.outside_is_untouched();
    assert!(s.failures.try_recv().is_err());
}

#[test]
fn hostile_chains_end_the_machine_with_a_reason() {
    type Attack = fn(&Setup);
    let attacks: [(Attack, &str); 4] = [
        (
            |s| _ = s.requests.add(&[Desc::read(REQUEST, 39)]),
            "shorter than its header",
        ),
        (
            |s| _ = s.requests.add(&[Desc::read(0xf_fff0, 64)]),
            "not in guest memory",
        ),
        (|s| s.requests.add_raw(&[(REQUEST, 64, 1, 0)]), "loops"),
        (
            |s| s.requests.set_available_index(1000),
            "available ring index",
        ),
    ];
    for (attack, expected) in attacks {
        let s = Setup::new();
        s.requests.recycle();
        attack(&s);
        s.requests.notify();
        let reason = s.failures.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn a_request_of_absurd_size_is_refused() {
    let mut s = Setup::new();
    s.requests.recycle();
    s.requests
        .put(REQUEST, &request(0, 0, LOOKUP, ROOT, b"f\0"));
    // The same memory many times over: 4 MiB of request.
    let mut chain = vec![Desc::read(REQUEST, 0x4_0000); 16];
    chain.push(Desc::write(REPLY + 0x4_0000, 4096));
    s.requests.add(&chain);
    s.requests.notify();
    s.sent += 1;
    wait_until("answered", || s.requests.used_index() == s.sent);
    let reply = s.requests.bytes(REPLY + 0x4_0000, 8);
    assert_eq!(reply[4..], (-libc::EINVAL).to_le_bytes());
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let directory = || ShareRoot::Directory(fs::File::open("/").unwrap().into());
    assert!(matches!(Fs::new("", directory()), Err(FsError::Tag(_))));
    assert!(matches!(
        Fs::new(&"t".repeat(37), directory()),
        Err(FsError::Tag(_))
    ));
    let file = tempfile::tempfile().unwrap();
    let mut device = Fs::new("tag", ShareRoot::Directory(file.into())).unwrap();
    assert!(matches!(device.open_root(), Err(FsError::Root(_))));
    let space = device.config();
    assert_eq!(
        (&space[..4], &space[36..]),
        (&b"tag\0"[..], &[1, 0, 0, 0][..])
    );

    // Not before its root is open.
    let memory = memory();
    let driver = Driver::new(&memory, 8);
    let error = device.activate(activation(&[&driver], 0).0).unwrap_err();
    assert!(error.to_string().contains("root was not opened"), "{error}");
}
