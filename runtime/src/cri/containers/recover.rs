//! Containers of a daemon that came before.

use std::collections::HashMap;
use std::sync::Arc;

use caisson_proto::agent;

use super::super::registry::{Container, Pod};
use super::super::{Context, guest};
use super::{create, exits, remove};
use crate::store::ContainerState;
use agent::container_state::State;

/// Compares what the records say of a running pod's containers with what its agent knows, and takes up their watches.
pub async fn recover(context: &Arc<Context>, pod: &Arc<Pod>) {
    let Some(sandbox) = pod.sandbox() else { return };
    let mut client = sandbox.agent();
    let listed = guest::call(
        sandbox.as_ref(),
        "list its containers",
        guest::QUICK,
        client.list_containers(agent::ListContainersRequest {}),
    )
    .await;
    let known: HashMap<String, i32> = match listed {
        Ok(list) => list
            .containers
            .into_iter()
            .map(|state| (state.container_id, state.state))
            .collect(),
        Err(error) => {
            // Without the list each container is taken as its record says; its watch finds out the rest.
            tracing::warn!(pod = pod.id, %error, "the pod's agent did not list its containers");
            HashMap::new()
        }
    };
    for container in context.registry.containers_of(&pod.id) {
        match container.state() {
            ContainerState::Creating => create::undo(context, &container).await,
            ContainerState::Starting => {
                let started = known
                    .get(&container.id)
                    .is_some_and(|state| *state != State::Created as i32);
                container.change(|record| {
                    if started {
                        record.state = ContainerState::Running;
                        record.started_at = record.started_at.max(record.created_at);
                    } else {
                        record.state = ContainerState::Created;
                    }
                });
                if started {
                    exits::watch(context, &container, sandbox.clone());
                }
                if let Err(error) = context.registry.save_container(&container).await {
                    tracing::error!(container = container.id, %error, "the record could not be written");
                }
            }
            ContainerState::Running => exits::watch(context, &container, sandbox.clone()),
            ContainerState::Removing => {
                let context = context.clone();
                tokio::spawn(async move {
                    if let Err(error) = remove(&context, &container).await {
                        tracing::warn!(container = container.id, %error, "could not be removed");
                    }
                });
            }
            ContainerState::Created | ContainerState::Exited => {}
        }
    }
}

/// A container of a pod that does not run: it has ended, or never was.
pub async fn recover_dead(context: &Arc<Context>, container: &Arc<Container>) {
    if container.state() == ContainerState::Creating {
        create::undo(context, container).await;
    } else {
        let pod = container.pod.record();
        exits::finish(context, container, exits::lost(&pod.reason)).await;
    }
}

/// Takes back the containers that were being made in a pod that is about to go.
pub async fn recover_half_made(context: &Arc<Context>, pod: &Arc<Pod>) {
    for container in context.registry.containers_of(&pod.id) {
        if container.state() == ContainerState::Creating {
            create::undo(context, &container).await;
        }
    }
}
