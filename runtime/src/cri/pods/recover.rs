//! A daemon that starts finds the pods of the one before it.

use std::sync::Arc;
use std::time::Duration;

use caisson_vmm_protocol::ExitReason;
use tokio::sync::watch::Receiver;

use super::super::containers;
use super::super::registry::Pod;
use super::super::{Context, CriError};
use super::{reboot, remove, run, sandbox, snapshot, stop, watch};
use crate::sandbox::{Sandbox, health, sentence};
use crate::store::SandboxState;

/// How long a daemon that starts waits for one pod. A pod that is silent, or a CNI plugin that hangs, must not keep it from
/// serving the others.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads the records, connects to the pods that run, and brings to an end what the last daemon left half done.
/// Running pods are not touched. When this returns every pod and container is known; ends go on behind it.
///
/// # Errors
/// The store cannot be read. A pod that cannot be recovered is shown as not ready instead.
pub async fn recover(context: &Arc<Context>) -> Result<(), CriError> {
    let store = context.registry.store();
    let (sandboxes, records) = (store.sandboxes()?, store.containers()?);
    for record in sandboxes {
        context.registry.adopt_pod(record);
    }
    for record in records {
        let id = record.id.clone();
        match context.registry.pod(&record.sandbox_id) {
            Ok(pod) => {
                context.registry.adopt_container(record, pod);
            }
            // Pods go after their containers, so this is a record that nothing stands behind.
            Err(_) => {
                tracing::warn!(container = id, "a container without a pod is forgotten");
                store.delete_container(record.into()).await?;
            }
        }
    }
    reboot::note(context).await?;
    let pods = context.registry.pods();
    futures::future::join_all(pods.iter().map(|pod| recover_pod(context, pod))).await;
    Ok(())
}

async fn recover_pod(context: &Arc<Context>, pod: &Arc<Pod>) {
    match sandbox::find(context, &pod.record()).await {
        Ok(sandbox) => pod.set_sandbox(Some(sandbox)),
        Err(error) => {
            tracing::error!(pod = pod.id, %error, "the pod cannot be found again");
            pod.change(|record| {
                if record.state == SandboxState::Ready {
                    record.state = SandboxState::NotReady;
                    record.reason = error.to_string();
                }
            });
        }
    }
    let (context, pod) = (context.clone(), pod.clone());
    let finish = |what: &'static str, result: Result<(), CriError>, id: &str| {
        if let Err(error) = result {
            tracing::warn!(pod = id, %error, "could not {what} a pod that the last daemon began to {what}");
        }
    };
    match pod.state() {
        SandboxState::Creating => {
            tracing::info!(pod = pod.id, "a half-made pod is taken back");
            let undone = tokio::spawn(async move {
                let _alone = pod.lifecycle.write().await;
                run::undo(&context, &pod, "the daemon ended while the pod was made").await;
            });
            let _ = tokio::time::timeout(PATIENCE, undone).await;
        }
        SandboxState::Ready => {
            let ended = pod
                .sandbox()
                .and_then(|sandbox| sandbox.ended().borrow().as_ref().map(sentence));
            // Also for a pod that has ended: the watch finds out at once and notes it.
            watch::watch(&context, &pod);
            if ended.is_none() {
                recover_running(&context, &pod).await;
            } else {
                for container in context.registry.containers_of(&pod.id) {
                    containers::recover_dead(&context, &container).await;
                }
            }
        }
        SandboxState::NotReady => {
            for container in context.registry.containers_of(&pod.id) {
                containers::recover_dead(&context, &container).await;
            }
        }
        SandboxState::Stopping => {
            containers::recover_half_made(&context, &pod).await;
            tokio::spawn(async move {
                finish("stop", stop(&context, &pod).await, &pod.id);
            });
        }
        SandboxState::Removing => {
            containers::recover_half_made(&context, &pod).await;
            tokio::spawn(async move {
                finish("remove", remove(&context, &pod).await, &pod.id);
            });
        }
    }
}

/// Waits until a pod answers that is left to itself.
async fn taken_up(pod: &Pod, sandbox: &dyn Sandbox) {
    snapshot::go_on_if_held(pod, sandbox).await;
    health::well(sandbox.health()).await;
}

async fn wait_ended(mut ended: Receiver<Option<ExitReason>>) {
    let _ = ended.wait_for(Option::is_some).await;
}

/// Takes up the containers of a pod that runs, once it answers: at once, or behind the caller's back if it is slow.
async fn recover_running(context: &Arc<Context>, pod: &Arc<Pod>) {
    let Some(sandbox) = pod.sandbox() else { return };
    let (context, pod) = (context.clone(), pod.clone());
    let recovered = tokio::spawn(async move {
        tokio::select! {
            () = taken_up(&pod, sandbox.as_ref()) => {
                containers::recover(&context, &pod).await;
            }
            // Its watch notes the ends.
            () = wait_ended(sandbox.ended()) => {}
        }
    });
    let _ = tokio::time::timeout(PATIENCE, recovered).await;
}
