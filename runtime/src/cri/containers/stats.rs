//! Resource use of pods and containers. Each pod is asked by itself, within a limit, so that a slow one delays nobody else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use caisson_proto::{agent, cri};

use super::super::registry::{Container, CpuSample, Pod, lock};
use super::super::{Context, CriError, guest};
use crate::store::ContainerState;

/// The shortest time over which a rate is computed, in nanoseconds.
const MIN_INTERVAL: u64 = 100_000_000;
/// The most interfaces that a guest may name.
const MAX_INTERFACES: usize = 64;

/// The use of a pod and of its running containers.
///
/// # Errors
/// The pod is not ready, or its agent did not answer.
// must-test: one slow stats read holds a global lock and stalls the agent
pub async fn pod(context: &Arc<Context>, pod: &Arc<Pod>) -> Result<cri::PodSandboxStats, CriError> {
    let answer = ask(pod, Vec::new(), false).await?;
    let containers = of_containers(context, pod, &answer);
    let record = pod.record();
    let config = &record.config.0;
    let sandbox = answer.sandbox.unwrap_or_default();
    let at = timestamp(sandbox.timestamp_ns);
    let used = sandbox
        .memory_total_bytes
        .saturating_sub(sandbox.memory_available_bytes);
    let interfaces: Vec<_> = interfaces(&sandbox.interfaces)
        .map(|(name, interface)| cri::NetworkInterfaceUsage {
            name,
            rx_bytes: value(interface.rx_bytes),
            rx_errors: value(interface.rx_errors),
            tx_bytes: value(interface.tx_bytes),
            tx_errors: value(interface.tx_errors),
        })
        .collect();
    let (default, others): (Vec<_>, Vec<_>) = interfaces
        .into_iter()
        .partition(|interface| interface.name == "eth0");
    Ok(cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: record.id.clone(),
            metadata: config.metadata.clone(),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: Some(cpu(at, sandbox.cpu_usage_ns, &pod.cpu)),
            memory: Some(cri::MemoryUsage {
                timestamp: at,
                working_set_bytes: value(used),
                available_bytes: value(sandbox.memory_available_bytes),
                usage_bytes: value(used),
                ..Default::default()
            }),
            network: Some(cri::NetworkUsage {
                timestamp: at,
                default_interface: default.into_iter().next(),
                interfaces: others,
            }),
            process: Some(cri::ProcessUsage {
                timestamp: at,
                process_count: value(sandbox.processes),
            }),
            containers,
            io: None,
        }),
        windows: None,
    })
}

/// The use of one container.
///
/// # Errors
/// See [`pod`]; FAILED_PRECONDITION for a container that does not run.
pub async fn container(container: &Arc<Container>) -> Result<cri::ContainerStats, CriError> {
    if container.state() != ContainerState::Running {
        return Err(CriError::precondition(format!(
            "container {} does not run, so it uses nothing",
            container.id
        )));
    }
    let answer = ask(&container.pod, vec![container.id.clone()], false).await?;
    let found = answer
        .containers
        .iter()
        .find(|stats| stats.container_id == container.id)
        .ok_or_else(|| CriError::not_found("container", &container.id))?;
    Ok(convert(container, found))
}

/// The use of the running containers that pass `wanted`: one question to each of their pods, all at once. A pod that
/// does not answer is left out.
pub async fn list(
    context: &Arc<Context>,
    wanted: impl Fn(&Container) -> bool,
) -> Vec<cri::ContainerStats> {
    let mut pods: HashMap<String, (Arc<Pod>, Vec<Arc<Container>>)> = HashMap::new();
    for container in context.registry.containers() {
        if container.state() == ContainerState::Running && wanted(&container) {
            let pod = container.pod.clone();
            let of_pod = pods.entry(pod.id.clone()).or_insert((pod, Vec::new()));
            of_pod.1.push(container);
        }
    }
    let asked = pods.into_values().map(|(pod, containers)| async move {
        match ask(&pod, Vec::new(), false).await {
            Ok(answer) => matched(containers, &answer.containers)
                .map(|(container, stats)| convert(&container, stats))
                .collect(),
            Err(error) => {
                tracing::warn!(pod = pod.id, %error, "the pod told nothing of its resource use");
                Vec::new()
            }
        }
    });
    futures::future::join_all(asked).await.concat()
}

/// Asks a pod's agent for the use of these containers, or of all; `detail` for what only metrics tell.
///
/// # Errors
/// The pod is not ready, or its agent did not answer.
pub async fn ask(
    pod: &Pod,
    container_ids: Vec<String>,
    detail: bool,
) -> Result<agent::StatsResponse, CriError> {
    let sandbox = pod.ready()?;
    let mut client = sandbox.agent();
    guest::call(
        sandbox.as_ref(),
        "tell its resource use",
        guest::QUICK,
        client.stats(agent::StatsRequest {
            container_ids,
            detail,
        }),
    )
    .await
}

/// The pod's running containers, each with what its agent told of it.
pub fn running<'a>(
    context: &Context,
    pod: &Pod,
    told: &'a [agent::ContainerStats],
) -> impl Iterator<Item = (Arc<Container>, &'a agent::ContainerStats)> {
    let mut containers = context.registry.containers_of(&pod.id);
    containers.retain(|container| container.state() == ContainerState::Running);
    matched(containers, told)
}

/// Each container with what an agent told of it. Whatever else it told is left out.
fn matched(
    containers: Vec<Arc<Container>>,
    told: &[agent::ContainerStats],
) -> impl Iterator<Item = (Arc<Container>, &agent::ContainerStats)> {
    let by_id: HashMap<_, _> = told
        .iter()
        .map(|stats| (stats.container_id.as_str(), stats))
        .collect();
    containers.into_iter().filter_map(move |container| {
        let stats = by_id.get(container.id.as_str())?;
        Some((container, *stats))
    })
}

fn of_containers(
    context: &Context,
    pod: &Pod,
    answer: &agent::StatsResponse,
) -> Vec<cri::ContainerStats> {
    running(context, pod, &answer.containers)
        .map(|(container, stats)| convert(&container, stats))
        .collect()
}

pub(super) fn convert(container: &Container, stats: &agent::ContainerStats) -> cri::ContainerStats {
    let record = container.record();
    let config = &record.config.0;
    let at = timestamp(stats.timestamp_ns);
    let available = match stats.memory_limit_bytes {
        0 => None,
        limit => value(limit.saturating_sub(stats.memory_working_set_bytes)),
    };
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: record.id.clone(),
            metadata: config.metadata.clone(),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        cpu: Some(cri::CpuUsage {
            psi: stats.cpu_pressure.as_ref().map(psi),
            ..cpu(at, stats.cpu_usage_ns, &container.cpu)
        }),
        memory: Some(cri::MemoryUsage {
            timestamp: at,
            working_set_bytes: value(stats.memory_working_set_bytes),
            available_bytes: available,
            usage_bytes: value(stats.memory_usage_bytes),
            rss_bytes: value(stats.memory_rss_bytes),
            page_faults: value(stats.memory_page_faults),
            major_page_faults: value(stats.memory_major_page_faults),
            psi: stats.memory_pressure.as_ref().map(psi),
        }),
        writable_layer: Some(cri::FilesystemUsage {
            timestamp: at,
            fs_id: None,
            used_bytes: value(stats.rootfs_used_bytes),
            inodes_used: value(stats.rootfs_used_inodes),
        }),
        swap: Some(cri::SwapUsage {
            timestamp: at,
            swap_available_bytes: None,
            swap_usage_bytes: value(stats.swap_usage_bytes),
        }),
        io: Some(cri::IoUsage {
            timestamp: at,
            psi: stats.io_pressure.as_ref().map(psi),
        }),
    }
}

/// The network interfaces that a guest told of, each with its name, within bounds.
pub fn interfaces(
    told: &[agent::InterfaceStats],
) -> impl Iterator<Item = (String, &agent::InterfaceStats)> {
    told.iter()
        .take(MAX_INTERFACES)
        .map(|interface| (interface.name.chars().take(16).collect(), interface))
}

fn psi(pressure: &agent::Pressure) -> cri::PsiStats {
    let data = |line: &Option<agent::PressureLine>| {
        line.as_ref().map(|line| cri::PsiData {
            total: line.total_us,
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
        })
    };
    cri::PsiStats {
        full: data(&pressure.full),
        some: data(&pressure.some),
    }
}

fn cpu(at: i64, usage: u64, last: &Mutex<Option<CpuSample>>) -> cri::CpuUsage {
    let now = CpuSample {
        at: u64::try_from(at).unwrap_or(0),
        usage,
    };
    let mut last = lock(last);
    let rate = last.and_then(|before| rate(before, now));
    // Two callers a moment apart must not shorten the interval to nothing.
    if last.is_none_or(|before| now.at.saturating_sub(before.at) >= MIN_INTERVAL) {
        *last = Some(now);
    }
    cri::CpuUsage {
        timestamp: at,
        usage_core_nano_seconds: value(usage),
        usage_nano_cores: rate.map(|value| cri::UInt64Value { value }),
        psi: None,
    }
}

/// Nanoseconds of CPU time a second.
fn rate(before: CpuSample, now: CpuSample) -> Option<u64> {
    let interval = now.at.checked_sub(before.at).filter(|i| *i > 0)?;
    let used = now.usage.checked_sub(before.usage)?;
    u64::try_from(u128::from(used) * 1_000_000_000 / u128::from(interval)).ok()
}

fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

/// A guest's time as the interface has it.
pub fn timestamp(nanoseconds: u64) -> i64 {
    i64::try_from(nanoseconds).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_use_over_time_and_never_negative() {
        let sample = |at, usage| CpuSample { at, usage };
        assert_eq!(
            rate(sample(0, 0), sample(2_000_000_000, 1_000_000_000)),
            Some(500_000_000)
        );
        assert_eq!(rate(sample(5, 5), sample(5, 9)), None);
        assert_eq!(rate(sample(5, 9), sample(6, 5)), None);
        assert_eq!(rate(sample(9, 0), sample(5, 5)), None);
    }
}
