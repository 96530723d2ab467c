//! StopContainer.

use std::time::Duration;

use caisson_proto::agent;

use super::super::registry::Container;
use super::super::spec::signal;
use super::super::{CriError, guest};
use super::exits;
use crate::sandbox::health;
use crate::steps::{self, Step};
use crate::store::ContainerState;

/// How long a container may take to be gone after SIGKILL.
const AFTER_KILL: Duration = Duration::from_secs(15);

/// Asks a container's process to stop, and kills it when `grace` is over. Returns when its end is noted. A container
/// that does not run is no error.
///
/// # Errors
/// DEADLINE_EXCEEDED when it outlives SIGKILL, UNAVAILABLE in a pod that does not answer; the pod is then to be stopped.
pub async fn stop(container: &Container, grace: Duration) -> Result<(), CriError> {
    if container.state() == ContainerState::Starting {
        // A start is bounded in time; what it makes is stopped then.
        drop(container.lifecycle.lock().await);
    }
    let Some(sandbox) = container.pod.sandbox() else {
        return end(container, grace).await;
    };
    tokio::select! {
        biased;
        result = end(container, grace) => result,
        () = health::silent(sandbox.health()) => Err(CriError::unavailable(format!(
            "container {} cannot be stopped, because its pod does not answer; stop the pod",
            container.id
        ))),
    }
}

async fn end(container: &Container, grace: Duration) -> Result<(), CriError> {
    if container.state() != ContainerState::Running {
        return Ok(());
    }
    if !grace.is_zero() {
        let stop_signal = container.record().stop_signal;
        let sent = send(container, stop_signal, false).await;
        steps::done(Step::StopSent);
        match sent {
            Ok(()) if exits::wait_noted(container, grace).await => return Ok(()),
            Ok(()) => tracing::info!(
                container = container.id,
                "did not stop in time and is killed"
            ),
            Err(error) => {
                tracing::warn!(container = container.id, %error, "could not be asked to stop");
            }
        }
    }
    let sent = send(container, signal::KILL, true).await;
    if exits::wait_noted(container, AFTER_KILL).await {
        return Ok(());
    }
    sent?;
    Err(CriError::deadline(format!(
        "container {} did not end within {} s after SIGKILL; stop its pod",
        container.id,
        AFTER_KILL.as_secs()
    )))
}

async fn send(container: &Container, signal: i32, all: bool) -> Result<(), CriError> {
    let Some(sandbox) = container.pod.sandbox() else {
        return Ok(());
    };
    let mut client = sandbox.agent();
    let request = agent::SignalRequest {
        container_id: container.id.clone(),
        exec_id: String::new(),
        signal,
        all,
    };
    let what = format!("send signal {signal} to container {}", container.id);
    guest::call(
        sandbox.as_ref(),
        &what,
        guest::QUICK,
        client.signal(request),
    )
    .await
    .map(drop)
}
