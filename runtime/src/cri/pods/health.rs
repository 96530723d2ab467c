//! Pods that run and do not answer.

use caisson_proto::cri;

use super::super::Context;
use super::super::registry::Pod;
use crate::sandbox::Sandbox;
use crate::store::SandboxState;

/// Asks a pod that runs again and again how it does. One that does not answer is not ready, until it answers again; who
/// waits for it does so no longer. Ends with the pod.
pub async fn tend(context: &Context, pod: &Pod, sandbox: &dyn Sandbox) {
    let mut health = sandbox.health();
    let note = async {
        // The sender is the sandbox's own, so this goes on as long as it is there.
        while health.changed().await.is_ok() {
            let silence = health.borrow_and_update().silence().map(str::to_owned);
            note(context, pod, silence);
        }
    };
    tokio::select! {
        () = sandbox.tend() => {}
        () = note => {}
    }
}

fn note(context: &Context, pod: &Pod, silence: Option<String>) {
    let (ready, before) = pod.change(|record| {
        let before = std::mem::replace(&mut record.silence, silence.clone());
        (record.state == SandboxState::Ready, before)
    });
    let kind = match (before.is_some(), &silence) {
        (false, Some(reason)) => {
            tracing::warn!(pod = pod.id, reason, "the pod does not answer");
            cri::ContainerEventType::ContainerStoppedEvent
        }
        (true, None) => {
            tracing::info!(pod = pod.id, "the pod answers again");
            cri::ContainerEventType::ContainerStartedEvent
        }
        _ => return,
    };
    if ready {
        context.registry.emit_of_pod(kind, pod, None);
    }
}
