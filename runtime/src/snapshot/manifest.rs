//! What a snapshot says of itself.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use caisson_proto::cri;
use caisson_vmm_protocol::GrowthConfig;
use serde::{Deserialize, Serialize};

use super::{Dependencies, FileCheck, MOST_LAYERS, SnapshotError};
use crate::config::HandlerKind;
use crate::image::DiffId;
use crate::store::{ContainerRecord, ContainerState, SandboxRecord};

/// The most containers of a pod, as its agent has it.
const MOST_CONTAINERS: usize = 256;
/// The sizes that a machine can have.
const VCPUS: std::ops::RangeInclusive<u8> = 1..=32;
const MEMORY_MIB: std::ops::RangeInclusive<u32> = 64..=1 << 20;

/// A snapshot's manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// See [`Manifest::FORMAT`].
    pub format: u32,
    /// Unix time in nanoseconds.
    pub written_at: i64,
    /// What it needs.
    pub depends: Dependencies,
    /// The machine's size.
    pub machine: Machine,
    /// The image layers in use, by ascending places.
    pub layers: Vec<PlacedLayer>,
    /// The memory's file.
    pub memory: FileCheck,
    /// The state's file.
    pub state: FileCheck,
    /// The disk's file; none: the writable layers are in the guest's memory.
    pub scratch: Option<FileCheck>,
    /// The pod.
    pub pod: SandboxRecord,
    /// Its containers.
    pub containers: Vec<ContainerRecord>,
}

/// A machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// What it had grown from, if it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth: Option<GrowthConfig>,
}

impl Machine {
    fn check(&self) -> Result<(), String> {
        let Self {
            vcpus,
            memory_mib,
            growth,
        } = *self;
        if !VCPUS.contains(&vcpus) || !MEMORY_MIB.contains(&memory_mib) {
            return Err(format!(
                "no machine has {vcpus} vCPUs and {memory_mib} MiB of memory"
            ));
        }
        match growth {
            Some(from) if from.vcpus > vcpus || from.memory_mib > memory_mib => Err(format!(
                "no machine grows from {} vCPUs and {} MiB of memory into less",
                from.vcpus, from.memory_mib
            )),
            _ => Ok(()),
        }
    }
}

/// An image layer where the guest knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacedLayer {
    /// What it is.
    pub diff_id: String,
    /// The first byte of its place on the disk of layers.
    pub offset: u64,
    /// The bytes of its place.
    pub bytes: u64,
}

impl Manifest {
    /// The version of the format.
    pub const FORMAT: u32 = 1;

    /// Reads a manifest and checks all that can be checked by itself. `damaged` says of what it is.
    ///
    /// # Errors
    /// [`SnapshotError::Format`], and what `damaged` makes of a sentence.
    pub fn parse(
        text: &[u8],
        damaged: impl Fn(String) -> SnapshotError,
    ) -> Result<Self, SnapshotError> {
        /// What every format has.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version =
            serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
        if version.format != Self::FORMAT {
            return Err(SnapshotError::Format(version.format));
        }
        let manifest: Self =
            serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        self.machine.check()?;
        if self.layers.len() > MOST_LAYERS || self.containers.len() > MOST_CONTAINERS {
            return Err("it has more layers or containers than a pod can have".into());
        }
        if self.pod.kind != HandlerKind::MicroVm {
            return Err("its pod is none of a microVM".into());
        }
        check_id(&self.pod.id)?;
        let mut ids = BTreeSet::from([&self.pod.id]);
        for container in &self.containers {
            check_id(&container.id)?;
            if !ids.insert(&container.id) || container.sandbox_id != self.pod.id {
                return Err(format!("container {} is none of its pod", container.id));
            }
            check_container(container)?;
        }
        for layer in &self.layers {
            let known: Result<DiffId, _> = layer.diff_id.parse();
            known.map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

fn check_id(id: &str) -> Result<(), String> {
    let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    match id.len() == 64 && id.bytes().all(digit) {
        true => Ok(()),
        false => Err(format!("{id:?} is no ID")),
    }
}

fn check_container(container: &ContainerRecord) -> Result<(), String> {
    let id = &container.id;
    if !is_settled(container.state) {
        return Err(format!("container {id} was in the middle of something"));
    }
    if volume(&container.config.0).is_some() {
        return Err(format!("container {id} has a volume"));
    }
    let log = &container.log_path;
    let mut parts = Path::new(log).components();
    let plain = parts.all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let none = log.as_os_str().is_empty();
    if !none && (log.is_relative() || !plain) {
        return Err(format!("container {id} has a log that is no absolute path"));
    }
    Ok(())
}

/// Whether a container in this state can be written down.
pub fn is_settled(state: ContainerState) -> bool {
    matches!(
        state,
        ContainerState::Created | ContainerState::Running | ContainerState::Exited
    )
}

/// A mount of the host's files that a container has: where the container has it, and what it is.
pub fn volume(config: &cri::ContainerConfig) -> Option<(&str, &str)> {
    let mount = config
        .mounts
        .iter()
        .find(|mount| !mount.host_path.is_empty())?;
    Some((&mount.container_path, &mount.host_path))
}
