//! The guest's clock and random pool.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use super::{Context, SandboxError};

/// The header of `struct rand_pool_info` (linux/random.h), with room for the largest request.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; 512],
}

/// Mixes bytes into the kernel's pool, credits them in full, and has the generator begin anew from there: what it would
/// have given before is the same in each clone of a template.
pub fn add_entropy(bytes: &[u8]) -> Result<(), SandboxError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let step = || "add entropy to /dev/urandom".to_owned();
    let device = OpenOptions::new()
        .write(true)
        .open("/dev/urandom")
        .context(step)?;
    let mut info = RandPoolInfo {
        entropy_count: (bytes.len() * 8) as libc::c_int,
        buf_size: bytes.len() as libc::c_int,
        buf: [0; 512],
    };
    let Some(place) = info.buf.get_mut(..bytes.len()) else {
        return Err(SandboxError::invalid("entropy", "more than 512 bytes"));
    };
    place.copy_from_slice(bytes);
    // _IOW('R', 0x03, int[2])
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    // SAFETY: the descriptor is open, and the kernel reads `buf_size` bytes of `buf`, which are there.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &info) };
    if result < 0 {
        return Err(io::Error::last_os_error()).context(step);
    }
    // _IO('R', 0x07)
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    // SAFETY: the descriptor is open, and the request has no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) };
    if result < 0 {
        return Err(io::Error::last_os_error()).context(|| "reseed /dev/urandom".to_owned());
    }
    Ok(())
}

/// Sets the clock, in nanoseconds since 1970.
pub fn set(unix_time_ns: i64) -> Result<(), SandboxError> {
    let time = TimeSpec::new(unix_time_ns / 1_000_000_000, unix_time_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time)
        .context(|| format!("set the clock to {unix_time_ns} ns"))
}
