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

/// A pod in full, its containers included; `verbose` adds what only people read.
pub fn status(context: &Context, pod: &Arc<Pod>, verbose: bool) -> cri::PodSandboxStatusResponse {
    let record = pod.record();
    let mut info = HashMap::new();
    if verbose {
        info.insert("info".to_owned(), details(pod, &record).to_string());
    }
    cri::PodSandboxStatusResponse {
        status: Some(pod_status(&record)),
        info,
        containers_statuses: context
            .registry
            .containers_of(&pod.id)
            .iter()
            .filter(|container| containers::is_visible(container.state()))
            .map(|container| containers::status(&container.record()))
            .collect(),
        timestamp: now(),
    }
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
