//! What a daemon would make on the host: mounts and taps.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;

/// Runs a program, which must succeed.
pub fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

/// A directory that is a shared mount, as the daemon makes it; unmounted when it is dropped.
pub struct Shared(pub tempfile::TempDir);

impl Shared {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        run("mount", &["-t", "tmpfs", "none", path]);
        run("mount", &["--make-shared", path]);
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let path = self.0.path().to_str().unwrap();
        let _ = Command::new("umount").args(["-R", path]).status();
    }
}

/// A tap with virtio headers.
pub fn tap(name: &str) -> OwnedFd {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let file = file.unwrap();
    // SAFETY: an all-zero ifreq is valid, and the ioctl reads and writes the one it is given.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        let made = libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request);
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    }
    file.into()
}

/// vhost-net; `None`, said aloud, where the kernel has none.
pub fn vhost_net() -> Option<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/vhost-net");
    match device {
        Ok(device) => Some(device.into()),
        Err(error) => {
            println!("skipped: /dev/vhost-net: {error}");
            None
        }
    }
}
