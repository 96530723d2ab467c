//! `linux.resources` of the OCI runtime spec (config-linux.md, "Control groups").

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Unsupported;

/// Limits of a container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LinuxResources {
    /// Which devices can be opened and made; the last rule that matches decides.
    pub devices: Vec<DeviceRule>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Processor time.
    pub cpu: Option<Cpu>,
    /// Number of processes.
    pub pids: Option<Pids>,
    /// Block devices.
    #[serde(rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    /// Huge pages.
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Not supported: cgroup v2 has no network classes.
    pub network: Unsupported,
    /// Not supported.
    pub rdma: Unsupported,
    /// Files of cgroup v2 and what to write to them, after everything else.
    pub unified: BTreeMap<String, String>,
}

/// One of `linux.resources.devices`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceRule {
    /// Allow or deny.
    pub allow: bool,
    /// `a` (or empty), `c` or `b`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Major number; none or -1: all.
    pub major: Option<i64>,
    /// Minor number; none or -1: all.
    pub minor: Option<i64>,
    /// Any of `r`, `w` and `m`; empty: all.
    pub access: String,
}

/// Memory limits in bytes; -1 is no limit.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Memory {
    /// Hard limit.
    pub limit: Option<i64>,
    /// Soft limit; becomes `memory.low`.
    pub reservation: Option<i64>,
    /// Limit of memory and swap together.
    pub swap: Option<i64>,
    /// Not supported: cgroup v2 accounts it to the memory.
    pub kernel: Unsupported,
    /// Not supported: cgroup v2 accounts it to the memory.
    #[serde(rename = "kernelTCP")]
    pub kernel_tcp: Unsupported,
    /// Not supported: cgroup v2 has none.
    pub swappiness: Unsupported,
    /// Not supported: cgroup v2 has none.
    #[serde(rename = "disableOOMKiller")]
    pub disable_oom_killer: Unsupported,
    /// Always so in cgroup v2, either value is accepted.
    pub use_hierarchy: Option<bool>,
    /// Refuse a limit below what is used now.
    pub check_before_update: Option<bool>,
}

/// Processor limits.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Cpu {
    /// Relative weight in the scale of cgroup v1, 2 to 262144; 0: unchanged.
    pub shares: Option<u64>,
    /// Microseconds in each period; -1: no limit.
    pub quota: Option<i64>,
    /// Microseconds saved up for bursts.
    pub burst: Option<u64>,
    /// Period in microseconds; none: 100000.
    pub period: Option<u64>,
    /// Not supported: cgroup v2 has none.
    pub realtime_runtime: Unsupported,
    /// Not supported: cgroup v2 has none.
    pub realtime_period: Unsupported,
    /// Processors, as a list of ranges.
    pub cpus: String,
    /// Memory nodes, as a list of ranges.
    pub mems: String,
    /// 1: run only when nothing else wants to.
    pub idle: Option<i64>,
}

/// Process count limit.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pids {
    /// How many; 0 or below: no limit.
    pub limit: Option<i64>,
}

/// Block device limits.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct BlockIo {
    /// Relative weight in the scale of cgroup v1, 10 to 1000; 0: unchanged.
    pub weight: Option<u16>,
    /// Not supported: cgroup v2 has none.
    pub leaf_weight: Unsupported,
    /// Weights of devices.
    pub weight_device: Vec<WeightDevice>,
    /// Bytes read a second.
    pub throttle_read_bps_device: Vec<ThrottleDevice>,
    /// Bytes written a second.
    pub throttle_write_bps_device: Vec<ThrottleDevice>,
    /// Reads a second.
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Vec<ThrottleDevice>,
    /// Writes a second.
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Vec<ThrottleDevice>,
}

/// Weight of one block device.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct WeightDevice {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Weight, 10 to 1000.
    pub weight: Option<u16>,
    /// Not supported: cgroup v2 has none.
    pub leaf_weight: Unsupported,
}

/// Rate of one block device.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThrottleDevice {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The rate; 0: no limit.
    pub rate: u64,
}

/// Limit of huge pages of one size.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HugepageLimit {
    /// Size as the kernel writes it, such as `2MB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}
