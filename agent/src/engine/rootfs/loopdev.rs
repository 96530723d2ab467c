//! Loop devices: block devices made of files (drivers/block/loop.c, loop(4)).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

// Of linux/loop.h.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// How often another user of loop devices may be faster.
const ATTEMPTS: usize = 128;

#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct Config {
    descriptor: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device; it frees itself when it is closed here and unmounted everywhere.
pub(super) struct LoopDevice {
    /// Its node.
    pub path: PathBuf,
    _open: File,
}

/// What of a file a loop device shows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    /// The first byte.
    pub offset: u64,
    /// The most bytes; 0 is no limit.
    pub limit: u64,
    /// Whether it can be written.
    pub writable: bool,
}

/// Makes a loop device of a file or block device.
///
/// # Errors
/// If there is no loop driver, or no node appears for the device.
pub(super) fn attach(file: &File, part: Part) -> io::Result<LoopDevice> {
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        // SAFETY: takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open(&path, part.writable)?;
        // SAFETY: a struct of integers, for which zero means "not used".
        let mut config: Config = unsafe { std::mem::zeroed() };
        config.descriptor = file.as_raw_fd() as u32;
        config.info.offset = part.offset;
        config.info.size_limit = part.limit;
        // Direct where the file can: the pages are cached once, above. The kernel falls back by itself.
        config.info.flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
        if !part.writable {
            config.info.flags |= LO_FLAGS_READ_ONLY;
        }
        // SAFETY: this request reads one struct loop_config, which Config is laid out as.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        if result == 0 {
            return Ok(LoopDevice {
                path,
                _open: device,
            });
        }
        let error = io::Error::last_os_error();
        // Somebody else took it between the two calls.
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err(error);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn open(path: &PathBuf, writable: bool) -> io::Result<File> {
    let device = OpenOptions::new().read(true).write(writable).open(path)?;
    let metadata = device.metadata()?;
    // The loop driver's major number: nothing else at this path gets the request.
    if !metadata.file_type().is_block_device() || libc::major(metadata.rdev()) != 7 {
        return Err(io::Error::other(format!(
            "{} is not a loop device",
            path.display()
        )));
    }
    Ok(device)
}
