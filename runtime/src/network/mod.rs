//! A pod's network: CNI plugins give its network namespace an interface, and a tap beside it carries the
//! frames to the guest.

mod cni;
#[cfg(any(test, fuzzing))]
pub(crate) use cni::fuzz_list;
mod netns;
mod tap;

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, Shared};
use tokio::sync::{Mutex, RwLock};

use cni::Seen;
pub use cni::{Cni, CniConfig, PortMapping};

use crate::sandbox::ids::UserIds;
use crate::steps::{self, Step};

/// How long a plugin's word on its own readiness holds.
const RECENT: Duration = Duration::from_secs(2);

/// What of a pod's network is there before CNI plugins are asked: a sandbox can be started with it.
#[derive(Clone, Debug)]
pub struct Port {
    /// The network namespace's path.
    pub netns: PathBuf,
    /// The tap that will carry the interface's frames; `None` for a pod on the host.
    pub tap: Option<Arc<OwnedFd>>,
}

/// A pod's network that is being made while its sandbox starts; `None`: it has none. Each copy yields what came of it.
pub type Coming = Shared<BoxFuture<'static, Result<Option<PodNetwork>, NetworkError>>>;

/// A pod's network as the sandbox needs it.
#[derive(Clone, Debug)]
pub struct PodNetwork {
    /// The network namespace's path.
    pub netns: PathBuf,
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
#[derive(Clone, Debug, thiserror::Error)]
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
    /// A CNI plugin failed in what is about no pod.
    #[error("CNI plugin {plugin} failed on {command}: {cause}")]
    Network {
        /// The plugin's type.
        plugin: String,
        /// STATUS or GC.
        command: &'static str,
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
    /// Many may add, check and delete; who collects garbage is alone (CNI 1.1.0, section 2).
    attachments: Arc<RwLock<()>>,
    /// What the plugins of a network said last of their readiness, and when.
    status: Arc<Mutex<Option<Status>>>,
}

#[derive(Debug)]
struct Status {
    at: Instant,
    of: Seen,
    said: Result<(), NetworkError>,
}

/// A pod as garbage collection sees it.
#[derive(Clone, Debug)]
pub struct Known {
    /// The sandbox's ID.
    pub id: String,
    /// Whether it has a network by its record.
    pub attached: bool,
}

impl Network {
    /// A network that follows this configuration; network namespaces are bound in `netns_dir`.
    pub fn new(config: CniConfig, netns_dir: PathBuf) -> Self {
        Self {
            cni: Cni::new(config),
            netns_dir,
            attachments: Arc::default(),
            status: Arc::default(),
        }
    }

    /// Whether a pod could get a network now (CRI `NetworkReady`): there is a configuration, and its plugins, where they can
    /// be asked, say so.
    ///
    /// # Errors
    /// [`NetworkError::NotConfigured`] or [`NetworkError::Network`] with the reason.
    pub async fn ready(&self) -> Result<(), NetworkError> {
        // One at a time: however many ask, a plugin that hangs is there once.
        let mut last = self.status.lock().await;
        if let Some(status) = last.as_ref()
            && status.at.elapsed() < RECENT
            && status.of.still()
        {
            return status.said.clone();
        }
        let (list, seen) = self.cni.load_seen()?;
        let said = self.cni.status(&list).await;
        *last = Some(Status {
            at: Instant::now(),
            of: seen,
            said: said.clone(),
        });
        said
    }

    /// The path of a pod's network namespace.
    pub fn netns_path(&self, id: &str) -> PathBuf {
        self.netns_dir.join(format!("caisson-{id}"))
    }

    /// Makes the pod's network namespace, and a tap in it if a guest is to have it. With `ids` the network namespace belongs to a
    /// user namespace that has them. What was made is unmade by [`Network::teardown`], also after a failure.
    ///
    /// # Errors
    /// [`NetworkError::NotConfigured`] before anything is made; [`NetworkError::Host`].
    pub async fn prepare(
        &self,
        pod: &PodIdentity,
        guest: bool,
        ids: Option<UserIds>,
    ) -> Result<Port, NetworkError> {
        self.cni.load()?;
        let netns = self.netns_path(&pod.id);
        netns::create(&pod.id, netns.clone(), ids).await?;
        steps::done(Step::NamespaceMade);
        let tap = match guest {
            true => Some(Arc::new(tap::open(&pod.id, netns.clone()).await?)),
            false => None,
        };
        Ok(Port { netns, tap })
    }

    /// Lets the CNI plugins fill the network namespace, and joins their interface to the tap. What was made is unmade by
    /// [`Network::teardown`], also after a failure.
    ///
    /// # Errors
    /// [`NetworkError`]: the step or plugin that failed and why.
    pub async fn connect(
        &self,
        pod: &PodIdentity,
        port: &Port,
    ) -> Result<PodNetwork, NetworkError> {
        let _together = self.attachments.read().await;
        let netns = &port.netns;
        self.cni.add(pod, netns).await?;
        steps::done(Step::AttachmentMade);
        let (path, name) = (netns.clone(), cni::INTERFACE.to_owned());
        let (interface, routes) = tap::attach(&pod.id, path, name, port.tap.is_some()).await?;
        if port.tap.is_some() {
            steps::done(Step::TapJoined);
        }
        Ok(PodNetwork {
            netns: netns.clone(),
            interface,
            routes,
        })
    }

    /// Lets the CNI plugins release what they gave the pod and removes its network namespace. Idempotent.
    ///
    /// # Errors
    /// [`NetworkError`]; the namespace is removed even when a plugin fails.
    pub async fn teardown(&self, pod: &PodIdentity) -> Result<(), NetworkError> {
        let _together = self.attachments.read().await;
        self.release(pod).await
    }

    /// Asks the CNI plugins whether a pod's network is as they made it (CHECK).
    ///
    /// # Errors
    /// What the first plugin says that finds it otherwise.
    pub async fn check(&self, pod: &PodIdentity) -> Result<(), NetworkError> {
        let _together = self.attachments.read().await;
        self.cni.check(pod, &self.netns_path(&pod.id)).await
    }

    /// Releases what is held for pods that nobody knows any more: DEL for each that is kept as attached, then GC with the
    /// attachments that are still valid. `pods` is asked when no network is being made or unmade.
    ///
    /// # Errors
    /// The first failure, after all was tried.
    pub async fn collect(&self, pods: impl FnOnce() -> Vec<Known>) -> Result<(), NetworkError> {
        let _alone = self.attachments.write().await;
        let pods = pods();
        let known = pods.iter().map(|pod| pod.id.clone()).collect();
        let mut failed = None;
        for stranger in self.cni.stale(&known) {
            tracing::info!(
                pod = stranger.id,
                "releasing the network of a pod that is gone"
            );
            if let Err(error) = self.release(&stranger).await {
                failed.get_or_insert(error);
            }
        }
        let attached: HashSet<_> = pods
            .into_iter()
            .filter(|pod| pod.attached || self.cni.has(&pod.id))
            .map(|pod| pod.id)
            .collect();
        match self.cni.gc(&attached).await {
            // Without a network there is nobody to ask.
            Ok(()) | Err(NetworkError::NotConfigured(_)) => {}
            Err(error) => {
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn release(&self, pod: &PodIdentity) -> Result<(), NetworkError> {
        let netns = self.netns_path(&pod.id);
        let released = self.cni.del(pod, &netns).await;
        netns::remove(&pod.id, netns).await?;
        steps::done(Step::NamespaceRemoved);
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
