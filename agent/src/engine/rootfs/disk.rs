//! Parts of a disk as block devices of their own: partitions, which cost nothing and need no table on the disk, and
//! loop devices when there are no more of them.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::loopdev::{self, LoopDevice};
use crate::disks;

// Of linux/blkpg.h.
const BLKPG: libc::Ioctl = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
/// The last number that the kernel gives to a partition (`DISK_MAX_PARTS`, less the disk itself).
const LAST_PARTITION: usize = 255;
/// What a disk is divided into.
const SECTOR: u64 = 512;

#[repr(C)]
struct Partition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

#[repr(C)]
struct Argument {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *const Partition,
}

/// A part of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRange {
    /// The disk's serial.
    pub serial: String,
    /// The first byte.
    pub offset: u64,
    /// How many there are.
    pub bytes: u64,
}

impl fmt::Display for DiskRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "of {} bytes at {} of the disk {}",
            self.bytes, self.offset, self.serial
        )
    }
}

/// The partitions that were made. A part that was once given out stays what it is, so none is ever taken back.
static PARTITIONS: Mutex<Vec<(DiskRange, PathBuf)>> = Mutex::new(Vec::new());

/// A block device; one of the loop driver's frees itself when it is closed here and unmounted everywhere.
pub(super) struct Device {
    /// Its node.
    pub path: PathBuf,
    _loop: Option<LoopDevice>,
}

/// The block device of a part of a disk, to be read.
///
/// # Errors
/// If there is no such disk, the part is not one of whole sectors of it, or the kernel makes no device.
pub(super) fn device(range: &DiskRange) -> io::Result<Device> {
    let whole = range.offset % SECTOR == 0 && range.bytes % SECTOR == 0 && range.bytes > 0;
    let fits = range
        .offset
        .checked_add(range.bytes)
        .is_some_and(|end| i64::try_from(end).is_ok());
    if !whole || !fits {
        return Err(io::Error::other("these are not whole sectors of a disk"));
    }
    let mut made = PARTITIONS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, path)) = made.iter().find(|(known, _)| known == range) {
        return Ok(Device {
            path: path.clone(),
            _loop: None,
        });
    }
    let disk = disks::find(&range.serial)?;
    let number = made
        .iter()
        .filter(|(known, _)| known.serial == range.serial)
        .count()
        + 1;
    let open = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOCTTY)
        .open(&disk)?;
    if number > LAST_PARTITION {
        let device = loopdev::attach(&open, range.offset, range.bytes)?;
        return Ok(Device {
            path: device.path.clone(),
            _loop: Some(device),
        });
    }
    add_partition(&open, number, range)?;
    let mut path = disk.into_os_string();
    path.push(number.to_string());
    let path = PathBuf::from(path);
    made.push((range.clone(), path.clone()));
    Ok(Device { path, _loop: None })
}

fn add_partition(disk: &File, number: usize, range: &DiskRange) -> io::Result<()> {
    let partition = Partition {
        start: range.offset as libc::c_longlong,
        length: range.bytes as libc::c_longlong,
        number: number as libc::c_int,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let argument = Argument {
        operation: BLKPG_ADD_PARTITION,
        flags: 0,
        length: size_of::<Partition>() as libc::c_int,
        data: &raw const partition,
    };
    // SAFETY: this request reads one struct blkpg_ioctl_arg, which Argument is laid out as, and the struct
    // blkpg_partition that it points to; both live until the call returns.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
