//! Pods as the interface shows them.

use std::collections::HashMap;
use std::sync::Arc;

use caisson_proto::cri;

use super::super::Context;
use super::super::containers;
use super::super::registry::{Pod, now};
use super::cri_state;
use crate::store::SandboxRecord;

/// A pod in a list.
pub fn item(record: &SandboxRecord) -> cri::PodSandbox {
    let config = &record.config.0;
    cri::PodSandbox {
        id: record.id.clone(),
        metadata: config.metadata.clone(),
        state: cri_state(record) as i32,
        created_at: record.created_at,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: record.handler.clone(),
    }
}

/// A pod in full; `verbose` adds what only people read.
///
/// Its containers' statuses, with the time at which all this was so, are there while somebody watches events: a client
/// that goes by events reads them here, any other asks for each container, as the time of 0 tells it to (CRI
/// `PodSandboxStatusResponse`).
pub fn status(context: &Context, pod: &Arc<Pod>, verbose: bool) -> cri::PodSandboxStatusResponse {
    let record = pod.record();
    let mut info = HashMap::new();
    if verbose {
        info.insert("info".to_owned(), details(pod, &record).to_string());
    }
    let watched = context.registry.is_watched();
    cri::PodSandboxStatusResponse {
        status: Some(pod_status(&record)),
        info,
        containers_statuses: if watched {
            containers_statuses(context, pod)
        } else {
            Vec::new()
        },
        timestamp: if watched { now() } else { 0 },
    }
}

fn containers_statuses(context: &Context, pod: &Pod) -> Vec<cri::ContainerStatus> {
    let containers = context.registry.containers_of(&pod.id);
    containers
        .iter()
        .filter(|container| containers::is_visible(container.state()))
        .map(|container| containers::status(&container.record()))
        .collect()
}

/// The status by itself.
pub fn pod_status(record: &SandboxRecord) -> cri::PodSandboxStatus {
    let config = &record.config.0;
    let ips = record
        .network
        .as_ref()
        .map(|network| network.ips.clone())
        .unwrap_or_default();
    let mut ips = ips.iter().map(ToString::to_string);
    let options = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.clone());
    cri::PodSandboxStatus {
        id: record.id.clone(),
        metadata: config.metadata.clone(),
        state: cri_state(record) as i32,
        created_at: record.created_at,
        network: Some(cri::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
        }),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace {
                options: Some(options.unwrap_or_default()),
            }),
        }),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: record.handler.clone(),
    }
}

fn details(pod: &Pod, record: &SandboxRecord) -> serde_json::Value {
    serde_json::json!({
        "state": record.state,
        "reason": record.silence.as_ref().unwrap_or(&record.reason),
        "pid": pod.sandbox().and_then(|sandbox| sandbox.host_pid()),
        "network": record.network,
    })
}
