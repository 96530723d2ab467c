//! One input of the fuzz targets `fs` and `fuse`: requests to a share, and, for the former, a driver's tricks.
//!
//! The share is on a file system of its own in memory, which is small and mounted nowhere.

use std::fs as files;
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::fuzzing::guest::{Device, Guest};
use crate::fuzzing::input::Input;

const INIT: u32 = 26;
/// Requests that change nothing: LOOKUP to GETATTR, READLINK, READ, STATFS to FSYNCDIR, ACCESS.
const HARMLESS: [std::ops::RangeInclusive<u32>; 5] = [1..=3, 5..=5, 15..=15, 17..=30, 34..=34];

/// What lies beside the share while this input is tried, and must not come out. It is made of the input, as a fuzzer soon finds
/// out any other and has the guest write it.
fn secret_of(data: &[u8]) -> Vec<u8> {
    let mut hasher = DefaultHasher::new();
    let mut secret = b"outside: ".to_vec();
    for _ in 0..3 {
        hasher.write(data);
        secret.extend(hasher.finish().to_le_bytes());
    }
    secret
}

/// A directory with the share and what is beside it.
struct Tree {
    base: PathBuf,
    _mount: OwnedFd,
}

impl Tree {
    fn new() -> Self {
        let root = nix::unistd::geteuid().is_root();
        assert!(
            root,
            "the file server creates files as several users: run this as root"
        );
        let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).expect("a tmpfs");
        fsconfig_set_string(&tmpfs, "size", "4m").expect("a size");
        fsconfig_set_string(&tmpfs, "nr_inodes", "4096").expect("a number");
        fsconfig_create(&tmpfs).expect("a tmpfs");
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let mount = fsmount(&tmpfs, flags, MountAttrFlags::empty()).expect("a mount");
        let base = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        let tree = Self {
            base,
            _mount: mount,
        };
        files::create_dir(tree.base.join("outside")).expect("room");
        tree.fill();
        tree
    }

    fn secret(&self) -> PathBuf {
        self.base.join("outside/secret")
    }

    fn share(&self) -> PathBuf {
        self.base.join("share")
    }

    fn fill(&self) {
        let share = self.share();
        files::create_dir(&share).expect("room");
        files::create_dir(share.join("d")).expect("room");
        files::write(share.join("d/x"), [0x5a; 5000]).expect("room");
        files::write(share.join("f"), "f").expect("room");
        symlink("../outside/secret", share.join("l")).expect("room");
        symlink("../outside", share.join("m")).expect("room");
    }

    /// Panics where something beside the share is not as it was; makes the share as it was.
    fn restore(&self, changed: bool, secret: &[u8]) {
        let names = |path: &Path| {
            let entries = files::read_dir(path).expect("a directory");
            let mut names: Vec<_> = entries.map(|e| e.expect("an entry").file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&self.base), ["outside", "share"]);
        assert_eq!(names(&self.base.join("outside")), ["secret"]);
        let kept = files::read(self.secret()).expect("the secret");
        assert!(kept == secret, "what is not shared was written to");
        if changed {
            files::remove_dir_all(self.share()).expect("the share");
            self.fill();
        }
    }
}

struct Fuzzed {
    requests: Requests,
    changed: bool,
}

impl Fuzzed {
    fn ask(guest: &mut Guest, opcode: u32, node: u64, user: u32, body: &[u8], room: &[u32]) {
        // An input is short.
        let mut header = (40 + body.len() as u32).to_le_bytes().to_vec();
        header.extend(opcode.to_le_bytes());
        header.extend(4711u64.to_le_bytes());
        header.extend(node.to_le_bytes());
        for word in [user, user, 1, 0] {
            header.extend(word.to_le_bytes());
        }
        guest.request(1, &[&header, body], room);
    }
}

impl Device for Fuzzed {
    type Handler = Requests;

    fn handler(&mut self) -> &mut Requests {
        &mut self.requests
    }

    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        let opcode = u32::from(input.byte() % 56);
        let node = match input.byte() {
            0xff => input.quad(),
            near => u64::from(near % 16),
        };
        let how = input.byte();
        let user = [0, 1000, u32::MAX, 65534][usize::from(how) & 3];
        let room = match how >> 4 {
            0..8 => 0x4000,
            8 => 0,
            _ => input.word().into(),
        };
        // What is not said is zero: most requests are longer than what matters in them.
        let mut body = input.counted().to_vec();
        body.resize(body.len().max(usize::from(how & 0x0c) << 3), 0);
        self.changed |= !HARMLESS.iter().any(|range| range.contains(&opcode));
        Self::ask(guest, opcode, node, user, &body, &[room]);
    }
}

fn run(data: &[u8], hostile: bool) {
    thread_local!(static TREE: Tree = Tree::new());
    TREE.with(|tree| {
        let secret = secret_of(data);
        files::write(tree.secret(), &secret).expect("room");
        let open = files::File::open(tree.share()).expect("the share");
        let share = Arc::new(Share::new(ShareRoot::Directory(open.into())).expect("a server"));
        share.open_root().expect("the share's root");
        let server = Arc::new(Server::new(share));
        let mut input = Input::new(data);
        let event_index = input.byte() & 1 != 0;
        let (mut guest, rings) = Guest::new(DEVICE, event_index, QUEUE_SIZES, &mut input);
        let memory = guest.memory.clone();
        let mut init = Vec::new();
        for word in [7, 36, 0x10_0000, u32::MAX] {
            init.extend(word.to_le_bytes());
        }
        init.resize(64, 0);
        Fuzzed::ask(&mut guest, INIT, 0, 0, &init, &[0x100]);
        let mut device = Fuzzed {
            requests: Requests::new(server, memory.clone(), rings),
            // Requests that were put together by hand are not looked into.
            changed: hostile,
        };
        guest.run(&mut device, input, hostile);
        let changed = device.changed;
        drop(device);
        let mut seen = vec![0; 0x1_0000];
        let read = memory
            .memory()
            .read_slice(&mut seen, GuestAddress(0x4_0000));
        read.expect("the guest's memory");
        // SAFETY: both are slices, with their lengths.
        let leaked = unsafe {
            libc::memmem(
                seen.as_ptr().cast(),
                seen.len(),
                secret.as_ptr().cast(),
                secret.len(),
            )
        };
        assert!(leaked.is_null(), "the guest has read what is not shared");
        tree.restore(changed, &secret);
    });
}

/// The file system device and its rings.
pub fn fs(data: &[u8]) {
    run(data, true);
}

/// The file server by requests alone.
pub fn fuse(data: &[u8]) {
    run(data, false);
}
