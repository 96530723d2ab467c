//! Metrics of pods and containers (CRI `ListMetricDescriptors` and `ListPodSandboxMetrics`): the names and meanings of
//! cAdvisor, so that dashboards and alerts work on. What they are is in [`catalogue`].

mod catalogue;

use std::sync::Arc;

use caisson_proto::{agent, cri};

use super::containers::stats;
use super::registry::Pod;
use super::{Context, CriError};
use catalogue::{CONTAINER, Family, POD};

/// The labels of every metric, before its own.
const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

/// The most devices, and the most sizes of huge pages, that a guest may tell of a container.
const MAX_ENTRIES: usize = 64;

/// The values of a metric, each with those of its own labels.
type Values = Vec<(Vec<String>, u64)>;

/// What a container's metrics are computed from.
struct Sample {
    resources: cri::LinuxContainerResources,
    /// Unix time in nanoseconds.
    started_at: i64,
    stats: agent::ContainerStats,
    detail: agent::ContainerDetail,
}

/// What every metric is called and means.
pub fn descriptors() -> Vec<cri::MetricDescriptor> {
    let container = CONTAINER.iter().map(describe);
    container.chain(POD.iter().map(describe)).collect()
}

fn describe<T: ?Sized>(family: &Family<T>) -> cri::MetricDescriptor {
    cri::MetricDescriptor {
        name: family.name.to_owned(),
        help: family.help.to_owned(),
        label_keys: LABELS
            .iter()
            .chain(family.labels)
            .map(|label| (*label).to_owned())
            .collect(),
    }
}

/// The metrics of every pod that is ready. A pod that does not answer is left out.
pub async fn list(context: &Arc<Context>) -> Vec<cri::PodSandboxMetrics> {
    let pods = context.registry.pods();
    let ready = pods.iter().filter(|pod| pod.ready().is_ok());
    let asked = ready.map(|pod| async move {
        of_pod(context, pod)
            .await
            .inspect_err(|error| tracing::warn!(pod = pod.id, %error, "the pod told no metrics"))
            .ok()
    });
    let all = futures::future::join_all(asked).await;
    all.into_iter().flatten().collect()
}

async fn of_pod(
    context: &Arc<Context>,
    pod: &Arc<Pod>,
) -> Result<cri::PodSandboxMetrics, CriError> {
    let answer = stats::ask(pod, Vec::new(), true).await?;
    let sandbox = answer.sandbox.unwrap_or_default();
    let pod_record = pod.record();
    let metadata = pod_record.config.0.metadata.clone().unwrap_or_default();
    let labels = |id: &str, name: &str, image: &str, container: &str| -> Vec<String> {
        [
            id,
            name,
            image,
            container,
            &metadata.name,
            &metadata.namespace,
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let container_metrics = stats::running(context, pod, &answer.containers)
        .map(|(container, stats)| {
            let record = container.record();
            let name = record.config.0.metadata.as_ref();
            let name = name.map_or("", |metadata| &metadata.name);
            let base = labels(&record.id, &record.name, &record.image_ref, name);
            let sample = Sample {
                resources: record.resources.0.clone(),
                started_at: record.started_at,
                stats: stats.clone(),
                detail: bounded(stats.detail.as_ref()),
            };
            cri::ContainerMetrics {
                container_id: container.id.clone(),
                metrics: collect(CONTAINER, &sample, &base, stats.timestamp_ns),
            }
        })
        .collect();
    Ok(cri::PodSandboxMetrics {
        pod_sandbox_id: pod.id.clone(),
        metrics: collect(
            POD,
            sandbox.interfaces.as_slice(),
            &labels(&pod.id, &pod_record.name, "", ""),
            sandbox.timestamp_ns,
        ),
        container_metrics,
    })
}

/// Every metric of what a guest told, for the fuzz target `agent_replies`.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(stats: &agent::ContainerStats, sandbox: Option<&agent::SandboxStats>) {
    let sample = Sample {
        resources: cri::LinuxContainerResources::default(),
        started_at: 1,
        stats: stats.clone(),
        detail: bounded(stats.detail.as_ref()),
    };
    let base = LABELS.map(str::to_owned);
    let mut metrics = collect(CONTAINER, &sample, &base, stats.timestamp_ns);
    if let Some(sandbox) = sandbox {
        metrics.extend(collect(
            POD,
            sandbox.interfaces.as_slice(),
            &base,
            sandbox.timestamp_ns,
        ));
    }
    for metric in metrics {
        assert!(metric.timestamp >= 0);
        assert!(metric.label_values.len() >= LABELS.len());
    }
}

/// What a guest told of a container in detail, within bounds: its lists make as many metrics.
fn bounded(told: Option<&agent::ContainerDetail>) -> agent::ContainerDetail {
    let Some(told) = told else {
        return agent::ContainerDetail::default();
    };
    let mut detail = told.clone();
    detail.devices.truncate(MAX_ENTRIES);
    detail.huge_pages.truncate(MAX_ENTRIES);
    detail
}

fn collect<T: ?Sized>(
    families: &[Family<T>],
    source: &T,
    base: &[String],
    at: u64,
) -> Vec<cri::Metric> {
    let mut metrics = Vec::with_capacity(families.len());
    for family in families {
        for (labels, value) in (family.read)(source) {
            metrics.push(cri::Metric {
                name: family.name.to_owned(),
                timestamp: stats::timestamp(at),
                metric_type: family.kind as i32,
                label_values: base.iter().cloned().chain(labels).collect(),
                value: Some(cri::UInt64Value { value }),
            });
        }
    }
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_tells_is_bounded() {
        let told = agent::ContainerDetail {
            devices: vec![agent::DeviceIo::default(); 100_000],
            huge_pages: vec![agent::HugePages::default(); 30],
            ..Default::default()
        };
        let detail = bounded(Some(&told));
        assert_eq!(detail.devices.len(), MAX_ENTRIES);
        assert_eq!(detail.huge_pages.len(), 30);
    }

    #[test]
    fn every_value_has_as_many_labels_as_its_descriptor() {
        let resources = cri::LinuxContainerResources {
            cpu_quota: 20_000,
            ..Default::default()
        };
        let io = agent::DeviceIo {
            major: 254,
            minor: 0,
            read_bytes: 1,
            write_bytes: 2,
            reads: 3,
            writes: 4,
        };
        let detail = agent::ContainerDetail {
            devices: vec![io],
            huge_pages: vec![agent::HugePages {
                size: "2MB".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let stats = agent::ContainerStats {
            cpu_usage_ns: 2_500_000_000,
            cpu_pressure: Some(agent::Pressure::default()),
            ..Default::default()
        };
        let sample = Sample {
            resources,
            started_at: 1,
            stats,
            detail,
        };
        let eth0 = agent::InterfaceStats {
            name: "eth0".into(),
            ..Default::default()
        };
        let base: Vec<String> = LABELS.iter().map(|_| "x".to_owned()).collect();
        let mut metrics = collect(CONTAINER, &sample, &base, 1);
        metrics.extend(collect(POD, [eth0].as_slice(), &base, 1));
        let descriptors = descriptors();
        for metric in &metrics {
            let of = |d: &&cri::MetricDescriptor| d.name == metric.name;
            let descriptor = descriptors.iter().find(of).unwrap();
            assert_eq!(
                descriptor.label_keys.len(),
                metric.label_values.len(),
                "{}",
                metric.name
            );
        }
        let cpu = metrics
            .iter()
            .find(|metric| metric.name == "container_cpu_usage_seconds_total");
        assert_eq!(cpu.unwrap().value.unwrap().value, 2);
        let mut names: Vec<_> = descriptors.iter().map(|d| &d.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), descriptors.len());
    }
}
