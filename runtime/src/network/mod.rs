//! A pod's network: CNI plugins give its network namespace an interface, and a tap beside it carries the
//! frames to the guest.

mod cni;
mod netns;
mod tap;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

pub use cni::{Cni, CniConfig, PortMapping};

/// A pod's network as the sandbox needs it.
#[derive(Clone, Debug)]
pub struct PodNetwork {
    /// The network namespace's path.
    pub netns: PathBuf,
    /// The tap that carries the interface's frames; `None` for a pod that is found again.
    pub tap: Option<Arc<OwnedFd>>,
    /// The interface as the guest shall have it.
    pub interface: Interface,
    /// The routes of the namespace.
    pub routes: Vec<Route>,
}

impl PodNetwork {
    /// The pod's IP addresses, the primary one first (CRI `PodSandboxNetworkStatus`).
    pub fn ips(&self) -> Vec<IpAddr> {
        self.interface
            .addresses
            .iter()
            .map(|(ip, _)| *ip)
            .filter(|ip| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()))
            .collect()
    }
}

/// An interface of the pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Interface {
    /// Its name, such as eth0.
    pub name: String,
    /// Its MAC address, "aa:bb:cc:dd:ee:ff".
    pub mac: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// A route of the pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// The destination and its prefix length; length 0 is a default route.
    pub destination: (IpAddr, u8),
    /// The gateway; `None`: on link.
    pub gateway: Option<IpAddr>,
    /// The metric; 0: the kernel's choice.
    pub priority: u32,
}

/// Why a pod's network could not be made or unmade.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no usable CNI configuration.
    #[error("no CNI network is configured: {0}")]
    NotConfigured(String),
    /// A CNI plugin failed.
    #[error("CNI plugin {plugin} failed on {command} for pod {id}: {cause}")]
    Plugin {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, …
        command: &'static str,
        /// The pod's ID.
        id: String,
        /// What the plugin said.
        cause: String,
    },
    /// A step on the host failed.
    #[error("cannot {step} for pod {id}: {cause}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// The pod's ID.
        id: String,
        /// Why it did not work.
        cause: String,
    },
}

/// What CNI is told of a pod.
#[derive(Clone, Debug, Default)]
pub struct PodIdentity {
    /// The sandbox's ID.
    pub id: String,
    /// The Kubernetes namespace; may be empty.
    pub namespace: String,
    /// The pod's name; may be empty.
    pub name: String,
    /// The pod's UID; may be empty.
    pub uid: String,
    /// Ports to map on the host.
    pub port_mappings: Vec<PortMapping>,
}
