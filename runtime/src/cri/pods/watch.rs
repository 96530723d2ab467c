//! What happens when a pod's machine ends by itself.

use std::sync::Arc;

use caisson_proto::cri;

use super::super::Context;
use super::super::containers::exits;
use super::super::registry::{Pod, describe};
use crate::store::SandboxState;

/// Watches a pod's sandbox: once it has ended the pod is not ready and its containers have exited, whatever else
/// happens. Nothing of this waits for the guest.
// must-test: a dead VMM leaves pods Terminating for ever
pub fn watch(context: &Arc<Context>, pod: &Arc<Pod>) {
    let Some(sandbox) = pod.sandbox() else { return };
    let (context, pod) = (context.clone(), pod.clone());
    tokio::spawn(async move {
        let mut ended = sandbox.ended();
        let reason = match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.as_ref().map(describe).unwrap_or_default(),
            Err(_) => return, // the sandbox is gone: the pod was removed
        };
        let by_itself = pod.change(|record| {
            let ready = record.state == SandboxState::Ready;
            if ready {
                record.state = SandboxState::NotReady;
                record.reason.clone_from(&reason);
            }
            ready
        });
        if by_itself {
            tracing::warn!(pod = pod.id, reason, "the pod's sandbox has ended");
            if let Err(error) = context.registry.save_pod(&pod).await {
                tracing::error!(pod = pod.id, %error, "the pod's record could not be written");
            }
            context.registry.emit_of_pod(
                cri::ContainerEventType::ContainerStoppedEvent,
                &pod,
                None,
            );
        }
        for container in context.registry.containers_of(&pod.id) {
            exits::sandbox_ended(&context, &container, &reason).await;
        }
    });
}
