//! Real FUSE requests, as bytes, through a ring.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use super::super::testing::{Desc, Driver, Interrupts, activation, memory, wait_until};
use super::*;

pub const REQUEST: u64 = 0x1_0000;
pub const REPLY: u64 = 0x4_0000;
pub const ROOM: u32 = 0x2_0000;
pub const ROOT: u64 = 1;

pub const LOOKUP: u32 = 1;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const GETXATTR: u32 = 22;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const CREATE: u32 = 35;
pub const DESTROY: u32 = 38;
pub const IOCTL: u32 = 39;
pub const BATCH_FORGET: u32 = 42;
pub const READDIRPLUS: u32 = 44;
pub const SETUPMAPPING: u32 = 48;

/// A share with a directory beside it that must stay as it is, and the driver of its device.
pub struct Setup {
    _device: Fs,
    pub priority: Driver,
    pub requests: Driver,
    pub failures: Receiver<String>,
    base: tempfile::TempDir,
    pub sent: u16,
}

impl Setup {
    pub fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir(base.path().join("share")).unwrap();
        fs::create_dir(base.path().join("outside")).unwrap();
        fs::write(base.path().join("outside/secret"), "secret").unwrap();
        let open = fs::File::open(base.path().join("share")).unwrap();
        let mut device = Fs::new("share", ShareRoot::Directory(open.into())).unwrap();
        device.open_root().unwrap();
        let memory = memory();
        let interrupts = Arc::new(Interrupts::default());
        let priority = Driver::numbered(&memory, 64, 0, Arc::clone(&interrupts));
        let requests = Driver::numbered(&memory, 64, 1, interrupts);
        let (start, failures) = activation(&[&priority, &requests], 0);
        device.activate(start).unwrap();
        let mut setup = Self {
            _device: device,
            priority,
            requests,
            failures,
            base,
            sent: 0,
        };
        let init = [words(&[7, 36, 0x10_0000]), words(&[u32::MAX])].concat();
        let (error, reply) = setup.ask(INIT, 0, &[init, vec![0; 48]].concat());
        assert_eq!((error, &reply[..4]), (0, &7u32.to_le_bytes()[..]));
        setup
    }

    pub fn share(&self) -> PathBuf {
        self.base.path().join("share")
    }

    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        self.ask_as(0, 0, opcode, node, body)
    }

    /// Sends a request; returns its error (positive) and the rest of the answer.
    pub fn ask_as(
        &mut self,
        uid: u32,
        gid: u32,
        opcode: u32,
        node: u64,
        body: &[u8],
    ) -> (i32, Vec<u8>) {
        let bytes = request(uid, gid, opcode, node, body);
        self.send(&bytes);
        let len = self.requests.last_used(1)[0].1 as usize;
        let reply = self.requests.bytes(REPLY, len);
        assert_eq!(
            u32::from_le_bytes(reply[..4].try_into().unwrap()) as usize,
            len
        );
        assert_eq!(reply[8..16], 4711u64.to_le_bytes(), "unique");
        let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
        (-error, reply[16..].to_vec())
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.requests.recycle();
        self.requests.put(REQUEST, bytes);
        self.requests.add(&[
            Desc::read(REQUEST, bytes.len() as u32),
            Desc::write(REPLY, ROOM),
        ]);
        self.requests.notify();
        self.sent = self.sent.wrapping_add(1);
        wait_until("answered", || self.requests.used_index() == self.sent);
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        match self.ask(LOOKUP, parent, &terminated(name)) {
            (0, entry) => Ok(u64::from_le_bytes(entry[..8].try_into().unwrap())),
            (error, _) => Err(error),
        }
    }

    pub fn open(&mut self, opcode: u32, node: u64, flags: i32) -> Result<u64, i32> {
        match self.ask(opcode, node, &words(&[flags as u32, 0])) {
            (0, open) => Ok(u64::from_le_bytes(open[..8].try_into().unwrap())),
            (error, _) => Err(error),
        }
    }

    pub fn read(&mut self, opcode: u32, node: u64, handle: u64, size: u32) -> (i32, Vec<u8>) {
        self.ask(opcode, node, &read_in(handle, size, 0))
    }

    pub fn write(&mut self, node: u64, handle: u64, data: &[u8], flags: i32) -> i32 {
        let body = write_in(handle, data, data.len() as u32, flags);
        self.ask(WRITE, node, &body).0
    }

    pub fn outside_is_untouched(&self) {
        let names = |path: &Path| {
            let mut names: Vec<_> = fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(self.base.path()), ["outside", "share"]);
        assert_eq!(names(&self.base.path().join("outside")), ["secret"]);
        let secret = fs::read_to_string(self.base.path().join("outside/secret")).unwrap();
        assert_eq!(secret, "secret");
    }
}

pub fn request(uid: u32, gid: u32, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = words(&[40 + body.len() as u32, opcode]);
    bytes.extend(4711u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend(words(&[uid, gid, 1, 0]));
    bytes.extend(body);
    bytes
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

pub fn read_in(handle: u64, size: u32, flags: i32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(0u64.to_le_bytes());
    body.extend(words(&[size, 0, 0, 0, flags as u32, 0]));
    body
}

pub fn create_in(flags: i32, name: &str) -> Vec<u8> {
    let mut body = words(&[flags as u32, 0o640, 0, 0]);
    body.extend(terminated(name));
    body
}

pub fn write_in(handle: u64, data: &[u8], size: u32, flags: i32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(0u64.to_le_bytes());
    body.extend(words(&[size, 0, 0, 0, flags as u32, 0]));
    body.extend(data);
    body
}

#[test]
fn files_are_found_read_and_written() {
    let mut s = Setup::new();
    fs::create_dir(s.share().join("d")).unwrap();
    fs::write(s.share().join("d/unmistakable"), "hello").unwrap();
    let d = s.lookup(ROOT, "d").unwrap();
    let f = s.lookup(d, "unmistakable").unwrap();
    assert_eq!(
        s.lookup(d, "unmistakable"),
        Ok(f),
        "the same file is the same inode"
    );
    assert_eq!(s.lookup(ROOT, "absent"), Err(libc::ENOENT));
    let handle = s.open(OPEN, f, libc::O_RDWR).unwrap();
    assert_eq!(s.read(READ, f, handle, 100), (0, b"hello".to_vec()));
    assert_eq!(s.write(f, handle, b"HELLO world", libc::O_RDWR), 0);
    assert_eq!(
        fs::read_to_string(s.share().join("d/unmistakable")).unwrap(),
        "HELLO world"
    );

    let list = s.open(OPENDIR, d, libc::O_RDONLY).unwrap();
    for opcode in [READDIR, READDIRPLUS] {
        let (error, entries) = s.read(opcode, d, list, 4096);
        assert_eq!(error, 0);
        assert!(entries.windows(12).any(|name| name == b"unmistakable"));
    }
    assert!(s.failures.try_recv().is_err());
}

/// A guest's kernel states a file's flags at each write, as they are by then.
#[test]
fn a_write_appends_where_the_guest_says_so_at_the_time() {
    let mut s = Setup::new();
    let path = s.share().join("f");
    fs::write(&path, "12345").unwrap();
    let f = s.lookup(ROOT, "f").unwrap();
    let content = || fs::read_to_string(&path).unwrap();
    let plain = s.open(OPEN, f, libc::O_RDWR).unwrap();
    let appending = libc::O_RDWR | libc::O_APPEND;
    let log = s.open(OPEN, f, appending).unwrap();
    assert_eq!(s.write(f, log, b"6", appending), 0);
    assert_eq!(content(), "123456");
    assert_eq!(s.write(f, log, b"a", libc::O_RDWR), 0);
    assert_eq!(content(), "a23456");
    assert_eq!(s.write(f, log, b"7", appending), 0);
    assert_eq!(s.write(f, plain, b"8", appending), 0);
    assert_eq!(s.write(f, plain, b"b", libc::O_RDWR), 0);
    assert_eq!(s.write(f, plain, b"9", appending), 0);
    assert_eq!(content(), "b23456789");
    for handle in [log, plain] {
        let release = [handle.to_le_bytes(), [0; 8], [0; 8]].concat();
        assert_eq!(s.ask(RELEASE, f, &release).0, 0);
    }
    // What was opened beside them is released with them: handles are numbered one after the other.
    for handle in plain..plain + 4 {
        assert_eq!(s.read(READ, f, handle, 1).0, libc::EBADF, "{handle}");
    }
}

#[test]
fn an_update_on_the_host_shows_at_once_on_the_server() {
    let mut s = Setup::new();
    for version in ["v1", "v2"] {
        fs::create_dir(s.share().join(version)).unwrap();
        fs::write(s.share().join(version).join("key"), version).unwrap();
    }
    symlink("v1", s.share().join("..data")).unwrap();
    let (error, entry) = s.ask(LOOKUP, ROOT, &terminated("..data"));
    assert_eq!(error, 0);
    // entry_valid, attr_valid in seconds: what the guest may hold for true.
    for valid in [16, 24] {
        let seconds = u64::from_le_bytes(entry[valid..valid + 8].try_into().unwrap());
        assert!(
            seconds <= 1,
            "the guest would not look again for {seconds} s"
        );
    }
    let data = u64::from_le_bytes(entry[..8].try_into().unwrap());
    assert_eq!(s.ask(READLINK, data, &[]), (0, b"v1".to_vec()));
    symlink("v2", s.share().join("..new")).unwrap();
    fs::rename(s.share().join("..new"), s.share().join("..data")).unwrap();
    let data = s.lookup(ROOT, "..data").unwrap();
    assert_eq!(s.ask(READLINK, data, &[]), (0, b"v2".to_vec()));
}

// must-test: FUSE: names with `/`, `..`, NUL, or over-long ones
#[test]
fn bad_names_are_refused_by_every_request_that_has_one() {
    let mut s = Setup::new();
    fs::create_dir(s.share().join("d")).unwrap();
    fs::write(s.share().join("f"), "f").unwrap();
    let d = s.lookup(ROOT, "d").unwrap();
    let f = s.lookup(ROOT, "f").unwrap();
    let long = "x".repeat(256);
    let bad = [
        "",
        ".",
        "..",
        "../outside",
        "d/../../outside",
        "/etc",
        "a/b",
        "d/",
        &long,
        "../outside/new",
    ];
    for name in bad {
        let n = terminated(name);
        let good = terminated("good");
        for parent in [ROOT, d] {
            let requests: Vec<(u32, Vec<u8>)> = vec![
                (LOOKUP, n.clone()),
                (MKDIR, [words(&[0o755, 0]), n.clone()].concat()),
                (MKNOD, [words(&[0o100_644, 0, 0, 0]), n.clone()].concat()),
                (CREATE, create_in(libc::O_RDWR | libc::O_CREAT, name)),
                (UNLINK, n.clone()),
                (RMDIR, n.clone()),
                (SYMLINK, [n.clone(), terminated("target")].concat()),
                (LINK, [f.to_le_bytes().to_vec(), n.clone()].concat()),
                (
                    RENAME,
                    [ROOT.to_le_bytes().to_vec(), n.clone(), good.clone()].concat(),
                ),
                (
                    RENAME,
                    [ROOT.to_le_bytes().to_vec(), good.clone(), n.clone()].concat(),
                ),
            ];
            for (opcode, body) in requests {
                let (error, _) = s.ask(opcode, parent, &body);
                let expected: &[i32] = if name.len() > 255 {
                    &[libc::ENAMETOOLONG, libc::EINVAL]
                } else {
                    &[libc::EINVAL]
                };
                assert!(expected.contains(&error), "{opcode} {name:?}: {error}");
            }
        }
    }
    // Not terminated, and with a NUL within: nothing behind the NUL is looked at.
    assert_eq!(s.ask(LOOKUP, ROOT, b"f").0, libc::EINVAL);
    assert!(s.ask(LOOKUP, d, b"..\0/../outside\0").0 != 0);
    s.outside_is_untouched();
    assert!(s.share().join("f").exists());
    assert!(s.failures.try_recv().is_err());
}

#[test]
fn a_link_that_leads_outside_is_text_to_the_server() {
    let mut s = Setup::new();
    symlink("../outside/secret", s.share().join("link")).unwrap();
    let link = s.lookup(ROOT, "link").unwrap();
    assert_eq!(s.ask(READLINK, link, &[]).1, b"../outside/secret");
    assert_eq!(s.open(OPEN, link, libc::O_RDONLY), Err(libc::EBADF));
    assert!(s.lookup(link, "x").is_err());
    s.outside_is_untouched();
}

#[test]
fn what_is_created_belongs_to_the_guests_user() {
    // SAFETY: takes nothing, changes nothing.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: creating files as others needs root");
        return;
    }
    let mut s = Setup::new();
    fs::set_permissions(s.share(), fs::Permissions::from_mode(0o770)).unwrap();
    let owner = |s: &Setup, name: &str| {
        let stat = fs::symlink_metadata(s.share().join(name)).unwrap();
        (stat.uid(), stat.gid())
    };
    let mkdir = |name: &str| [words(&[0o755, 0]), terminated(name)].concat();
    // The directory is closed to this user but for a group that the request does not name: the guest's kernel
    // has checked that, and let it through.
    assert_eq!(s.ask_as(1000, 2000, MKDIR, ROOT, &mkdir("mine")).0, 0);
    assert_eq!(owner(&s, "mine"), (1000, 2000));
    let created = create_in(libc::O_RDWR | libc::O_CREAT, "file");
    assert_eq!(s.ask_as(1001, 0, CREATE, ROOT, &created).0, 0);
    assert_eq!(owner(&s, "file"), (1001, 0));
    let link = [terminated("link"), terminated("x")].concat();
    assert_eq!(s.ask_as(0, 7, SYMLINK, ROOT, &link).0, 0);
    assert_eq!(owner(&s, "link"), (0, 7));
    assert_eq!(s.ask(MKDIR, ROOT, &mkdir("root")).0, 0);
    assert_eq!(owner(&s, "root"), (0, 0));
    let nobody = s.ask_as(u32::MAX, 0, MKDIR, ROOT, &mkdir("nobody")).0;
    assert_eq!(nobody, libc::EINVAL);
    assert_eq!(s.ask(MKDIR, ROOT, &mkdir("again")).0, 0);
    assert_eq!(owner(&s, "again"), (0, 0));
}

/// Runs a test in a mount namespace of its own, or says that it cannot.
fn with_own_mounts(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: acts on this thread alone, which ends with the test.
        if unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) } != 0 {
            println!("skipped: no right to make a mount namespace");
            return;
        }
        mount(
            Path::new("none"),
            Path::new("/"),
            libc::MS_REC | libc::MS_PRIVATE,
        );
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn mount(source: &Path, target: &Path, flags: libc::c_ulong) {
    let c = |path: &Path| std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let (source, target) = (c(source), c(target));
    // SAFETY: valid C strings; the other pointers may be null with these flags.
    let done = unsafe {
        let null = std::ptr::null();
        libc::mount(source.as_ptr(), target.as_ptr(), null, flags, null.cast())
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

// must-test: FUSE: a read-only mount written through another path
#[test]
fn a_mount_made_later_appears_and_a_read_only_one_refuses_writes() {
    with_own_mounts(|| {
        let mut s = Setup::new();
        let (volume, at) = (s.base.path().join("outside"), s.share().join("volume"));
        fs::create_dir(&at).unwrap();
        fs::create_dir(s.share().join("writable")).unwrap();
        s.lookup(ROOT, "volume").unwrap();
        mount(&volume, &at, libc::MS_BIND);
        mount(&volume, &s.share().join("writable"), libc::MS_BIND);
        mount(
            Path::new("none"),
            &at,
            libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY,
        );
        let writable = s.lookup(ROOT, "writable").unwrap();
        let same = s.lookup(writable, "secret").unwrap();
        let volume = s.lookup(ROOT, "volume").unwrap();
        let secret = s.lookup(volume, "secret").unwrap();
        assert_ne!(
            secret, same,
            "the same file through two mounts is two inodes"
        );
        let rw = s.open(OPEN, same, libc::O_RDWR).unwrap();
        assert_eq!(s.write(same, rw, b"secret", libc::O_RDWR), 0);

        assert_eq!(s.open(OPEN, secret, libc::O_RDWR), Err(libc::EROFS));
        assert_eq!(s.open(OPEN, secret, libc::O_TRUNC), Err(libc::EROFS));
        // A handle of the writable mount is none of this inode.
        assert_eq!(s.write(secret, rw, b"x", libc::O_RDWR), libc::EBADF);
        let read = s.open(OPEN, secret, libc::O_RDONLY).unwrap();
        assert_eq!(s.write(secret, read, b"x", libc::O_RDWR), libc::EBADF);
        let mut truncate = words(&[1 << 3, 0]);
        truncate.resize(88, 0);
        assert_eq!(s.ask(SETATTR, secret, &truncate).0, libc::EROFS);
        let mut mode = words(&[1, 0]);
        mode.resize(88, 0);
        assert_eq!(s.ask(SETATTR, secret, &mode).0, libc::EROFS);
        let new = create_in(libc::O_RDWR | libc::O_CREAT, "new");
        assert_eq!(s.ask(CREATE, volume, &new).0, libc::EROFS);
        assert_eq!(s.ask(UNLINK, volume, &terminated("secret")).0, libc::EROFS);
        let rename = [
            ROOT.to_le_bytes().to_vec(),
            terminated("secret"),
            terminated("s"),
        ]
        .concat();
        assert!(s.ask(RENAME, volume, &rename).0 != 0);
        let link = [secret.to_le_bytes().to_vec(), terminated("hard")].concat();
        assert_eq!(s.ask(LINK, writable, &link).0, libc::EXDEV);
        let text = fs::read_to_string(s.base.path().join("outside/secret")).unwrap();
        assert_eq!(text, "secret");
    });
}

#[test]
fn unmounting_in_the_guest_gives_everything_back_and_it_can_mount_again() {
    let mut s = Setup::new();
    fs::write(s.share().join("f"), "f").unwrap();
    let f = s.lookup(ROOT, "f").unwrap();
    s.open(OPEN, f, libc::O_RDONLY).unwrap();
    s.send(&request(0, 0, DESTROY, 0, &[]));
    assert_eq!(s.open(OPEN, f, libc::O_RDONLY), Err(libc::EBADF));
    let f = s.lookup(ROOT, "f").unwrap();
    assert!(s.open(OPEN, f, libc::O_RDONLY).is_ok());
}
