//! The file system device (virtio 1.2 §5.11): a directory of the host, shared with the guest over FUSE.
//!
//! # Order with the jail
//!
//! 1. [`Fs::new`] while `/proc` can still be seen: the server keeps `/proc/self/fd`, through which it opens
//!    what it has only looked up, and `/proc/self/mountinfo`. For [`ShareRoot::Pivoted`] the former is
//!    replaced by a detached copy of that one directory, so that no descriptor leads back to the old root.
//! 2. The jail: pivot into the share, drop privileges. The process keeps, in its user namespace,
//!    `CAP_SETUID` and `CAP_SETGID` (to create files as the guest's users) and `CAP_CHOWN`, `CAP_DAC_OVERRIDE`,
//!    `CAP_FOWNER`, `CAP_FSETID`, `CAP_MKNOD` (to serve as root does), permitted and effective.
//! 3. [`Fs::open_root`] opens the root. Nothing that was opened before the pivot is a way out of it.
//! 4. Activation, by the guest. The worker's thread takes the file system IDs of root for itself.
//!
//! Mounts that the host makes below the root later appear, if the root's mount is a slave of the host's.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handler;
mod identity;
mod ledger;
mod requests;
mod share;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuse_backend_rs::api::server::Server;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::handler::Requests;
use self::share::Share;
use super::service::{self, Service};
use super::{Activation, DeviceError, VirtioDevice};
use crate::threads::Kind;

const DEVICE: &str = "virtio-fs";
/// The priority queue, then one request queue (§5.11.2). A request has up to 256 pages and some headers.
const QUEUE_SIZES: [u16; 2] = [64, 1024];
/// The tag's bytes in the configuration space (§5.11.4).
const TAG: usize = 36;

/// Why a share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The guest cannot mount it by this tag.
    #[error("a share's tag must have 1 to 36 printable ASCII characters, and {0:?} has not")]
    Tag(String),
    /// What the server needs of `/proc` is not there.
    #[error("the file server cannot be set up ({what}): {source}")]
    SetUp {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The root cannot be opened.
    #[error("the share's root cannot be opened: {0}; give a directory")]
    Root(io::Error),
}

/// Where a share's root is.
#[derive(Debug)]
pub enum ShareRoot {
    /// The root directory of this process, into which it pivots between [`Fs::new`] and [`Fs::open_root`].
    Pivoted,
    /// This directory, for a process without a jail.
    Directory(OwnedFd),
}

/// The server as the device and its worker hold it.
type ShareServer = Arc<Server<Arc<Share>>>;

/// A file system device.
pub struct Fs {
    config: [u8; TAG + 4],
    share: Arc<Share>,
    open: bool,
    service: Service<ShareServer, Requests>,
}

impl Fs {
    /// A device by this tag (1 to 36 bytes). To be called before the jail; see the module.
    ///
    /// # Errors
    /// [`FsError`] where the tag is not good or `/proc` cannot be used.
    pub fn new(tag: &str, root: ShareRoot) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG || !tag.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let mut config = [0; TAG + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG..].copy_from_slice(&1u32.to_le_bytes()); // num_request_queues
        let share = Arc::new(Share::new(root)?);
        let server = Arc::new(Server::new(Arc::clone(&share)));
        Ok(Self {
            config,
            share,
            open: false,
            service: Service::new(Kind::Fs, DEVICE, server),
        })
    }

    /// Opens the share's root. To be called once, in the jail and before the guest runs. It clears the
    /// process's file mode creation mask: modes are the guest's to choose.
    ///
    /// # Errors
    /// [`FsError::Root`] where it is not a directory that can be opened.
    pub fn open_root(&mut self) -> Result<(), FsError> {
        self.share.open_root()?;
        self.open = true;
        Ok(())
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &'static str {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        if !self.open {
            return Err(DeviceError::host(DEVICE)(io::Error::other(
                "its root was not opened",
            )));
        }
        let [priority, requests] = service::rings(DEVICE, &mut activation)?;
        self.service.start(activation.failure, |server| {
            Requests::new(server, activation.memory, [priority, requests])
        })
    }

    fn reset(&mut self) {
        self.service.stop();
    }

    fn pause(&mut self) {
        self.service.pause();
    }

    fn resume(&mut self) {
        self.service.resume();
    }
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
