//! A pod that is made again from a directory (`caisson restore`).
//!
//! It has the IDs, names and logs that it had, and a new network. While it is made its record says so, and those of its containers
//! do: a daemon that comes later takes all of it back, and the snapshot is as it was.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::containers::{exits, log};
use super::super::registry::{Container, Pod};
use super::super::{Context, CriError, spec};
use super::snapshot::blocking;
use super::{dns, identity, namespaces, on_host_network, run, shares_pid, watch};
use crate::image::DiffId;
use crate::sandbox::microvm::{MicroVm, Saved};
use crate::sandbox::{HostNamespaces, Log, Sandbox, SandboxPlan, Scratch};
use crate::snapshot::{Dependencies, Manifest, Snapshot};
use crate::steps::{self, Step};
use crate::store::{ContainerRecord, ContainerState, SandboxRecord, SandboxState};
use crate::timings::Timings;

use caisson_proto::cri;

/// Makes the pod of a snapshot, and returns its ID. If a step fails, everything is taken back.
///
/// # Errors
/// ALREADY_EXISTS where it is there, or its name or a container's is in use; FAILED_PRECONDITION for a directory that is no snapshot
/// which can go on here; NOT_FOUND for an image layer that is not here; INTERNAL with the step that failed.
pub async fn restore(context: &Arc<Context>, dir: PathBuf) -> Result<String, CriError> {
    context.kvm.require().await?;
    let microvm = context.microvm.clone();
    let snapshot = blocking(move || Snapshot::open(&dir, &Dependencies::here(&microvm)?)).await?;
    let layers = layers(context, &snapshot).await?;
    check_unknown(context, &snapshot)?;
    let record = SandboxRecord {
        state: SandboxState::Creating,
        reason: String::new(),
        network: None,
        user: 0,
        ..snapshot.manifest.pod.clone()
    };
    let pod = context.registry.create_pod(record).await?;
    steps::done(Step::RestoreRecorded);
    let _making = pod.lifecycle.write().await;
    match make(context, &pod, snapshot, layers).await {
        Ok(()) => {
            tracing::info!(pod = pod.id, "the pod was restored");
            Ok(pod.id.clone())
        }
        Err(error) => {
            tracing::warn!(pod = pod.id, %error, "the pod could not be restored");
            run::undo(context, &pod, &error.message).await;
            Err(error)
        }
    }
}

/// The same pod is not there twice, and no container either.
fn check_unknown(context: &Context, snapshot: &Snapshot) -> Result<(), CriError> {
    let there = |what: &str, id: &str| {
        let message = format!(
            "{what} {id} is here already, and a snapshot is restored with the IDs it had; remove the {what} first"
        );
        Err(CriError::new(tonic::Code::AlreadyExists, message))
    };
    let pod = &snapshot.manifest.pod.id;
    if context.registry.pod(pod).is_ok() {
        return there("pod", pod);
    }
    let ids = snapshot.manifest.containers.iter().map(|record| &record.id);
    for id in ids {
        if context.registry.container(id).is_ok() {
            return there("container", id);
        }
    }
    Ok(())
}

/// The image layers and their places.
async fn layers(context: &Context, snapshot: &Snapshot) -> Result<Vec<(PathBuf, u64)>, CriError> {
    let Manifest {
        layers, containers, ..
    } = &snapshot.manifest;
    let mut ids: Vec<DiffId> = Vec::with_capacity(layers.len());
    for layer in layers {
        let id = layer.diff_id.parse()?;
        let file = tokio::fs::metadata(context.images.layer_path(&id)).await;
        // Its place has whole sectors.
        if !file.is_ok_and(|file| file.len().next_multiple_of(512) == layer.bytes) {
            let with = containers
                .iter()
                .find(|c| c.layers.contains(&layer.diff_id));
            let image = with.map(|container| container.image_ref.as_str());
            return Err(CriError::new(
                tonic::Code::NotFound,
                format!(
                    "an image of the pod is not on this node; pull or load {} again",
                    image.unwrap_or("it")
                ),
            ));
        }
        ids.push(id);
    }
    let paths = context.images.files_to_use(ids).await?;
    let offsets = layers.iter().map(|layer| layer.offset);
    Ok(paths.into_iter().zip(offsets).collect())
}

async fn make(
    context: &Arc<Context>,
    pod: &Arc<Pod>,
    snapshot: Snapshot,
    layers: Vec<(PathBuf, u64)>,
) -> Result<(), CriError> {
    let timings = Timings::begin();
    let containers = reserve(context, pod, &snapshot).await?;
    let plan = plan(context, pod, &snapshot, &timings).await?;
    let network = run::connect(context, pod, &plan, timings.clone());
    let before = snapshot.manifest.pod.network.as_ref();
    let saved = Saved {
        memory: snapshot.memory,
        state: snapshot.state,
        scratch: snapshot.scratch,
        layers,
        mac: before
            .map(|network| network.mac.clone())
            .unwrap_or_default(),
        growth: snapshot.manifest.machine.growth,
    };
    let turn = context.boots.acquire().await;
    let restored = MicroVm::restore(&plan, &context.microvm, saved, network.clone(), timings).await;
    drop(turn);
    // What has failed is taken back, so that nothing of it may be under way any more.
    let network = network.await;
    let sandbox: Arc<dyn Sandbox> = Arc::new(restored?);
    pod.set_sandbox(Some(sandbox.clone()));
    steps::done(Step::PodRestored);
    for (container, record) in &containers {
        take_up(context, container, record, sandbox.as_ref()).await?;
    }
    pod.change(|record| {
        record.network = network.ok().flatten().as_ref().map(run::shown);
        record.state = SandboxState::Ready;
    });
    context.registry.save_pod(pod).await?;
    steps::done(Step::RestoreSaved);
    watch::watch(context, pod);
    for (container, _) in &containers {
        if container.state() == ContainerState::Running {
            exits::watch(context, container, sandbox.clone());
        }
    }
    context
        .registry
        .emit_of_pod(cri::ContainerEventType::ContainerStartedEvent, pod, None);
    Ok(())
}

/// Reserves the containers' names.
async fn reserve(
    context: &Context,
    pod: &Arc<Pod>,
    snapshot: &Snapshot,
) -> Result<Vec<(Arc<Container>, ContainerRecord)>, CriError> {
    let mut containers = Vec::new();
    for record in &snapshot.manifest.containers {
        let making = ContainerRecord {
            state: ContainerState::Creating,
            ..record.clone()
        };
        let container = context.registry.create_container(making, pod.clone());
        containers.push((container.await?, record.clone()));
    }
    Ok(containers)
}

/// What the machine is made from: its size and disk are those that it had.
async fn plan(
    context: &Context,
    pod: &Pod,
    snapshot: &Snapshot,
    timings: &Timings,
) -> Result<SandboxPlan, CriError> {
    let record = pod.record();
    let config = &record.config.0;
    let linux = config.linux.clone().unwrap_or_default();
    let port = match snapshot.manifest.pod.network {
        Some(_) => {
            let identity = identity(&record);
            let prepare = context.network.prepare(&identity, true, None);
            Some(timings.step("network namespace", prepare).await?)
        }
        None => None,
    };
    Ok(SandboxPlan {
        id: pod.id.clone(),
        hostname: run::hostname(config, &pod.id),
        dns: dns::of(config, on_host_network(config)).await,
        vcpus: snapshot.manifest.machine.vcpus,
        memory_mib: snapshot.manifest.machine.memory_mib,
        cgroup_parent: linux.cgroup_parent,
        port,
        shared_pid_namespace: shares_pid(config),
        sysctls: linux.sysctls.into_iter().collect(),
        scratch: match &snapshot.manifest.scratch {
            Some(disk) => Scratch::Disk {
                bytes: disk.bytes,
                usual: false,
            },
            None => Scratch::default(),
        },
        host: HostNamespaces::default(),
        ids: spec::user_ids(&namespaces(config))?,
        user: record.user,
    })
}

/// Takes up a container as it was. Its log goes on before its end can be noted.
async fn take_up(
    context: &Context,
    container: &Container,
    record: &ContainerRecord,
    sandbox: &dyn Sandbox,
) -> Result<(), CriError> {
    if record.state == ContainerState::Running {
        let added = sandbox.add_log(Log {
            container_id: container.id.clone(),
            terminal: record.config.0.tty,
            file: log::open(&record.log_path).await?,
            stdout: None,
            stderr: None,
        });
        added.await?;
    }
    container.change(|now| now.state = record.state);
    context.registry.save_container(container).await?;
    if record.state == ContainerState::Exited {
        container.exited.send_replace(true);
    }
    Ok(())
}
