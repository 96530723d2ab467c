//! `/dev/vhost-net`: the host's kernel carries frames between a tap and a guest's rings, on a thread of its own
//! (linux/vhost.h).
//!
//! The device belongs to the first process that owns it, whose memory the kernel's thread sees; that thread is in the
//! cgroup of whoever asked. The descriptor was opened by the daemon: in the jail there is no such file. Hence not by the crate
//! `vhost`, which opens the device itself, has no way to take a ring's events back, and looks at a ring's end alone.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::NetError;

/// Requests of `ioctl(2)`.
const GET_FEATURES: u64 = 0x8008_af00;
const SET_FEATURES: u64 = 0x4008_af00;
const SET_OWNER: u64 = 0xaf01;
const SET_MEM_TABLE: u64 = 0x4008_af03;
const SET_VRING_NUM: u64 = 0x4008_af10;
const SET_VRING_ADDR: u64 = 0x4028_af11;
const SET_VRING_BASE: u64 = 0x4008_af12;
const SET_VRING_KICK: u64 = 0x4008_af20;
const SET_VRING_CALL: u64 = 0x4008_af21;
const SET_VRING_ERR: u64 = 0x4008_af22;
const SET_BACKEND: u64 = 0x4008_af30;

/// What is asked of the device while a guest runs, which the filter of the device's thread must allow.
#[cfg(test)]
pub const REQUESTS: [u64; 10] = [
    SET_FEATURES,
    SET_OWNER,
    SET_MEM_TABLE,
    SET_VRING_NUM,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_KICK,
    SET_VRING_CALL,
    SET_VRING_ERR,
    SET_BACKEND,
];

/// No descriptor.
const NONE: RawFd = -1;

/// The features of the rings, which are the kernel's business. The others are the tap's.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A refusal.
#[derive(Debug, thiserror::Error)]
#[error("vhost-net refused to {what}: {source}")]
pub struct Refused {
    what: &'static str,
    source: io::Error,
}

/// The events of one ring.
pub struct Events<'a> {
    /// Signalled by the driver when there are buffers.
    pub kick: &'a EventFd,
    /// Signalled by the kernel when it has used some.
    pub call: &'a EventFd,
    /// Signalled by the kernel when it cannot go on with what the driver put there.
    pub broken: &'a EventFd,
}

/// The device.
pub struct Vhost {
    file: File,
    owned: bool,
}

impl Vhost {
    /// Takes a descriptor that was opened for reading and writing.
    ///
    /// # Errors
    /// [`NetError::Vhost`] where it is none, or of a kernel that lacks a feature of the rings.
    pub fn new(fd: OwnedFd) -> Result<Self, NetError> {
        let mut features = 0u64;
        // SAFETY: the request writes 8 bytes, and the pointer is to as many.
        let got = unsafe { libc::ioctl(fd.as_raw_fd(), GET_FEATURES as _, &raw mut features) };
        if got < 0 {
            return Err(NetError::Vhost(io::Error::last_os_error().to_string()));
        }
        let missing = RING_FEATURES & !features;
        if missing != 0 {
            return Err(NetError::Vhost(format!(
                "it lacks the features {missing:#x}"
            )));
        }
        Ok(Self {
            file: fd.into(),
            owned: false,
        })
    }

    /// Tells the device of the memory and of the features that the driver took. The first time, the device becomes this
    /// process's.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn set_up(&mut self, features: u64, memory: &GuestMemoryMmap) -> Result<(), Refused> {
        if !self.owned {
            self.ask("become this process's", SET_OWNER, &[])?;
            self.owned = true;
        }
        self.ask(
            "take the features",
            SET_FEATURES,
            &[features & RING_FEATURES],
        )?;
        // struct vhost_memory: the number of regions, then address in the guest, size, address here and padding of each.
        let mut table = vec![memory.num_regions() as u64];
        for region in memory.iter() {
            let start = region.start_addr().raw_value();
            table.extend([start, region.len(), region.as_ptr() as u64, 0]);
        }
        self.ask("take the guest's memory", SET_MEM_TABLE, &table)
    }

    /// Tells the device where a ring is and how to speak of it; `None` where the ring is not in guest memory. It must not
    /// be attached.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn set_ring(
        &self,
        index: usize,
        queue: &Queue,
        memory: &GuestMemoryMmap,
        events: &Events<'_>,
    ) -> Result<Option<()>, Refused> {
        let size = usize::from(queue.size());
        // With the event index behind the entries (virtio 1.2 §2.7).
        let Some([descriptors, available, used]) = [
            (queue.desc_table(), 16 * size),
            (queue.avail_ring(), 6 + 2 * size),
            (queue.used_ring(), 6 + 8 * size),
        ]
        .map(|(address, length)| place(memory, address, length))
        .into_iter()
        .collect::<Option<Vec<_>>>()
        .and_then(|places| <[u64; 3]>::try_from(places).ok()) else {
            return Ok(None);
        };
        let ring = index as u64;
        let value = |value: u32| [ring | u64::from(value) << 32];
        let next = u32::from(queue.next_avail());
        self.ask(
            "take a ring's size",
            SET_VRING_NUM,
            &value(queue.size().into()),
        )?;
        // struct vhost_vring_addr: index and flags, the three parts, a log that there is not.
        let parts = [ring, descriptors, used, available, 0];
        self.ask("take a ring's place", SET_VRING_ADDR, &parts)?;
        self.ask("take a ring's index", SET_VRING_BASE, &value(next))?;
        for (request, event) in [
            (SET_VRING_CALL, events.call),
            (SET_VRING_ERR, events.broken),
            (SET_VRING_KICK, events.kick),
        ] {
            let fd = value(event.as_raw_fd() as u32);
            self.ask("take a ring's event", request, &fd)?;
        }
        Ok(Some(()))
    }

    /// Lets the kernel serve a ring with this tap; `None`: with none. It has let go of the ring when the call returns.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn attach(&self, index: usize, tap: Option<RawFd>) -> Result<(), Refused> {
        let fd = tap.unwrap_or(NONE) as u32;
        let what = match tap {
            Some(_) => "serve a ring",
            None => "let a ring go",
        };
        self.ask(what, SET_BACKEND, &[index as u64 | u64::from(fd) << 32])
    }

    /// Has the kernel let go of a ring and of its events.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn release(&self, index: usize) -> Result<(), Refused> {
        self.attach(index, None)?;
        for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
            let none = [index as u64 | u64::from(NONE as u32) << 32];
            self.ask("let a ring's event go", request, &none)?;
        }
        Ok(())
    }

    /// Makes a request whose argument is so many words: on x86-64 the structures of linux/vhost.h are made of such, and of
    /// pairs of 32 bits with the first one low.
    fn ask(&self, what: &'static str, request: u64, argument: &[u64]) -> Result<(), Refused> {
        let pointer = argument.as_ptr();
        // SAFETY: the kernel reads no more than the structure of the request, which `argument` is for each caller, and keeps
        // no pointer to it. Addresses in it are of guest memory, which is mapped for the life of the process and which the
        // guest may change at any time anyway.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request as _, pointer) };
        if result < 0 {
            let source = io::Error::last_os_error();
            return Err(Refused { what, source });
        }
        Ok(())
    }
}

/// Where a piece of guest memory is in this process, if all of it is there in one piece.
fn place(memory: &GuestMemoryMmap, address: u64, length: usize) -> Option<u64> {
    let slice = memory.get_slice(GuestAddress(address), length).ok()?;
    Some(slice.ptr_guard().as_ptr() as u64)
}
