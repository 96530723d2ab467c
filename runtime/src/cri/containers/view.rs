//! Containers as the interface shows them.

use std::collections::HashMap;

use caisson_proto::cri;

use super::super::registry::Container;
use super::super::spec::signal;
use crate::store::{ContainerRecord, ContainerState};

/// The state as the interface knows it.
pub fn cri_state(state: ContainerState) -> cri::ContainerState {
    match state {
        ContainerState::Creating => cri::ContainerState::ContainerUnknown,
        ContainerState::Created | ContainerState::Starting => cri::ContainerState::ContainerCreated,
        ContainerState::Running => cri::ContainerState::ContainerRunning,
        ContainerState::Exited | ContainerState::Removing => cri::ContainerState::ContainerExited,
    }
}

/// Whether a client may see a container: not before the call that makes it has succeeded.
pub fn is_visible(state: ContainerState) -> bool {
    state != ContainerState::Creating
}

/// The state in a word, for messages.
pub fn word(state: ContainerState) -> &'static str {
    match state {
        ContainerState::Creating => "being made",
        ContainerState::Created => "created",
        ContainerState::Starting => "being started",
        ContainerState::Running => "running",
        ContainerState::Exited => "exited",
        ContainerState::Removing => "being removed",
    }
}

/// A container in a list.
pub fn item(record: &ContainerRecord) -> cri::Container {
    let config = &record.config.0;
    cri::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        metadata: config.metadata.clone(),
        image: config.image.clone(),
        image_ref: record.image_ref.clone(),
        state: cri_state(record.state) as i32,
        created_at: record.created_at,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        image_id: record.image_id.clone(),
    }
}

/// A container in full. While it runs it has no message but that its output is held back.
pub fn status(container: &Container) -> cri::ContainerStatus {
    let record = &*container.record();
    let message = match record.state {
        ContainerState::Running => container.log_failure(),
        _ => None,
    };
    let config = &record.config.0;
    cri::ContainerStatus {
        id: record.id.clone(),
        metadata: config.metadata.clone(),
        state: cri_state(record.state) as i32,
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: record.finished_at,
        exit_code: record.exit_code,
        image: config.image.clone(),
        image_ref: record.image_ref.clone(),
        reason: record.reason.clone(),
        message: message.unwrap_or_else(|| record.message.clone()),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        mounts: config.mounts.clone(),
        log_path: record.log_path.display().to_string(),
        resources: Some(cri::ContainerResources {
            linux: Some(record.resources.0.clone()),
            windows: None,
        }),
        image_id: record.image_id.clone(),
        user: record.user.as_ref().map(|user| cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user.groups.iter().map(|gid| i64::from(*gid)).collect(),
            }),
        }),
        stop_signal: signal::to_cri(record.stop_signal) as i32,
    }
}

/// What only people read.
pub fn verbose(container: &Container) -> HashMap<String, String> {
    let record = container.record();
    let info = serde_json::json!({
        "sandboxID": record.sandbox_id,
        "state": record.state,
        "guestPid": record.guest_pid,
        "process": record.process,
        "layers": record.layers,
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}
