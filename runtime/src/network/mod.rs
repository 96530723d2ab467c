//! A pod's network: CNI plugins give its network namespace an interface, and a tap beside it carries the
//! frames to the guest.

mod cni;
mod netns;
mod tap;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use cni::{Cni, CniConfig, PortMapping};

use crate::sandbox::ids::UserIds;

/// A pod's network as the sandbox needs it.
#[derive(Clone, Debug)]
pub struct PodNetwork {
    /// The network namespace's path.
    pub netns: PathBuf,
    /// The tap that carries the interface's frames; `None` for a pod on the host and one that is found again.
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

/// Makes and unmakes the networks of pods. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Network {
    cni: Cni,
    netns_dir: PathBuf,
}

impl Network {
    /// A network that follows this configuration; network namespaces are bound in `netns_dir`.
    pub fn new(config: CniConfig, netns_dir: PathBuf) -> Self {
        Self {
            cni: Cni::new(config),
            netns_dir,
        }
    }

    /// Whether a pod could get a network now (CRI `NetworkReady`).
    ///
    /// # Errors
    /// [`NetworkError::NotConfigured`] with the reason.
    pub fn ready(&self) -> Result<(), NetworkError> {
        self.cni.load().map(drop)
    }

    /// The path of a pod's network namespace.
    pub fn netns_path(&self, id: &str) -> PathBuf {
        self.netns_dir.join(format!("caisson-{id}"))
    }

    /// Makes the pod's network namespace, lets the CNI plugins fill it, and puts a tap beside their interface if a guest
    /// is to have it. What was made is unmade again if a step fails. With `ids` the network namespace belongs to a user
    /// namespace that has them.
    ///
    /// # Errors
    /// [`NetworkError`]: the step or plugin that failed and why.
    pub async fn setup(
        &self,
        pod: &PodIdentity,
        guest: bool,
        ids: Option<UserIds>,
    ) -> Result<PodNetwork, NetworkError> {
        let netns = self.netns_path(&pod.id);
        let made = self.try_setup(pod, &netns, guest, ids).await;
        if made.is_err()
            && let Err(error) = self.teardown(pod).await
        {
            tracing::warn!(pod = pod.id, %error, "the half-made network could not be unmade");
        }
        made
    }

    async fn try_setup(
        &self,
        pod: &PodIdentity,
        netns: &Path,
        guest: bool,
        ids: Option<UserIds>,
    ) -> Result<PodNetwork, NetworkError> {
        netns::create(&pod.id, netns.to_owned(), ids).await?;
        self.cni.add(pod, netns).await?;
        let (path, name) = (netns.to_owned(), cni::INTERFACE.to_owned());
        let (interface, routes, tap) = tap::attach(&pod.id, path, name, guest).await?;
        Ok(PodNetwork {
            netns: netns.to_owned(),
            tap: tap.map(Arc::new),
            interface,
            routes,
        })
    }

    /// Lets the CNI plugins release what they gave the pod and removes its network namespace. Idempotent.
    ///
    /// # Errors
    /// [`NetworkError`]; the namespace is removed even when a plugin fails.
    pub async fn teardown(&self, pod: &PodIdentity) -> Result<(), NetworkError> {
        let netns = self.netns_path(&pod.id);
        let released = self.cni.del(pod, &netns).await;
        netns::remove(&pod.id, netns).await?;
        released
    }
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
