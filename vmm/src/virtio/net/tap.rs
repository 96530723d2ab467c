//! The host's end of the cable: a tap, from which frames are read and to which they are written, each with a
//! virtio header of 12 bytes in front.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::super::buffers::Buffers;
use super::NetError;

/// `struct virtio_net_hdr` with `num_buffers` (virtio 1.2 §5.1.6), in bytes.
pub const HEADER: usize = 12;
/// The longest frame, as the specification counts it where segmentation is left to the other side (§5.1.6.3.1).
pub const MOST: usize = 65562;

/// What became of a read or write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// This many bytes went through.
    Done(usize),
    /// Not now.
    Later,
    /// The frame is lost, as frames may be.
    Lost,
    /// The interface is gone, with its network namespace perhaps, and will not come back.
    Gone,
}

/// A tap's descriptor, non-blocking.
pub struct Tap {
    file: File,
    is_tap: bool,
}

impl Tap {
    /// Checks that the descriptor is a tap with virtio headers, and takes it.
    pub fn new(fd: OwnedFd) -> Result<Self, NetError> {
        const WANTED: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // SAFETY: an all-zero ifreq is a valid value of that plain structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the ioctl writes an ifreq, and the pointer is to one.
        let got = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) };
        if got < 0 {
            return Err(NetError::NotATap);
        }
        // SAFETY: TUNGETIFF fills the flags of the union.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & WANTED != WANTED {
            return Err(NetError::NotATap);
        }
        let header = HEADER as libc::c_int;
        // SAFETY: the ioctl reads an int, and the pointer is to one.
        let set = unsafe {
            libc::ioctl(
                fd.as_raw_fd(),
                libc::TUNSETVNETHDRSZ as _,
                &raw const header,
            )
        };
        if set < 0 {
            return Err(NetError::Tap {
                what: "the header's size",
                source: io::Error::last_os_error(),
            });
        }
        Self::from_socket(fd, true).map_err(|source| NetError::Tap {
            what: "non-blocking mode",
            source,
        })
    }

    /// Takes anything that carries a frame a message: a tap, or a socket in its place.
    pub fn from_socket(fd: OwnedFd, is_tap: bool) -> io::Result<Self> {
        // SAFETY: these calls take numbers only.
        let result = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            file: File::from(fd),
            is_tap,
        })
    }

    /// Lets the kernel hand over frames that the guest said it completes itself (§5.1.3).
    pub fn set_offload(&self, features: u64) -> io::Result<()> {
        let has = |bit: u32| features & 1 << bit != 0;
        let mut offload = 0;
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            offload |= libc::TUN_F_CSUM;
            if has(VIRTIO_NET_F_GUEST_TSO4) {
                offload |= libc::TUN_F_TSO4;
            }
            if has(VIRTIO_NET_F_GUEST_TSO6) {
                offload |= libc::TUN_F_TSO6;
            }
        }
        if !self.is_tap {
            return Ok(());
        }
        // SAFETY: the ioctl takes its argument by value.
        let result = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD as _,
                libc::c_ulong::from(offload),
            )
        };
        if result < 0 {
            let error = io::Error::last_os_error();
            // A tap whose interface is gone says so when it is read.
            if error.raw_os_error() != Some(libc::EBADFD) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// The descriptor, to wait for.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Whether the tap has its interface still. It takes no frame.
    pub fn is_there(&self) -> bool {
        let read = (&self.file).read(&mut []);
        !read.is_err_and(|error| error.raw_os_error() == Some(libc::EBADFD))
    }

    /// Reads one frame with its header.
    pub fn read(&self, into: &mut [u8]) -> Outcome {
        outcome((&self.file).read(into))
    }

    /// Writes one frame with its header.
    pub fn write(&self, frame: &Buffers<'_>) -> Outcome {
        outcome(frame.send(self.file.as_fd()))
    }
}

fn outcome(result: io::Result<usize>) -> Outcome {
    let error = match result {
        // A tap never ends; a socket in its place does.
        Ok(0) => return Outcome::Gone,
        Ok(n) => return Outcome::Done(n),
        Err(error) => error,
    };
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => Outcome::Later,
        // EBADFD: the interface is deleted.
        Some(libc::EBADFD | libc::EBADF | libc::EPIPE | libc::ECONNRESET) => Outcome::Gone,
        // EIO: the interface is down; EINVAL: the guest's header makes no sense; ENOBUFS and the like: no
        // room. A frame that cannot be carried is lost, as on any cable.
        _ => Outcome::Lost,
    }
}
