//! Pods as the interface shows them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use caisson_proto::cri;

use super::super::Context;
use super::super::containers;
use super::super::registry::{Pod, now};
use super::cri_state;
use crate::sandbox::Sandbox;
use crate::sandbox::pod::confinement::Confinement;
use crate::store::SandboxRecord;

/// How long a pod process may take to say how it does, for people.
const STATUS_LIMIT: Duration = Duration::from_secs(2);

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

/// What of a pod only people read.
pub async fn verbose(pod: &Pod) -> HashMap<String, String> {
    let details = details(pod, &pod.record()).await;
    HashMap::from([("info".to_owned(), details.to_string())])
}

/// A pod in full.
///
/// Its containers' statuses, with the time at which all this was so, are there while somebody watches events: a client
/// that goes by events reads them here, any other asks for each container, as the time of 0 tells it to (CRI
/// `PodSandboxStatusResponse`).
pub fn status(context: &Context, pod: &Arc<Pod>) -> cri::PodSandboxStatusResponse {
    let record = pod.record();
    let watched = context.registry.is_watched();
    cri::PodSandboxStatusResponse {
        status: Some(pod_status(&record)),
        info: HashMap::new(),
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
        .map(|container| containers::status(container))
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

/// How the pod's process is confined; `None` if it has ended.
async fn confinement(sandbox: &dyn Sandbox) -> Option<Confinement> {
    let pid = sandbox.host_pid()?;
    let read = tokio::task::spawn_blocking(move || Confinement::read(pid));
    let mut found = read.await.ok()?.ok()?;
    let status = tokio::time::timeout(STATUS_LIMIT, sandbox.pod().control.status()).await;
    found.landlock = status.ok().and_then(Result::ok).map(|s| s.landlock);
    Some(found)
}

async fn details(pod: &Pod, record: &SandboxRecord) -> serde_json::Value {
    let sandbox = pod.sandbox();
    let confinement = match &sandbox {
        Some(sandbox) => confinement(sandbox.as_ref()).await,
        None => None,
    };
    serde_json::json!({
        "id": record.id,
        "handler": record.handler,
        "state": record.state,
        "reason": record.silence.as_ref().unwrap_or(&record.reason),
        "pid": sandbox.and_then(|sandbox| sandbox.host_pid()),
        "confinement": confinement,
        "network": record.network,
    })
}
