//! StopPodSandbox.

use std::sync::Arc;
use std::time::Duration;

use caisson_proto::cri;

use super::super::containers;
use super::super::registry::Pod;
use super::super::{Context, CriError};
use super::identity;
use crate::steps::{self, Step};
use crate::store::SandboxState;

/// How long a guest whose containers are gone may take to power off.
const POWER_OFF: Duration = Duration::from_secs(5);

/// Stops a pod: its containers, its machine, its network. Idempotent; whatever the guest does, it ends.
///
/// # Errors
/// A step on the host failed; called again, it goes on from there.
// must-test: Stop and Remove always end
pub async fn stop(context: &Arc<Context>, pod: &Arc<Pod>) -> Result<(), CriError> {
    let was = pod.change(|record| {
        let was = record.state;
        if was == SandboxState::Ready {
            record.state = SandboxState::Stopping;
        }
        was
    });
    match was {
        SandboxState::Creating => {
            return Err(CriError::precondition(format!(
                "pod {} is still being made; stop it when that is done",
                pod.id
            )));
        }
        SandboxState::Ready => {
            context.registry.save_pod(pod).await?;
            steps::done(Step::StopPodRecorded);
        }
        _ => {}
    }

    kill_containers(context, pod).await;
    steps::done(Step::ContainersKilled);
    if let Some(sandbox) = pod.sandbox() {
        sandbox.stop(POWER_OFF).await?;
    }
    steps::done(Step::SandboxStopped);
    // Whoever was making something in the pod has failed by now and takes it back.
    let _apart = pod.lifecycle.write().await;
    let record = pod.record();
    context.network.teardown(&identity(&record)).await?;
    containers::exits::all_ended(context, pod, "the pod was stopped").await;
    let (stopped, changed) = pod.change(|record| {
        record.silence = None;
        let before = (record.state, record.network.is_some());
        if record.state != SandboxState::Removing {
            record.state = SandboxState::NotReady;
        }
        record.network = None;
        let stopped = before.0 == SandboxState::Stopping;
        (stopped, before != (record.state, false))
    });
    if stopped {
        context
            .registry
            .emit_of_pod(cri::ContainerEventType::ContainerStoppedEvent, pod, None);
    }
    if changed {
        context.registry.save_pod(pod).await?;
        steps::done(Step::StopPodSaved);
    }
    Ok(())
}

/// Kills the containers, all at once. What does not die here ends with the machine in a moment.
async fn kill_containers(context: &Context, pod: &Pod) {
    let kills = context
        .registry
        .containers_of(&pod.id)
        .into_iter()
        .map(|container| async move { containers::stop(&container, Duration::ZERO).await });
    for result in futures::future::join_all(kills).await {
        if let Err(error) = result {
            tracing::warn!(pod = pod.id, %error, "a container of the pod did not stop");
        }
    }
}
