//! The network device (virtio 1.2 §5.1) on a tap, with one pair of queues and no control queue.
//!
//! The header in front of each frame (`struct virtio_net_hdr`) is the tap's own: with `IFF_VNET_HDR` the
//! kernel takes and gives it as it is, so checksums and segmentation are left to the other side.
//!
//! The frames are carried by the device's own worker ([`handler`]), or by the host's kernel where the device was given
//! `/dev/vhost-net` ([`delegate`]). The driver sees no difference.

mod delegate;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handler;
mod tap;
mod vhost;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use caisson_vmm_protocol::RateLimit;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::delegate::{Delegate, Lines, Plug};
use self::handler::Frames;
use self::tap::Tap;
use self::vhost::Vhost;
use super::service::{self, Service};
use super::{Activation, DeviceError, Interrupt, VirtioDevice};
use crate::threads::Kind;

const DEVICE: &str = "virtio-net";
/// Receive, then transmit (§5.1.2).
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The descriptor is not a tap with `IFF_VNET_HDR`.
    #[error(
        "the network device's descriptor is not a tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR: open /dev/net/tun with these"
    )]
    NotATap,
    /// The tap refuses a setting.
    #[error("the tap cannot be set up ({what}): {source}")]
    Tap {
        /// What was asked of it.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The other descriptor is not vhost-net.
    #[error("the network device cannot be served by the host's kernel: vhost-net: {0}")]
    Vhost(String),
    /// The MTU cannot be told to the guest.
    #[error("an MTU is 68 to 65535 bytes, and {0} is not")]
    Mtu(u16),
    /// The MAC address is not one of a single host.
    #[error("a MAC address must be that of one host, and one with an odd first byte is a group's")]
    GroupAddress,
}

/// Where the state of the link is in the configuration space, in bytes.
const LINK: usize = 6;

/// A network device.
pub struct Net {
    config: [u8; 12],
    limit: RateLimit,
    service: By,
}

/// Who carries the frames.
enum By {
    Worker(Service<Tap, Frames>),
    Kernel(Service<Plug, Delegate>),
}

impl Net {
    /// A device on an attached tap, with this MAC address and an MTU of 68 to 65535 bytes for the guest.
    ///
    /// # Errors
    /// [`NetError`] where the descriptor is not such a tap, or the address or MTU is not good.
    pub fn new(tap: OwnedFd, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        check(mac, mtu)?;
        let service = Service::new(Kind::Net, DEVICE, Tap::new(tap)?);
        Ok(Self::with(By::Worker(service), mac, mtu))
    }

    /// The same, whose frames the host's kernel carries by this descriptor of `/dev/vhost-net`. It keeps to no limit.
    ///
    /// # Errors
    /// As of [`Net::new`], and where the descriptor is another.
    pub fn by_kernel(
        tap: OwnedFd,
        vhost: OwnedFd,
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<Self, NetError> {
        check(mac, mtu)?;
        let plug = Plug {
            tap: Tap::new(tap)?,
            vhost: Vhost::new(vhost)?,
        };
        let service = Service::new(Kind::Net, DEVICE, plug);
        Ok(Self::with(By::Kernel(service), mac, mtu))
    }

    /// A device of a template, on a socket that carries nothing: its clones have a tap in this place.
    ///
    /// # Errors
    /// [`NetError`] where the address or MTU is not good.
    pub fn unplugged(socket: OwnedFd, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        check(mac, mtu)?;
        let tap = Tap::from_socket(socket, false).map_err(|source| NetError::Tap {
            what: "non-blocking mode",
            source,
        })?;
        let service = Service::new(Kind::Net, DEVICE, tap);
        Ok(Self::with(By::Worker(service), mac, mtu))
    }

    fn with(service: By, mac: [u8; 6], mtu: u16) -> Self {
        Self {
            config: config(mac, mtu),
            limit: RateLimit::default(),
            service,
        }
    }

    /// The same device, which does no more than this in each direction.
    #[must_use]
    pub fn limited(self, limit: RateLimit) -> Self {
        Self { limit, ..self }
    }
}

/// Whether a device can have these.
/// `struct virtio_net_config` (virtio 1.2 §5.1.4) of a device whose link is up.
fn config(mac: [u8; 6], mtu: u16) -> [u8; 12] {
    let mut space = [0; 12];
    space[..6].copy_from_slice(&mac);
    space[LINK..][..2].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    space[8..10].copy_from_slice(&1u16.to_le_bytes()); // max_virtqueue_pairs
    space[10..].copy_from_slice(&mtu.to_le_bytes());
    space
}

/// Tells the driver that there is no cable any more.
fn unplug(interrupt: &dyn Interrupt) -> Result<(), DeviceError> {
    interrupt
        .config(LINK as u64, &[0; 2])
        .map_err(DeviceError::host(DEVICE))
}

fn check(mac: [u8; 6], mtu: u16) -> Result<(), NetError> {
    if mtu < 68 {
        return Err(NetError::Mtu(mtu));
    }
    if mac[0] & 1 != 0 {
        return Err(NetError::GroupAddress);
    }
    Ok(())
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        DEVICE
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
        ]
        .iter()
        .fold(0, |all, bit| all | 1 << bit)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        let failure = Arc::clone(&activation.failure);
        let mut offload = Ok(());
        match &mut self.service {
            By::Worker(service) => {
                let mut activation = activation;
                let [mut receive, mut transmit] = service::rings(DEVICE, &mut activation)?;
                receive.limit(self.limit);
                transmit.limit(self.limit);
                let (memory, interrupt) = (activation.memory, activation.interrupt);
                service.start(failure, |tap| {
                    offload = tap.set_offload(features);
                    Frames::new(tap, memory, interrupt, (receive, transmit), features)
                })?;
            }
            By::Kernel(service) => {
                let lines = Lines::new(activation.interrupt.as_ref())?;
                service.start(failure, |plug| {
                    offload = plug.tap.set_offload(features);
                    Delegate::new(plug, activation, lines)
                })?;
            }
        }
        offload.map_err(|source| {
            self.reset();
            DeviceError::host(DEVICE)(source)
        })
    }

    fn reset(&mut self) {
        match &mut self.service {
            By::Worker(service) => service.stop(),
            By::Kernel(service) => service.stop(),
        }
    }

    fn pause(&mut self) {
        match &mut self.service {
            By::Worker(service) => service.pause(),
            By::Kernel(service) => service.pause(),
        }
    }

    fn resume(&mut self) {
        match &mut self.service {
            By::Worker(service) => service.resume(),
            By::Kernel(service) => service.resume(),
        }
    }
}

/// What the thread of a network device asks of vhost-net.
#[cfg(test)]
pub(crate) use vhost::REQUESTS as VHOST_REQUESTS;

#[cfg(test)]
mod delegate_tests;
#[cfg(test)]
mod tests;
