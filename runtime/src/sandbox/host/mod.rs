//! The `host` kind of sandbox: the agent as a process on the host, for pods that by nature cannot be in a VM.
//!
//! What a pod has on the host, all of it found again by a daemon that comes later ([`Host::recover`]):
//!
//! * `<state>/pods/<short id>/`: control socket, the agent's sockets and log, exit file, process ID ([`PodDir`]);
//! * `<data>/pods/<short id>/scratch.img`: the disk of its writable layers, which the agent mounts for itself;
//! * a cgroup with the pod process, the agent and the containers ([`cgroup`]).
//!
//! Mounts and namespaces are the agent's own, and go with it.

pub mod apparmor;
mod start;

use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_proto::agent as proto;

use super::agent::Address;
use super::pod::dir::PodDir;
use super::pod::{PodConfig, PodProcess, cgroup};
use super::{Sandbox, SandboxError, SharedVolume, VolumeOptions};
use crate::timings::Timings;

/// Where a path of the host is for the agent: it takes it from the host's mounts when a container gets it.
pub const HOST_PATH: &str = "/run/caisson/host";
/// Where the agent sees the image layers.
const LAYERS_PATH: &str = "/run/caisson/images";

/// How pods on the host are made.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// What all kinds have in common.
    pub pod: PodConfig,
    /// The `caisson-agent` binary, statically linked.
    pub agent: PathBuf,
    /// The directory of image layers.
    pub layers: PathBuf,
}

/// A pod on the host.
pub struct Host {
    pod: PodProcess,
    layers: PathBuf,
    timings: Timings,
}

impl Host {
    /// Finds a pod again after the daemon was restarted; see [`super::microvm::MicroVm::recover`].
    ///
    /// # Errors
    /// [`SandboxError::Start`] where the configured directories cannot hold a pod.
    pub async fn recover(id: &str, config: &HostConfig) -> Result<Self, SandboxError> {
        let dir = PodDir::new(id, &config.pod)?;
        Ok(Self::with(id, dir, config, Timings::begin()).await)
    }

    /// The pod whose process runs, or ran, in this directory.
    async fn with(id: &str, dir: PodDir, config: &HostConfig, timings: Timings) -> Self {
        let address = Address::Host {
            agent: dir.agent_socket(),
            streams: dir.agent_streams(),
        };
        let pod = PodProcess::watch(id, dir, address).await;
        let (mut ended, dir, id) = (pod.ended(), pod.dir.clone(), id.to_owned());
        // The pod process does that, too; it may have been killed itself.
        tokio::spawn(async move {
            if ended.wait_for(Option::is_some).await.is_ok()
                && let Err(error) = cgroup::kill(&dir)
            {
                tracing::error!(pod = id, %error, "what is left of the pod could not be killed");
            }
        });
        Self {
            pod,
            layers: config.layers.clone(),
            timings,
        }
    }

    fn share_error(&self, path: &Path, cause: &str) -> SandboxError {
        SandboxError::Share {
            id: self.pod.id.clone(),
            path: path.to_owned(),
            cause: cause.to_owned(),
        }
    }
}

#[tonic::async_trait]
impl Sandbox for Host {
    fn pod(&self) -> &PodProcess {
        &self.pod
    }

    /// The agent sees the directory of all layers, read-only.
    async fn share_layer(&self, layer: &Path) -> Result<proto::Layer, SandboxError> {
        match (layer.parent(), layer.file_name().and_then(|n| n.to_str())) {
            (Some(parent), Some(name)) if parent == self.layers => {
                let path = format!("{LAYERS_PATH}/{name}");
                Ok(proto::Layer {
                    source: Some(proto::layer::Source::Path(path)),
                })
            }
            _ => Err(self.share_error(layer, "it is not in the directory of layers")),
        }
    }

    /// A name for the path. Read-only is the mount in the container, which alone holds against it.
    async fn share_volume(
        &self,
        _container_id: &str,
        host_path: &Path,
        options: VolumeOptions,
    ) -> Result<SharedVolume, SandboxError> {
        match host_path.to_str() {
            Some(path) if path.starts_with('/') => Ok(SharedVolume {
                path: format!("{HOST_PATH}{path}"),
                partly_writable: false,
                ids: options.ids,
            }),
            _ => Err(self.share_error(host_path, "it is not an absolute path in UTF-8")),
        }
    }

    async fn forget(&self, container_id: &str) -> Result<(), SandboxError> {
        self.pod.remove_log(container_id).await
    }

    async fn stop(&self, grace: Duration) -> Result<(), SandboxError> {
        self.pod.stop(grace).await?;
        cgroup::kill(&self.pod.dir).map_err(|e| self.pod.error("end its containers", e))
    }

    async fn remove(&self) -> Result<(), SandboxError> {
        self.pod.end().await?;
        self.pod.remove().await
    }

    fn timings(&self) -> Timings {
        self.timings.clone()
    }
}
