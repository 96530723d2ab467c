//! Disks that are small, or that have what the machine's have not.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use tempfile::{Builder, TempDir};

/// A disk of its own: an ext4 file system in a file.
pub struct Disk(TempDir);

impl Disk {
    /// Makes it, so large and with these options of `mkfs.ext4`, and mounts it.
    pub fn new(megabytes: u64, options: &[&str]) -> Self {
        let dir = Builder::new()
            .prefix("caisson-test-")
            .tempdir_in("/var/lib")
            .unwrap();
        let file = dir.path().join("disk");
        fs::File::create(&file)
            .unwrap()
            .set_len(megabytes << 20)
            .unwrap();
        let target = dir.path().join("mounted");
        fs::create_dir(&target).unwrap();
        for command in [
            Command::new("mkfs.ext4")
                .args(["-q", "-m", "0"])
                .args(options)
                .arg(&file),
            Command::new("mount")
                .args(["-o", "loop"])
                .args([&file, &target]),
        ] {
            let status = command
                .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
                .status()
                .unwrap();
            assert!(status.success(), "{command:?}");
        }
        Self(dir)
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.0.path().join("mounted")
    }

    /// The file that it is in.
    pub fn file(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    /// Fills it until so much is free, with a file that is returned.
    pub fn leave(&self, kilobytes: u64) -> PathBuf {
        let ballast = self.path().join("ballast");
        let mut file = fs::File::create(&ballast).unwrap();
        loop {
            let free = nix::sys::statvfs::statvfs(&self.path()).unwrap();
            let free = free.blocks_available() * free.fragment_size();
            let more = free.saturating_sub(kilobytes << 10).min(1 << 20);
            // The last block of all may be taken by the file system itself.
            if more < 4096 || file.write_all(&vec![1; more as usize]).is_err() {
                return ballast;
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
