//! The `microvm` kind of sandbox: a `caisson-vmm` process with a guest, and an agent in it.
//!
//! What a pod has on the host, all of it found again by a daemon that comes later ([`MicroVm::recover`]):
//!
//! * `<state>/pods/<short id>/`: control and vsock sockets, console log, exit file, process ID, share ([`PodDir`]);
//! * `<data>/pods/<short id>/scratch.img`: the disk of its writable layers;
//! * a cgroup with the pod process ([`cgroup`]).

mod namespace;
mod restore;
mod share;
mod start;
mod template;
mod tree;
pub mod vhost;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use caisson_proto::agent as proto;

use super::agent::Address;
use super::ids::{IdRange, UserIds};
use super::pod::dir::PodDir;
use super::pod::{PodConfig, PodProcess};
use super::{Sandbox, SandboxError, SharedVolume, VolumeOptions};
use caisson_vmm_protocol::RateLimit;

use crate::config::VhostNet;
use crate::timings::Timings;
pub use restore::{Saved, layer_name, stay};
use share::Share;
pub use template::{Shape, Template, Templates};
use tree::Tree;

/// The serial of the disk of image layers.
const LAYERS_SERIAL: &str = "caisson-layers";
/// MiB that the pod process needs beside its guest's memory.
pub const PROCESS_MIB: u64 = 32;

/// Tries whether the IDs of a volume in `path` can be mapped. Blocks.
///
/// # Errors
/// Why they cannot.
pub fn try_ids(path: &Path) -> io::Result<()> {
    let some = IdRange {
        first: 1000,
        length: 1000,
    };
    let options = VolumeOptions {
        ids: Some(UserIds {
            uids: some,
            gids: some,
        }),
        ..VolumeOptions::default()
    };
    Tree::of_volume(path, options).map(drop)
}

/// How microVM pods are made on this node.
#[derive(Clone, Debug)]
pub struct MicroVmConfig {
    /// What all kinds have in common.
    pub pod: PodConfig,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs, with the agent.
    pub initramfs: PathBuf,
    /// Added to the kernel's command line.
    pub cmdline_extra: String,
    /// How long a guest may take from power-on until its agent answers.
    pub start_timeout: Duration,
    /// The most that each disk does.
    pub disk_rate: RateLimit,
    /// The most that the network device does in each direction.
    pub net_rate: RateLimit,
    /// Whether the node's kernel carries frames.
    pub vhost_net: VhostNet,
    /// Machines of which pods are clones; `None`: every pod boots its kernel.
    pub templates: Option<Arc<Templates>>,
}

/// A pod in its microVM.
pub struct MicroVm {
    pod: PodProcess,
    share: Share,
    timings: Timings,
}

impl MicroVm {
    /// Finds a pod again after the daemon was restarted. A pod that has ended meanwhile is found too; its
    /// [`Sandbox::ended`] says why it ended.
    ///
    /// # Errors
    /// [`SandboxError::Start`] where the configured directories cannot hold a pod.
    pub async fn recover(id: &str, config: &MicroVmConfig) -> Result<Self, SandboxError> {
        let dir = PodDir::new(id, &config.pod)?;
        Ok(Self::with(id, dir, Timings::begin()).await)
    }

    /// The pod whose process runs, or ran, in this directory.
    async fn with(id: &str, dir: PodDir, timings: Timings) -> Self {
        let address = Address::Guest { vsock: dir.vsock() };
        Self {
            share: Share::new(id, &dir),
            pod: PodProcess::watch(id, dir, address).await,
            timings,
        }
    }
}

#[tonic::async_trait]
impl Sandbox for MicroVm {
    fn pod(&self) -> &PodProcess {
        &self.pod
    }

    async fn share_layer(&self, layer: &Path) -> Result<proto::Layer, SandboxError> {
        let error = |cause: String| SandboxError::Share {
            id: self.pod.id.clone(),
            path: layer.to_owned(),
            cause,
        };
        let name = layer_name(layer).map_err(|cause| error(cause.to_string()))?;
        let file = tokio::fs::File::open(layer)
            .await
            .map_err(|cause| error(cause.to_string()))?;
        let place = self
            .pod
            .control
            .add_layer(&name, file.into_std().await.into());
        let (offset, bytes) = place.await.map_err(|cause| error(cause.to_string()))?;
        Ok(proto::Layer {
            source: Some(proto::layer::Source::Disk(proto::DiskRange {
                serial: LAYERS_SERIAL.into(),
                offset,
                bytes,
            })),
        })
    }

    async fn share_volume(
        &self,
        container_id: &str,
        host_path: &Path,
        options: VolumeOptions,
    ) -> Result<SharedVolume, SandboxError> {
        self.share.volume(container_id, host_path, options).await
    }

    async fn forget(&self, container_id: &str) -> Result<(), SandboxError> {
        self.pod.remove_log(container_id).await?;
        self.share.unshare(container_id).await
    }

    async fn stop(&self, grace: Duration) -> Result<(), SandboxError> {
        self.pod.stop(grace).await
    }

    async fn remove(&self) -> Result<(), SandboxError> {
        self.pod.end().await?;
        self.share.remove_all().await?;
        self.pod.remove().await
    }

    fn timings(&self) -> Timings {
        self.timings.clone()
    }
}
