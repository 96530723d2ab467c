//! Stats: read by a few blocking workers, so that a slow cgroup holds up its own reading only.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use caisson_proto::agent::{
    ContainerDetail, ContainerStats, DeviceIo, HugePages, InterfaceStats, Pressure, PressureLine,
    SandboxStats, StatsResponse,
};
use tokio::sync::mpsc;

use super::blocking;
use super::container::{Container, lock};
use super::error::ServiceError;
use super::pod::Pod;
use crate::reaper::unix_time_ns;
use crate::sandbox::namespaces;
use crate::{engine, paths, warn};

/// How long all readings may take before the answer leaves out those that are missing.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How many containers are read at the same time. One that hangs holds up no other.
const WORKERS: usize = 4;

/// Reads the resource use of the containers named, or of all; in every detail if that is asked for.
pub async fn read(
    pod: &Pod,
    ids: Vec<String>,
    detail: bool,
) -> Result<StatsResponse, ServiceError> {
    let containers = if ids.is_empty() {
        pod.containers()
    } else {
        let named: BTreeMap<_, _> = ids.into_iter().map(|id| (id, ())).collect();
        named
            .into_keys()
            .map(|id| pod.container(&id))
            .collect::<Result<_, _>>()?
    };
    Ok(StatsResponse {
        containers: read_all(containers, detail).await,
        sandbox: Some(blocking(sandbox_stats).await?),
    })
}

/// Reads containers by a few workers, so that many containers don't need as many threads. Those that are going away, or
/// are not read in time, are left out.
async fn read_all(containers: Vec<Arc<Container>>, detail: bool) -> Vec<ContainerStats> {
    let count = containers.len();
    let queue = Arc::new(Mutex::new(containers.into_iter()));
    let (sender, mut readings) = mpsc::unbounded_channel();
    for _ in 0..WORKERS.min(count) {
        let (queue, sender) = (queue.clone(), sender.clone());
        tokio::task::spawn_blocking(move || {
            loop {
                let next = lock(&queue).next();
                let Some(container) = next else { return };
                // Nobody listens any more to one that was slow.
                let _ = sender.send(read_one(&container, detail));
            }
        });
    }
    drop(sender);
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    let mut all = Vec::with_capacity(count);
    loop {
        match tokio::time::timeout_at(deadline, readings.recv()).await {
            Ok(Some(reading)) => all.extend(reading),
            Ok(None) => return all,
            Err(_) => {
                let (read, limit) = (all.len(), TIMEOUT.as_secs());
                warn!("statistics: {read} of {count} containers were read within {limit} s");
                return all;
            }
        }
    }
}

/// One container's statistics; `None` if it is going away, or an earlier reading still hangs.
fn read_one(container: &Container, detail: bool) -> Option<ContainerStats> {
    // A reading that hangs must not be followed by more of them until no thread is left.
    if container.stats_running.swap(true, Ordering::Relaxed) {
        return None;
    }
    let engine = &container.engine;
    let read = || {
        let detail = detail.then(|| engine.detail()).transpose()?;
        Ok::<_, engine::EngineError>((engine.stats()?, detail))
    };
    let reading = read();
    container.stats_running.store(false, Ordering::Relaxed);
    match reading {
        Ok((stats, detail)) => Some(ContainerStats {
            detail: detail.map(detail_message),
            ..to_message(container.id.clone(), &stats)
        }),
        Err(error) => {
            warn!("statistics of container {}: {error}", container.id);
            None
        }
    }
}

fn to_message(container_id: String, stats: &engine::Stats) -> ContainerStats {
    ContainerStats {
        container_id,
        timestamp_ns: stats.timestamp_ns,
        cpu_usage_ns: stats.cpu_usage_ns,
        cpu_user_ns: stats.cpu_user_ns,
        cpu_system_ns: stats.cpu_system_ns,
        memory_usage_bytes: stats.memory_usage_bytes,
        memory_limit_bytes: stats.memory_limit_bytes,
        memory_working_set_bytes: stats.memory_working_set_bytes,
        memory_rss_bytes: stats.memory_rss_bytes,
        memory_page_faults: stats.memory_page_faults,
        memory_major_page_faults: stats.memory_major_page_faults,
        swap_usage_bytes: stats.swap_usage_bytes,
        pids: stats.pids,
        rootfs_used_bytes: stats.rootfs_used_bytes,
        rootfs_used_inodes: stats.rootfs_used_inodes,
        oom_kills: stats.oom_kills,
        cpu_pressure: stats.pressure[0].map(pressure),
        memory_pressure: stats.pressure[1].map(pressure),
        io_pressure: stats.pressure[2].map(pressure),
        detail: None,
    }
}

fn pressure(pressure: engine::Pressure) -> Pressure {
    let line = |line: engine::PressureLine| {
        let [avg10, avg60, avg300] = line.averages;
        Some(PressureLine {
            total_us: line.total_us,
            avg10,
            avg60,
            avg300,
        })
    };
    Pressure {
        some: line(pressure.some),
        full: line(pressure.full),
    }
}

fn detail_message(detail: engine::Detail) -> ContainerDetail {
    let device = |io: engine::DeviceIo| DeviceIo {
        major: io.device.0,
        minor: io.device.1,
        read_bytes: io.bytes.0,
        write_bytes: io.bytes.1,
        reads: io.requests.0,
        writes: io.requests.1,
    };
    let huge_pages = |pages: engine::HugePages| HugePages {
        size: pages.size,
        used_bytes: pages.used,
        limit_hits: pages.limit_hits,
    };
    ContainerDetail {
        cpu_periods: detail.cpu_periods,
        cpu_throttled_periods: detail.cpu_throttled_periods,
        cpu_throttled_ns: detail.cpu_throttled_ns,
        memory_cache_bytes: detail.memory_cache,
        memory_kernel_bytes: detail.memory_kernel,
        memory_mapped_bytes: detail.memory_mapped,
        memory_peak_bytes: detail.memory_peak,
        memory_limit_hits: detail.memory_limit_hits,
        processes: detail.processes,
        threads: detail.threads,
        threads_max: detail.threads_max,
        file_descriptors: detail.file_descriptors,
        sockets: detail.sockets,
        open_files_soft_limit: detail.open_files_soft_limit,
        fs_total_bytes: detail.fs_total,
        fs_total_inodes: detail.fs_inodes,
        fs_free_inodes: detail.fs_free_inodes,
        devices: detail.devices.into_iter().map(device).collect(),
        huge_pages: detail.huge_pages.into_iter().map(huge_pages).collect(),
    }
}

/// What the whole guest uses; on a host, what the pod's cgroup does.
fn sandbox_stats() -> SandboxStats {
    let group = |file: &str| fs::read_to_string(format!("{}/{file}", paths::CGROUP));
    let cpu = group("cpu.stat").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name| field(&meminfo, name).unwrap_or(0).saturating_mul(1024);
    let memory = match group("memory.current") {
        // The root of all cgroups, as in a guest, has no such file.
        Err(_) => (kib("MemTotal:"), kib("MemAvailable:")),
        Ok(current) => {
            let stat = group("memory.stat").unwrap_or_default();
            let limit = group("memory.max").unwrap_or_default();
            let total = limit.trim().parse().unwrap_or_else(|_| kib("MemTotal:"));
            let current: u64 = current.trim().parse().unwrap_or(0);
            let used = current.saturating_sub(field(&stat, "inactive_file").unwrap_or(0));
            (total, total.saturating_sub(used))
        }
    };
    // Of the thread, which is not in the agent's network namespace if the pod has one of its own.
    let network = namespaces::inside(|| fs::read_to_string("/proc/thread-self/net/dev"))
        .flatten()
        .unwrap_or_default();
    SandboxStats {
        timestamp_ns: u64::try_from(unix_time_ns()).unwrap_or(0),
        cpu_usage_ns: field(&cpu, "usage_usec").unwrap_or(0).saturating_mul(1000),
        memory_total_bytes: memory.0,
        memory_available_bytes: memory.1,
        processes: group("pids.current")
            .ok()
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or_else(processes),
        interfaces: network.lines().filter_map(interface).collect(),
    }
}

/// The number behind a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok())?
    })
}

fn processes() -> u64 {
    let Ok(entries) = fs::read_dir("/proc") else {
        return 0;
    };
    let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    let names = entries.flatten().map(|entry| entry.file_name());
    names
        .filter(|name| name.to_str().is_some_and(is_process))
        .count() as u64
}

/// A line of `/proc/net/dev`, but for the loopback.
fn interface(line: &str) -> Option<InterfaceStats> {
    let (name, counters) = line.split_once(':')?;
    let name = name.trim();
    if name == "lo" {
        return None;
    }
    let counters: Vec<u64> = counters
        .split_ascii_whitespace()
        .map(|counter| counter.parse().unwrap_or(0))
        .collect();
    Some(InterfaceStats {
        name: name.into(),
        rx_bytes: *counters.first()?,
        rx_packets: *counters.get(1)?,
        rx_errors: *counters.get(2)?,
        rx_dropped: *counters.get(3)?,
        tx_bytes: *counters.get(8)?,
        tx_packets: *counters.get(9)?,
        tx_errors: *counters.get(10)?,
        tx_dropped: *counters.get(11)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_tables() {
        assert_eq!(
            field("usage_usec 12\nuser_usec 3\n", "usage_usec"),
            Some(12)
        );
        assert_eq!(field("MemTotal:        1024 kB\n", "MemTotal:"), Some(1024));
        assert_eq!(field("nothing", "MemTotal:"), None);
        let line = "  eth0: 100 2 3 0 0 0 0 0 200 5 6 0 0 0 0 0";
        let eth0 = interface(line).unwrap();
        assert_eq!(
            (eth0.rx_bytes, eth0.rx_errors, eth0.tx_bytes, eth0.tx_errors),
            (100, 3, 200, 6)
        );
        assert_eq!(interface("    lo: 1 2 3 0 0 0 0 0 2 5 6 0 0 0 0 0"), None);
        assert_eq!(interface("Inter-|   Receive"), None);
    }
}
