//! What happens when a pod's machine ends by itself.

use std::sync::Arc;

use caisson_proto::cri;
use caisson_vmm_protocol::ExitReason;

use super::super::Context;
use super::super::containers::exits;
use super::super::registry::Pod;
use super::health;
use crate::sandbox::{Sandbox, sentence};
use crate::store::SandboxState;

/// Watches a pod's sandbox: while it does not answer the pod is not ready, and once it has ended neither is it and
/// its containers have exited, whatever else happens. Nothing of this waits for the guest.
// must-test: a dead VMM leaves pods Terminating for ever
pub fn watch(context: &Arc<Context>, pod: &Arc<Pod>) {
    let Some(sandbox) = pod.sandbox() else { return };
    let (context, pod) = (context.clone(), pod.clone());
    tokio::spawn(async move {
        health::tend(&context, &pod, sandbox.as_ref()).await;
        let reason = last_words(sandbox.as_ref());
        let by_itself = pod.change(|record| {
            let ready = record.state == SandboxState::Ready;
            if ready {
                record.state = SandboxState::NotReady;
                record.reason.clone_from(&reason);
                record.silence = None;
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
        exits::all_ended(&context, &pod, &reason).await;
    });
}

/// Why a sandbox ended, and what the guest said of it before.
fn last_words(sandbox: &dyn Sandbox) -> String {
    let ended = sandbox.ended();
    let Some(reason) = ended.borrow().clone() else {
        return String::new();
    };
    let why = sentence(&reason);
    let said = match reason {
        ExitReason::Panicked | ExitReason::Reset => sandbox.last_words(),
        _ => String::new(),
    };
    if said.is_empty() {
        why
    } else {
        format!("{why}; its console ends with: {said}")
    }
}
