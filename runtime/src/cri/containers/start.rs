//! StartContainer.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use caisson_proto::{agent, cri};

use super::super::registry::{Container, now};
use super::super::{Context, CriError, guest};
use super::{START_FAILED_CODE, exits, log};
use crate::sandbox::{Log, Sandbox};
use crate::steps::{self, Step};
use crate::store::ContainerState;

/// Descriptors that get a copy of a container's output from its first byte on.
#[derive(Debug, Default)]
pub struct Copies {
    /// Standard output, or the terminal's output.
    pub stdout: Option<OwnedFd>,
    /// Standard error.
    pub stderr: Option<OwnedFd>,
}

/// Lets a created container's process run.
///
/// # Errors
/// FAILED_PRECONDITION for a container that was started before or whose pod is not ready; otherwise the container has
/// then exited, with the reason StartError.
pub async fn start(
    context: &Arc<Context>,
    container: &Arc<Container>,
    copies: Copies,
) -> Result<(), CriError> {
    let _one_at_a_time = container.lifecycle.lock().await;
    let sandbox = container.pod.ready()?;
    let before = container.change(|record| {
        let before = record.state;
        if before == ContainerState::Created {
            record.state = ContainerState::Starting;
        }
        before
    });
    if before != ContainerState::Created {
        return Err(CriError::precondition(format!(
            "container {} cannot be started: it is {}; only a created container can",
            container.id,
            super::view::word(before)
        )));
    }
    context.registry.save_container(container).await?;
    steps::done(Step::StartRecorded);

    match run(container, sandbox.as_ref(), copies).await {
        Ok(()) => {
            steps::done(Step::AgentStartedContainer);
            container.change(|record| {
                record.state = ContainerState::Running;
                record.started_at = now();
            });
            // Before the watch, which may tell at once that it has ended.
            context
                .registry
                .emit(cri::ContainerEventType::ContainerStartedEvent, container);
            // Watched even if the record cannot be written: the process runs.
            exits::watch(context, container, sandbox);
            context.registry.save_container(container).await?;
            steps::done(Step::StartSaved);
            Ok(())
        }
        Err(error) => {
            let end = exits::End {
                code: START_FAILED_CODE,
                reason: "StartError",
                message: error.message.clone(),
                at: now(),
            };
            exits::finish(context, container, end).await;
            Err(error)
        }
    }
}

/// The log first, so that it has the output from its first byte on.
async fn run(container: &Container, sandbox: &dyn Sandbox, copies: Copies) -> Result<(), CriError> {
    let record = container.record();
    let file = log::open(&record.log_path).await?;
    let alone = copies.stdout.is_none() && copies.stderr.is_none();
    let added = sandbox
        .add_log(Log {
            container_id: container.id.clone(),
            terminal: record.config.0.tty,
            file,
            stdout: copies.stdout,
            stderr: copies.stderr,
        })
        .await;
    if let Err(error) = added {
        // A daemon that died after this point has left the log there, open; only what has one can be attached to.
        let has_one = alone && sandbox.attach(&container.id, None, None).await.is_ok();
        if !has_one {
            return Err(error.into());
        }
    }
    steps::done(Step::LogAdded);
    let mut client = sandbox.agent();
    let request = agent::StartContainerRequest {
        container_id: container.id.clone(),
    };
    let what = format!("start container {}", container.id);
    guest::call(
        sandbox,
        &what,
        guest::START,
        client.start_container(request),
    )
    .await
    .map(drop)
}
