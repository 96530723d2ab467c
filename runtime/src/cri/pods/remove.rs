//! RemovePodSandbox.

use std::sync::Arc;

use caisson_proto::cri;

use super::super::containers;
use super::super::registry::Pod;
use super::super::{Context, CriError};
use super::stop;
use super::view::pod_status;
use crate::steps::{self, Step};
use crate::store::SandboxState;

/// Stops a pod if need be and removes every trace of it, its containers included. Idempotent.
///
/// # Errors
/// A step on the host failed; called again, it goes on from there.
pub async fn remove(context: &Arc<Context>, pod: &Arc<Pod>) -> Result<(), CriError> {
    stop(context, pod).await?;
    pod.change(|record| record.state = SandboxState::Removing);
    context.registry.save_pod(pod).await?;
    steps::done(Step::RemovePodRecorded);

    for container in context.registry.containers_of(&pod.id) {
        containers::remove(context, &container).await?;
    }
    steps::done(Step::ContainersRemoved);
    let _apart = pod.lifecycle.write().await;
    if let Some(sandbox) = pod.sandbox() {
        sandbox.remove().await?;
    }
    steps::done(Step::SandboxRemoved);
    pod.set_sandbox(None);
    if context.registry.delete_pod(pod).await? {
        steps::done(Step::RemovePodSaved);
        context.registry.emit_of_pod(
            cri::ContainerEventType::ContainerDeletedEvent,
            pod,
            Some(pod_status(&pod.record())),
        );
    }
    Ok(())
}
