//! A pod that is written to a directory (`caisson snapshot`).
//!
//! The order: nothing is begun in the pod any more; its output is let go of at both ends, so that nothing of it is on its way;
//! the machine stands still and is written, its disk beside it; the manifest makes a snapshot of that. Whatever fails, the pod
//! goes on. So it does with the next daemon, where this one dies in the middle of it ([`go_on_if_held`]).

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use caisson_proto::agent;
use caisson_vmm_protocol::{GrowthConfig, Request, SavedMachine, VmState};

use super::super::registry::{Container, Pod, now};
use super::super::{Context, CriError, guest};
use super::{remove, size};
use crate::config::HandlerKind;
use crate::image::DiffId;
use crate::sandbox::Sandbox;
use crate::sandbox::microvm;
use crate::snapshot::{
    Dependencies, FileCheck, MOST_LAYERS, Machine, Manifest, PlacedLayer, SnapshotError, Writing,
    is_settled, volume,
};
use crate::steps::{self, Step};
use crate::store::{SandboxRecord, SandboxState};

/// How long a pod may take to stand still: its processes, and who reads its output.
const STANDSTILL: Duration = Duration::from_secs(60);

/// Writes a pod to the directory `dir`, which must not exist. The pod ends then, and is removed, unless it is to go on.
///
/// # Errors
/// FAILED_PRECONDITION that says what about the pod cannot be written; ALREADY_EXISTS; INTERNAL with the step that failed. The pod
/// goes on then, and nothing is left of the directory.
pub async fn snapshot(
    context: &Arc<Context>,
    pod: &Arc<Pod>,
    dir: PathBuf,
    leave_running: bool,
) -> Result<(), CriError> {
    {
        // Nothing is made or taken apart meanwhile.
        let _alone = pod.lifecycle.write().await;
        let sandbox = pod.ready()?;
        let containers = context.registry.containers_of(&pod.id);
        let mut held = Vec::with_capacity(containers.len());
        for container in &containers {
            held.push(container.lifecycle.lock().await);
        }
        check(&pod.record(), &containers)?;
        sandbox.pod().rest(true);
        let written = write(context, pod, sandbox.as_ref(), &containers, dir).await;
        match &written {
            Ok(()) => tracing::info!(pod = pod.id, leave_running, "the pod was written"),
            Err(error) => tracing::warn!(pod = pod.id, %error, "the pod could not be written"),
        }
        let ends = written.is_ok() && !leave_running;
        let going = match ends {
            true => end(context, pod, sandbox.as_ref()).await,
            false => go_on(sandbox.as_ref()).await,
        };
        sandbox.pod().rest(false);
        written?;
        going?;
        if !ends {
            return Ok(());
        }
    }
    remove(context, pod).await
}

/// What a snapshot cannot have.
fn check(record: &SandboxRecord, containers: &[Arc<Container>]) -> Result<(), CriError> {
    if record.kind != HandlerKind::MicroVm {
        return Err(CriError::precondition(format!(
            "pod {} runs on the host and has no machine that could be written; only pods in microVMs can",
            record.id
        )));
    }
    for container in containers {
        let (id, container) = (&container.id, container.record());
        if !is_settled(container.state) {
            return Err(CriError::precondition(format!(
                "container {id} is being made or removed; try again when that is done"
            )));
        }
        if let Some((at, path)) = volume(&container.config.0) {
            return Err(CriError::precondition(format!(
                "container {id} has the volume {path} at {at}, and a pod with files of the host cannot be written; only one without volumes can"
            )));
        }
    }
    let layers = used_layers(containers).len();
    if layers > MOST_LAYERS {
        return Err(CriError::precondition(format!(
            "the pod's containers have {layers} image layers, and one with more than {MOST_LAYERS} cannot be written"
        )));
    }
    Ok(())
}

async fn write(
    context: &Arc<Context>,
    pod: &Pod,
    sandbox: &dyn Sandbox,
    containers: &[Arc<Container>],
    dir: PathBuf,
) -> Result<(), CriError> {
    let microvm = context.microvm.clone();
    let (depends, writing) =
        blocking(move || Ok((Dependencies::here(&microvm)?, Writing::begin(&dir)?))).await?;
    steps::done(Step::SnapshotBegun);
    stand_still(sandbox).await?;
    steps::done(Step::PodStandsStill);
    let record = pod.record();
    let (_, memory_mib) = size::machine(&record.config.0, &context.config.microvm);
    // What was added to one that has grown came in blocks.
    let most = (u64::from(memory_mib) + u64::from(GrowthConfig::BLOCK_MIB)) << 20;
    let (writing, machine) = take_machine(sandbox, writing, most).await?;
    steps::done(Step::MachineWritten);
    let manifest = Manifest {
        format: Manifest::FORMAT,
        written_at: now(),
        depends,
        machine: Machine {
            vcpus: machine.vcpus,
            memory_mib: machine.memory_mib,
            growth: machine.growth,
        },
        layers: layers(context, containers, &machine)?,
        memory: FileCheck::default(),
        state: FileCheck::default(),
        scratch: None,
        pod: SandboxRecord::clone(&record),
        containers: containers
            .iter()
            .map(|container| container.record().as_ref().clone())
            .collect(),
    };
    let disk = sandbox.pod().dir.scratch();
    blocking(move || {
        if disk.exists() {
            writing.copy_disk(&disk)?;
        }
        writing.finish(manifest)
    })
    .await?;
    steps::done(Step::SnapshotWritten);
    Ok(())
}

/// Has the pod process and the agent let go of the containers' output, and the containers stand still.
async fn stand_still(sandbox: &dyn Sandbox) -> Result<(), CriError> {
    let pod = sandbox.pod();
    let held = pod.control.ask(Request::HoldLogs).await;
    held.map_err(|error| pod.error("hold the containers' output", error))?;
    let mut client = sandbox.agent();
    guest::call(
        sandbox,
        "bring the pod to a standstill",
        STANDSTILL,
        client.quiesce(agent::QuiesceRequest {}),
    )
    .await
    .map(drop)
}

/// Takes the machine from the pod process, which then is parked.
async fn take_machine(
    sandbox: &dyn Sandbox,
    writing: Writing,
    most: u64,
) -> Result<(Writing, SavedMachine), CriError> {
    let (ours, theirs) = UnixStream::pair()
        .map_err(|error| CriError::internal(format!("no socket for the pod's machine: {error}")))?;
    let take = tokio::task::spawn_blocking(move || {
        let taken = writing.take_machine(OwnedFd::from(ours), most);
        taken.map(|()| writing)
    });
    let save = sandbox.pod().control.save(theirs.into());
    let (taken, saved) = tokio::join!(take, save);
    let taken = taken.map_err(|error| CriError::internal(format!("it broke off: {error}")))?;
    match (taken, saved) {
        (Ok(writing), Ok(machine)) => Ok((writing, machine)),
        // The stream broke off because the pod process refused, or it failed because nobody took the stream.
        (Ok(_) | Err(SnapshotError::Stream(_)), Err(error)) => {
            Err(sandbox.pod().error("write its machine", error).into())
        }
        (Err(error), _) => Err(error.into()),
    }
}

/// The diff IDs of the layers that the containers have, each once.
fn used_layers(containers: &[Arc<Container>]) -> BTreeSet<String> {
    let records = containers.iter().map(|container| container.record());
    records.flat_map(|record| record.layers.clone()).collect()
}

/// The layers that the containers have, with the places that the machine has given them.
fn layers(
    context: &Context,
    containers: &[Arc<Container>],
    machine: &SavedMachine,
) -> Result<Vec<PlacedLayer>, CriError> {
    let used = used_layers(containers);
    let mut placed = Vec::with_capacity(used.len());
    for diff_id in used {
        let layer: DiffId = diff_id.parse()?;
        let path = context.images.layer_path(&layer);
        let name = microvm::layer_name(&path).map_err(|e| CriError::internal(e.to_string()))?;
        let place = machine.layers.iter().find(|place| place.name == name);
        let place = place.ok_or_else(|| {
            CriError::internal(format!(
                "the pod process has no place for the layer {diff_id}"
            ))
        })?;
        placed.push(PlacedLayer {
            diff_id,
            offset: place.offset,
            bytes: place.bytes,
        });
    }
    placed.sort_by_key(|layer| layer.offset);
    Ok(placed)
}

/// Ends a pod that stands still; it is then to be removed, by the next daemon if need be.
async fn end(context: &Context, pod: &Pod, sandbox: &dyn Sandbox) -> Result<(), CriError> {
    pod.change(|record| record.state = SandboxState::Removing);
    context.registry.save_pod(pod).await?;
    steps::done(Step::SnapshotPodEnds);
    Ok(sandbox.pod().end().await?)
}

/// Lets a pod go on that stands still, or was about to.
async fn go_on(sandbox: &dyn Sandbox) -> Result<(), CriError> {
    let pod = sandbox.pod();
    let parked =
        matches!(pod.control.status().await, Ok(status) if status.state == VmState::Paused);
    if parked {
        let resumed = pod.control.ask(Request::Resume).await;
        resumed.map_err(|error| pod.error("let its machine go on", error))?;
    }
    let mut client = sandbox.agent();
    let health = guest::call(
        sandbox,
        "say how it does",
        STANDSTILL,
        client.health(agent::HealthRequest {}),
    )
    .await?;
    if health.quiescent {
        guest::call(
            sandbox,
            "let the containers go on",
            STANDSTILL,
            client.resume(microvm::stay()),
        )
        .await?;
    }
    let released = pod.control.ask(Request::ReleaseLogs).await;
    Ok(released.map_err(|error| pod.error("take up the containers' output", error))?)
}

/// Lets a pod go on that the daemon before this one was writing when it died.
pub(super) async fn go_on_if_held(pod: &Pod, sandbox: &dyn Sandbox) {
    let status = sandbox.pod().control.status().await;
    let held = status.is_ok_and(|status| status.state == VmState::Paused || status.logs_held);
    if held && let Err(error) = go_on(sandbox).await {
        tracing::error!(pod = pod.id, %error, "the pod may still stand still");
    }
}

/// Runs work on files beside the event loop.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static,
) -> Result<T, CriError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(CriError::internal(format!(
            "the snapshot broke off: {error}"
        ))),
    }
}
