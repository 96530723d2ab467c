//! RemoveContainer.

use std::sync::Arc;
use std::time::Duration;

use caisson_proto::{agent, cri};

use super::super::registry::Container;
use super::super::{Context, CriError, guest};
use super::stop;
use crate::steps::{self, Step};
use crate::store::ContainerState;

/// Kills a container if it runs and removes every trace of it but its log, which is the client's. Idempotent.
///
/// # Errors
/// The agent or the host failed; called again, it goes on from there.
pub async fn remove(context: &Arc<Context>, container: &Arc<Container>) -> Result<(), CriError> {
    stop(container, Duration::ZERO).await?;
    let _one_at_a_time = container.lifecycle.lock().await;
    let creating = container.change(|record| {
        let creating = record.state == ContainerState::Creating;
        if !creating {
            record.state = ContainerState::Removing;
        }
        creating
    });
    if creating {
        return Err(CriError::precondition(format!(
            "container {} is still being made; remove it when that is done",
            container.id
        )));
    }
    context.registry.save_container(container).await?;
    steps::done(Step::RemoveRecorded);
    container.exited.send_replace(true);

    if let Some(sandbox) = container.pod.sandbox() {
        if sandbox.ended().borrow().is_none() {
            let mut client = sandbox.agent();
            let request = agent::RemoveContainerRequest {
                container_id: container.id.clone(),
            };
            let what = format!("remove container {}", container.id);
            let removed = guest::call(
                sandbox.as_ref(),
                &what,
                guest::START,
                client.remove_container(request),
            )
            .await;
            // With its sandbox gone meanwhile, so is the container.
            if let Err(error) = removed
                && sandbox.ended().borrow().is_none()
            {
                return Err(error);
            }
        }
        steps::done(Step::AgentRemoved);
        sandbox.forget(&container.id).await?;
    }
    steps::done(Step::ContainerForgotten);
    if context.registry.delete_container(container).await? {
        steps::done(Step::RemoveSaved);
        context
            .registry
            .emit(cri::ContainerEventType::ContainerDeletedEvent, container);
    }
    Ok(())
}
