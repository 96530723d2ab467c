//! The file server: requests that no Linux would send, and races on names.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use caisson_vmm_protocol::ExitReason;

use super::Host;
use super::driver::*;
use super::machine::Program;
use super::support::{Spec, kernel};

/// Operations (Linux, fuse.h).
const LOOKUP: u32 = 1;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const ROOT: u64 = 1;

/// A client of the file server in a program.
struct Client {
    queue: Queue,
    turn: u16,
}

impl Client {
    fn new(p: &mut Program) -> Self {
        let mut client = Self {
            queue: drive(p, FS)[1],
            turn: 0,
        };
        let init = [7u32, 31, 0, 0].map(u32::to_le_bytes).concat();
        client.ask(p, INIT, 0, &init, |_, _, _| {});
        client
    }

    /// Asks, and prints the error: 0, or a negative number. `change` may change the request in memory before it goes; it
    /// is told where that and the last answer are.
    fn ask(
        &mut self,
        p: &mut Program,
        operation: u32,
        node: u64,
        body: &[u8],
        change: impl FnOnce(&mut Program, u64, u64),
    ) {
        let (request, reply) = (self.queue.buffer(), self.queue.buffer() + 0x1000);
        let length = 40 + body.len() as u32;
        let mut bytes = [length, operation, self.turn.into(), 0]
            .map(u32::to_le_bytes)
            .concat();
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(body);
        p.put(request, &bytes);
        change(p, request, reply);
        self.queue
            .descriptor(p, 0, (request, bytes.len() as u32), NEXT, 1);
        self.queue.descriptor(p, 1, (reply, 0x1000), WRITE, 0);
        self.queue.heads(p, 0);
        self.queue.offer(p, 1);
        self.turn += 1;
        p.wait16(self.queue.used_index(), self.turn);
        p.show(reply + 4);
    }
}

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

// must-test: FUSE: names with `/`, `..`, NUL or over-long ones
#[test]
fn requests_that_would_lead_out_of_the_share() {
    let Some(host) = Host::new() else { return };
    fs::write(host.share().join("f"), "f").unwrap();
    symlink("../secret", host.share().join("out")).unwrap();
    let long = "x".repeat(300);
    let names = [
        "..",
        ".",
        "",
        "../secret",
        "/secret",
        "/proc/self/root",
        "f/..",
        "out/x",
        &long,
    ];
    let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|w| w.to_le_bytes()).collect() };
    let mut refused = 0;
    let console = host.survived("names", |p| {
        let mut client = Client::new(p);
        let mut refuse = |p: &mut Program, operation, node, body: &[u8]| {
            refused += 1;
            client.ask(p, operation, node, body, |_, _, _| {});
        };
        for bad in names {
            let bad = name(bad);
            refuse(p, LOOKUP, ROOT, &bad);
            refuse(p, UNLINK, ROOT, &bad);
            refuse(p, MKDIR, ROOT, &[words(&[0o777, 0]), bad.clone()].concat());
            refuse(p, SYMLINK, ROOT, &[bad.clone(), name("f")].concat());
            let create = words(&[libc::O_RDWR as u32, 0o666, 0, 0]);
            refuse(p, CREATE, ROOT, &[create, bad.clone()].concat());
            let link = ROOT.to_le_bytes().to_vec();
            refuse(p, LINK, ROOT, &[link.clone(), bad.clone()].concat());
            refuse(
                p,
                RENAME,
                ROOT,
                &[link.clone(), name("f"), bad.clone()].concat(),
            );
            refuse(p, RENAME, ROOT, &[link, bad, name("g")].concat());
        }
        // A name without an end, and files that nobody looked up.
        refuse(p, LOOKUP, ROOT, b"f");
        for node in [0, 2, 99, u64::MAX] {
            refuse(p, LOOKUP, node, &name("f"));
            refuse(p, OPEN, node, &words(&[0, 0]));
            refuse(p, READ, node, &words(&[9, 9, 0, 0, 4096, 0, 0, 0, 0, 0]));
        }
        // Devices: a disk, and all memory.
        for (kind, device) in [(libc::S_IFBLK, 0x800u32), (libc::S_IFCHR, 0x101)] {
            let node = words(&[kind | 0o666, device, 0, 0]);
            refuse(p, MKNOD, ROOT, &[node, name("node")].concat());
        }
    });
    let answers: Vec<_> = console.lines().collect();
    assert_eq!(answers[0], "00000000", "INIT");
    assert_eq!(answers.len(), refused + 2, "{console}");
    for (i, answer) in answers[1..=refused].iter().enumerate() {
        assert!(answer.starts_with("ffff"), "request {i}: {answer}");
    }
}

#[test]
fn a_link_is_never_followed_for_the_guest() {
    let Some(host) = Host::new() else { return };
    symlink("../secret", host.share().join("out")).unwrap();
    let console = host.survived("links", |p| {
        let mut client = Client::new(p);
        // Its number is in the answer (fuse_entry_out), behind the header.
        client.ask(p, LOOKUP, ROOT, &name("out"), |_, _, _| {});
        let to_node = |p: &mut Program, request: u64, reply: u64| {
            p.copy(reply + 16, request + 16, 8);
        };
        for flags in [libc::O_RDONLY, libc::O_RDWR | libc::O_TRUNC] {
            // The answer to a refused request has no number in it: ask anew.
            let body = [flags as u32, 0].map(u32::to_le_bytes).concat();
            client.ask(p, OPEN, 0, &body, to_node);
            client.ask(p, LOOKUP, ROOT, &name("out"), |_, _, _| {});
        }
        // As if it were a directory.
        client.ask(p, LOOKUP, 0, &name("secret"), to_node);
    });
    let answers: Vec<_> = console.lines().collect();
    assert_eq!(answers.len(), 8, "{console}");
    for (answer, good) in answers[..7]
        .iter()
        .zip([true, true, false, true, false, true, false])
    {
        assert_eq!(*answer == "00000000", good, "{console}");
    }
}

/// Flags that no open file can be given, at OPEN and later.
#[test]
fn flags_of_a_request_do_not_reach_an_open_file() {
    let Some(host) = Host::new() else { return };
    fs::write(host.share().join("f"), "f").unwrap();
    let stated = [libc::O_RDONLY, libc::O_PATH, libc::O_NOATIME, -1];
    let console = host.survived("flags", |p| {
        let mut client = Client::new(p);
        // Kept behind the request: the number of the file, and of the handle.
        const NODE: u64 = 0x800;
        const HANDLE: u64 = 0x808;
        client.ask(p, LOOKUP, ROOT, &name("f"), |_, _, _| {});
        // Where they are in the first answer after each request for them (fuse_entry_out, fuse_open_out).
        const NUMBER: u64 = 16;
        for (opened, flags) in [libc::O_RDONLY, libc::O_PATH, libc::O_NOATIME]
            .into_iter()
            .enumerate()
        {
            let body = [flags as u32, 0].map(u32::to_le_bytes).concat();
            client.ask(p, OPEN, 0, &body, |p, request, reply| {
                if opened == 0 {
                    p.copy(reply + NUMBER, request + NODE, 8);
                }
                p.copy(request + NODE, request + 16, 8);
            });
            for (reads, later) in stated.into_iter().enumerate() {
                let body = [0, 0, 0, 0, 9, 0, 0, 0, later as u32, 0].map(u32::to_le_bytes);
                client.ask(p, READ, 0, &body.concat(), |p, request, reply| {
                    if reads == 0 {
                        p.copy(reply + NUMBER, request + HANDLE, 8);
                    }
                    p.copy(request + NODE, request + 16, 8);
                    p.copy(request + HANDLE, request + 40, 8);
                });
            }
        }
    });
    let answers: Vec<_> = console.lines().collect();
    assert_eq!(answers.len(), 2 + 3 * (1 + stated.len()) + 1, "{console}");
    for answer in &answers[..answers.len() - 1] {
        assert_eq!(*answer, "00000000", "{console}");
    }
}

/// Sets a flag when it goes, however a test ends.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Names that change between a look and a use: a directory that is a link now and then, on both sides.
#[test]
fn races_on_names_lead_nowhere() {
    let Some(host) = Host::new() else { return };
    let kernel = kernel("vmlinux").unwrap();
    let share = host.share();
    fs::create_dir(share.join("real")).unwrap();
    fs::write(share.join("real/secret"), "inside\n").unwrap();
    symlink("..", share.join("link")).unwrap();
    symlink("/proc/1/root", share.join("proc")).unwrap();
    fs::create_dir(share.join("swap")).unwrap();
    let mut spec = Spec::new(
        &kernel,
        "mount -t virtiofs share /mnt || echo cannot mount
         cd /mnt
         for i in $(seq 20); do ln -sfn real g; ln -sfn .. g; done &
         for i in $(seq 20); do ln -f real/secret hard; ln -f link hard 2>/dev/null; rm -f hard; done &
         for i in $(seq 40); do
             cat swap/secret link/secret g/secret proc/etc/hostname hard
             echo written > swap/new; echo written > g/new; echo written > link/new2
         done 2>/dev/null >/seen
         sort /seen | uniq -c; echo end; poweroff -f",
    );
    spec.config.memory_mib = 256;
    host.equip(&mut spec);
    let vm = spec.boot().unwrap();
    let stop = AtomicBool::new(false);
    let end = std::thread::scope(|scope| {
        // Another pod with the same volume could do that.
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let _ = fs::remove_dir_all(share.join("swap"));
                let _ = symlink("..", share.join("swap"));
                std::thread::sleep(Duration::from_millis(2));
                let _ = fs::remove_file(share.join("swap"));
                let _ = fs::create_dir(share.join("swap"));
                let _ = fs::hard_link(share.join("real/secret"), share.join("swap/secret"));
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let _stop = AtEnd(&stop);
        host.end("races", vm)
    });
    assert_eq!(end.reason, ExitReason::PoweredOff);
    assert!(end.console.contains("inside"), "{}", end.console);
    assert!(end.console.contains("end\n"), "{}", end.console);
}
