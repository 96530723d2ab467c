//! Parts of a disk as block devices of their own: partitions, which cost nothing and need no table on the disk, and
//! loop devices when there are no more of them.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::loopdev::{self, LoopDevice};
use crate::disks;

// Of linux/blkpg.h.
const BLKPG: libc::Ioctl = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
/// The last number that the kernel gives to a partition (`DISK_MAX_PARTS`, less the disk itself).
const LAST_PARTITION: usize = 255;
/// What a disk is divided into.
const SECTOR: u64 = 512;
/// KiB that the kernel reads ahead in a file: a request to the host costs far more than the bytes in it.
const READ_AHEAD_KIB: u64 = 1024;
/// The most bytes of a layer's names and inodes that are read ahead when it is mounted.
const MAX_METADATA: u64 = 16 << 20;

// The superblock of EROFS (fs/erofs/erofs_fs.h of the kernel).
const SUPERBLOCK: u64 = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS_AT: usize = 12;
const META_BLOCK_AT: usize = 40;

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
    bytes: u64,
    _loop: Option<LoopDevice>,
}

/// The block device of a part of a disk, to be read.
///
/// # Errors
/// If there is no such disk, the part is not one of whole sectors of it, or the kernel makes no device.
pub(super) fn device(range: &DiskRange) -> io::Result<Device> {
    let whole = range.offset.is_multiple_of(SECTOR)
        && range.bytes.is_multiple_of(SECTOR)
        && range.bytes > 0;
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
            bytes: range.bytes,
            _loop: None,
        });
    }
    let disk = disks::find(&range.serial)?;
    let number = made
        .iter()
        .filter(|(known, _)| known.serial == range.serial)
        .count()
        + 1;
    let open = File::open(&disk)?;
    if number == 1
        && let Some(name) = disk.file_name()
    {
        let queue = Path::new("/sys/block").join(name).join("queue");
        // Without it everything is only slower.
        let _ = fs::write(queue.join("read_ahead_kb"), READ_AHEAD_KIB.to_string());
    }
    if number > LAST_PARTITION {
        let part = loopdev::Part {
            offset: range.offset,
            limit: range.bytes,
            writable: false,
        };
        let device = loopdev::attach(&open, part)?;
        return Ok(Device {
            path: device.path.clone(),
            bytes: range.bytes,
            _loop: Some(device),
        });
    }
    add_partition(&open, number, range)?;
    let mut path = disk.into_os_string();
    path.push(number.to_string());
    let path = PathBuf::from(path);
    made.push((range.clone(), path.clone()));
    Ok(Device {
        path,
        bytes: range.bytes,
        _loop: None,
    })
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

/// Reads the names and inodes of a layer that was just mounted ahead, in the background. EROFS reads them block for block,
/// each a request to the host, when somebody walks through the directories.
pub(super) fn read_ahead(device: Device) {
    // What cannot be read ahead will be read when it is needed, and then the error is told.
    let _ = std::thread::Builder::new()
        .name("read-ahead".into())
        .spawn(move || read_metadata_ahead(&device));
}

fn read_metadata_ahead(device: &Device) -> io::Result<()> {
    let open = File::open(&device.path)?;
    let mut superblock = [0; 128];
    open.read_exact_at(&mut superblock, SUPERBLOCK)?;
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&superblock[at..at + 4]);
        u32::from_le_bytes(bytes)
    };
    let bits = superblock[BLOCK_BITS_AT];
    if word(0) != MAGIC || bits > 16 {
        return Ok(());
    }
    // Inodes are at the end, and large directories before them.
    let inodes = u64::from(word(META_BLOCK_AT)) << bits;
    let length = device.bytes.saturating_sub(inodes).min(MAX_METADATA);
    let start = inodes.saturating_sub(length / 2);
    let signed = |number: u64| i64::try_from(number).map_err(io::Error::other);
    let mut at = start;
    while at < inodes + length {
        // The kernel takes no more at a time, and says nothing of the rest.
        let part = (inodes + length - at).min(READ_AHEAD_KIB << 10);
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        posix_fadvise(&open, signed(at)?, signed(part)?, advice)?;
        at += part;
    }
    Ok(())
}
