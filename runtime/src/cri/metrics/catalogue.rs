//! The catalogue of metrics: one line each.

use caisson_proto::{agent, cri};
use cri::MetricType::{self, Counter, Gauge};

use super::super::containers::stats;
use super::{Sample, Values};

/// Nanoseconds. CRI's metrics are whole numbers, so that times are whole seconds.
const SECOND: u64 = 1_000_000_000;
const SECOND_US: u64 = 1_000_000;
/// The name of the pod's writable disk in labels.
const DISK: &str = "scratch";

/// A metric: its name, what it means, and how it is read.
pub struct Family<T: ?Sized> {
    /// cAdvisor's name.
    pub name: &'static str,
    /// What it means.
    pub help: &'static str,
    /// Whether it only grows.
    pub kind: MetricType,
    /// Its own labels.
    pub labels: &'static [&'static str],
    /// Reads it.
    pub read: fn(&T) -> Values,
}

const fn family<T: ?Sized>(
    name: &'static str,
    kind: MetricType,
    help: &'static str,
    labels: &'static [&'static str],
    read: fn(&T) -> Values,
) -> Family<T> {
    Family {
        name,
        help,
        kind,
        labels,
        read,
    }
}

/// Metrics of a container.
#[rustfmt::skip]
pub static CONTAINER: &[Family<Sample>] = &[
    family("container_blkio_device_usage_total", Counter, "Bytes moved to and from a block device.", &["device", "major", "minor", "operation"], block),
    family("container_cpu_cfs_periods_total", Counter, "Elapsed enforcement periods of the CPU quota.", &[], |s| one(s.detail.cpu_periods)),
    family("container_cpu_cfs_throttled_periods_total", Counter, "Enforcement periods in which the CPU quota was used up.", &[], |s| one(s.detail.cpu_throttled_periods)),
    family("container_cpu_cfs_throttled_seconds_total", Counter, "Seconds for which the container was throttled.", &[], |s| one(s.detail.cpu_throttled_ns / SECOND)),
    family("container_cpu_system_seconds_total", Counter, "Seconds of CPU time in the guest's kernel.", &[], |s| one(s.stats.cpu_system_ns / SECOND)),
    family("container_cpu_usage_seconds_total", Counter, "Seconds of CPU time.", &["cpu"], |s| vec![(vec!["total".into()], s.stats.cpu_usage_ns / SECOND)]),
    family("container_cpu_user_seconds_total", Counter, "Seconds of CPU time in user mode.", &[], |s| one(s.stats.cpu_user_ns / SECOND)),
    family("container_file_descriptors", Gauge, "Open file descriptors.", &[], |s| one(s.detail.file_descriptors)),
    family("container_fs_inodes_free", Gauge, "Free inodes of the pod's writable disk.", &["device"], |s| disk(s.detail.fs_free_inodes)),
    family("container_fs_inodes_total", Gauge, "Inodes of the pod's writable disk.", &["device"], |s| disk(s.detail.fs_total_inodes)),
    family("container_fs_limit_bytes", Gauge, "Size of the pod's writable disk in bytes.", &["device"], |s| disk(s.detail.fs_total_bytes)),
    family("container_fs_reads_bytes_total", Counter, "Bytes read from block devices.", &["device"], |s| io(s, |io| io.read_bytes)),
    family("container_fs_reads_total", Counter, "Read requests to block devices.", &["device"], |s| io(s, |io| io.reads)),
    family("container_fs_usage_bytes", Gauge, "Bytes that the container has written to its writable layer and not removed.", &["device"], |s| disk(s.stats.rootfs_used_bytes)),
    family("container_fs_writes_bytes_total", Counter, "Bytes written to block devices.", &["device"], |s| io(s, |io| io.write_bytes)),
    family("container_fs_writes_total", Counter, "Write requests to block devices.", &["device"], |s| io(s, |io| io.writes)),
    family("container_hugetlb_usage_bytes", Gauge, "Bytes of huge pages in use.", &["pagesize"], huge),
    family("container_last_seen", Gauge, "When the container was last seen, Unix time in seconds.", &[], |s| one(s.stats.timestamp_ns / SECOND)),
    family("container_memory_cache", Gauge, "Bytes of page cache.", &[], |s| one(s.detail.memory_cache_bytes)),
    family("container_memory_failcnt", Counter, "How often the memory limit was hit.", &[], |s| one(s.detail.memory_limit_hits)),
    family("container_memory_failures_total", Counter, "Page faults.", &["failure_type", "scope"], faults),
    family("container_memory_kernel_usage", Gauge, "Bytes of the guest kernel's memory for the container.", &[], |s| one(s.detail.memory_kernel_bytes)),
    family("container_memory_mapped_file", Gauge, "Bytes of mapped files.", &[], |s| one(s.detail.memory_mapped_bytes)),
    family("container_memory_max_usage_bytes", Gauge, "The most bytes of memory ever in use.", &[], |s| one(s.detail.memory_peak_bytes)),
    family("container_memory_rss", Gauge, "Bytes of anonymous memory.", &[], |s| one(s.stats.memory_rss_bytes)),
    family("container_memory_swap", Gauge, "Bytes of swap in use.", &[], |s| one(s.stats.swap_usage_bytes)),
    family("container_memory_usage_bytes", Gauge, "Bytes of memory in use, page cache included.", &[], |s| one(s.stats.memory_usage_bytes)),
    family("container_memory_working_set_bytes", Gauge, "Bytes of memory in use less inactive page cache.", &[], |s| one(s.stats.memory_working_set_bytes)),
    family("container_oom_events_total", Counter, "Processes that the guest's kernel ended for lack of memory.", &[], |s| one(s.stats.oom_kills)),
    family("container_pressure_cpu_stalled_seconds_total", Counter, "Seconds for which all tasks of the container waited for cpu.", &[], |s| stalled(s.stats.cpu_pressure.as_ref())),
    family("container_pressure_cpu_waiting_seconds_total", Counter, "Seconds for which some task of the container waited for cpu.", &[], |s| waiting(s.stats.cpu_pressure.as_ref())),
    family("container_pressure_io_stalled_seconds_total", Counter, "Seconds for which all tasks of the container waited for io.", &[], |s| stalled(s.stats.io_pressure.as_ref())),
    family("container_pressure_io_waiting_seconds_total", Counter, "Seconds for which some task of the container waited for io.", &[], |s| waiting(s.stats.io_pressure.as_ref())),
    family("container_pressure_memory_stalled_seconds_total", Counter, "Seconds for which all tasks of the container waited for memory.", &[], |s| stalled(s.stats.memory_pressure.as_ref())),
    family("container_pressure_memory_waiting_seconds_total", Counter, "Seconds for which some task of the container waited for memory.", &[], |s| waiting(s.stats.memory_pressure.as_ref())),
    family("container_processes", Gauge, "Processes.", &[], |s| one(s.detail.processes)),
    family("container_sockets", Gauge, "Open sockets.", &[], |s| one(s.detail.sockets)),
    family("container_spec_cpu_period", Gauge, "Enforcement period of the CPU quota in microseconds.", &[], |s| one(or(s.resources.cpu_period, 100_000))),
    family("container_spec_cpu_quota", Gauge, "CPU quota in microseconds a period; absent without one.", &[], |s| positive(s.resources.cpu_quota)),
    family("container_spec_cpu_shares", Gauge, "CPU shares.", &[], |s| one(or(s.resources.cpu_shares, 1024))),
    family("container_spec_memory_limit_bytes", Gauge, "Memory limit in bytes; 0: none.", &[], |s| one(or(s.resources.memory_limit_in_bytes, 0))),
    family("container_spec_memory_reservation_limit_bytes", Gauge, "Memory that the container is left under pressure, in bytes; 0: none.", &[], |s| one(reservation(s))),
    family("container_spec_memory_swap_limit_bytes", Gauge, "Limit of memory and swap together in bytes; 0: none.", &[], |s| one(or(s.resources.memory_swap_limit_in_bytes, 0))),
    family("container_start_time_seconds", Gauge, "When the container was started, Unix time in seconds.", &[], |s| one(or(s.started_at, 0) / SECOND)),
    family("container_threads", Gauge, "Threads.", &[], |s| one(s.detail.threads)),
    family("container_threads_max", Gauge, "Limit of processes and threads; 0: none.", &[], |s| one(s.detail.threads_max)),
    family("container_ulimits_soft", Gauge, "Soft limits of the container's first process.", &["ulimit"], |s| vec![(vec!["max_open_files".into()], s.detail.open_files_soft_limit)]),
];

/// Metrics of a pod, from its network interfaces.
#[rustfmt::skip]
pub static POD: &[Family<[agent::InterfaceStats]>] = &[
    family("container_network_receive_bytes_total", Counter, "Bytes received.", &["interface"], |interfaces| each(interfaces, |i| i.rx_bytes)),
    family("container_network_receive_errors_total", Counter, "Errors while packets were received.", &["interface"], |interfaces| each(interfaces, |i| i.rx_errors)),
    family("container_network_receive_packets_dropped_total", Counter, "Packets dropped while they were received.", &["interface"], |interfaces| each(interfaces, |i| i.rx_dropped)),
    family("container_network_receive_packets_total", Counter, "Packets received.", &["interface"], |interfaces| each(interfaces, |i| i.rx_packets)),
    family("container_network_transmit_bytes_total", Counter, "Bytes sent.", &["interface"], |interfaces| each(interfaces, |i| i.tx_bytes)),
    family("container_network_transmit_errors_total", Counter, "Errors while packets were sent.", &["interface"], |interfaces| each(interfaces, |i| i.tx_errors)),
    family("container_network_transmit_packets_dropped_total", Counter, "Packets dropped while they were sent.", &["interface"], |interfaces| each(interfaces, |i| i.tx_dropped)),
    family("container_network_transmit_packets_total", Counter, "Packets sent.", &["interface"], |interfaces| each(interfaces, |i| i.tx_packets)),
];

fn one(value: u64) -> Values {
    vec![(Vec::new(), value)]
}

fn disk(value: u64) -> Values {
    vec![(vec![DISK.to_owned()], value)]
}

/// What was asked for, or what the kernel takes where nothing was.
fn or(value: i64, default: u64) -> u64 {
    u64::try_from(value)
        .ok()
        .filter(|v| *v > 0)
        .unwrap_or(default)
}

fn positive(value: i64) -> Values {
    let value = u64::try_from(value).ok().filter(|value| *value > 0);
    value.map(one).unwrap_or_default()
}

fn device(io: &agent::DeviceIo) -> String {
    format!("{}:{}", io.major, io.minor)
}

fn io(sample: &Sample, read: fn(&agent::DeviceIo) -> u64) -> Values {
    let devices = sample.detail.devices.iter();
    devices.map(|io| (vec![device(io)], read(io))).collect()
}

fn block(sample: &Sample) -> Values {
    let both = |io: &agent::DeviceIo| {
        let labels = |operation: &str| {
            let operation = operation.to_owned();
            vec![
                device(io),
                io.major.to_string(),
                io.minor.to_string(),
                operation,
            ]
        };
        [
            (labels("Read"), io.read_bytes),
            (labels("Write"), io.write_bytes),
        ]
    };
    sample.detail.devices.iter().flat_map(both).collect()
}

fn huge(sample: &Sample) -> Values {
    let sizes = sample.detail.huge_pages.iter();
    sizes
        .map(|pages| {
            (
                vec![pages.size.chars().take(16).collect()],
                pages.used_bytes,
            )
        })
        .collect()
}

fn faults(sample: &Sample) -> Values {
    let labels = |kind: &str| vec![kind.to_owned(), "container".to_owned()];
    vec![
        (labels("pgfault"), sample.stats.memory_page_faults),
        (labels("pgmajfault"), sample.stats.memory_major_page_faults),
    ]
}

fn stalled(pressure: Option<&agent::Pressure>) -> Values {
    line(pressure.and_then(|pressure| pressure.full.as_ref()))
}

fn waiting(pressure: Option<&agent::Pressure>) -> Values {
    line(pressure.and_then(|pressure| pressure.some.as_ref()))
}

fn line(line: Option<&agent::PressureLine>) -> Values {
    line.map(|line| one(line.total_us / SECOND_US))
        .unwrap_or_default()
}

/// `memory.low` or `memory.min` of cgroup v2, by which the kubelet asks for it.
fn reservation(sample: &Sample) -> u64 {
    let unified = &sample.resources.unified;
    ["memory.low", "memory.min"]
        .iter()
        .find_map(|file| unified.get(*file)?.parse().ok())
        .unwrap_or(0)
}

fn each(interfaces: &[agent::InterfaceStats], read: fn(&agent::InterfaceStats) -> u64) -> Values {
    stats::interfaces(interfaces)
        .map(|(name, interface)| (vec![name], read(interface)))
        .collect()
}
