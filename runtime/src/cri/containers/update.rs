//! UpdateContainerResources.

use std::sync::Arc;

use caisson_proto::{agent, cri};

use super::super::registry::Container;
use super::super::{Context, CriError, guest, spec};
use crate::store::ContainerState;

/// Changes a container's limits.
///
/// # Errors
/// FAILED_PRECONDITION for a container that has ended; INVALID_ARGUMENT for limits that cannot be.
pub async fn update(
    context: &Arc<Context>,
    container: &Arc<Container>,
    resources: &cri::LinuxContainerResources,
) -> Result<(), CriError> {
    let record = container.record();
    if !matches!(
        record.state,
        ContainerState::Created | ContainerState::Running
    ) {
        return Err(CriError::precondition(format!(
            "the limits of container {} cannot be changed: it is {}",
            container.id,
            super::view::word(record.state)
        )));
    }
    let oci = spec::linux_resources(resources)?;
    let resources_json = serde_json::to_vec(&oci)
        .map_err(|error| CriError::internal(format!("cannot encode the limits: {error}")))?;
    let sandbox = container.pod.ready()?;
    let mut client = sandbox.agent();
    let request = agent::UpdateContainerRequest {
        container_id: container.id.clone(),
        resources_json,
    };
    let what = format!("update container {}", container.id);
    guest::call(
        sandbox.as_ref(),
        &what,
        guest::QUICK,
        client.update_container(request),
    )
    .await?;
    container.change(|record| record.resources.0 = spec::merge(&record.resources.0, resources));
    context.registry.save_container(container).await
}
