//! The disks of the guest, by their serials.

use std::io;
use std::path::{Path, PathBuf};

/// The most bytes of a serial (virtio 1.2 §5.2.6).
pub const SERIAL_MAX: usize = 20;
/// Options of ext4 for the pod's scratch disk. No thread zeroes inode tables in the background, as the disk begins
/// as a sparse file in which they are zero. Nothing waits for the journal, nor for the node's disk: after a crash of the
/// guest or the node nobody reads a scratch disk again.
pub const SCRATCH_OPTIONS: &str = "noinit_itable,data=writeback,nobarrier";

/// The device node of the virtio-blk disk with this serial.
///
/// # Errors
/// `NotFound` where there is none (yet).
pub fn find(serial: &str) -> io::Result<PathBuf> {
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        let found = std::fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end() == serial {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("no disk has the serial {serial}"),
    ))
}
