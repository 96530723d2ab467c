//! How large a pod's machine is.

use caisson_proto::cri;

use super::super::CriError;
use super::{scratch, wants_network};
use crate::config::MicroVmConfig;
// Of the overhead that a RuntimeClass names: both count against the same limit of the pod's cgroup.
use crate::sandbox::SandboxPlan;
use crate::sandbox::microvm::{PROCESS_MIB, Shape};

const MAX_VCPUS: u64 = 32;
const MAX_MEMORY_MIB: u64 = 1 << 20;
const MIB: u64 = 1 << 20;

/// What of a microVM pod's plan follows from its configuration alone: how large its machine is.
///
/// # Errors
/// INVALID_ARGUMENT for an annotation that cannot be honoured.
pub fn plan(
    config: &cri::PodSandboxConfig,
    defaults: &MicroVmConfig,
) -> Result<SandboxPlan, CriError> {
    let (vcpus, memory_mib) = machine(config, defaults);
    Ok(SandboxPlan {
        vcpus,
        memory_mib,
        scratch: scratch::of(config, defaults, memory_mib)?,
        ..SandboxPlan::default()
    })
}

/// The shape of a pod's machine.
///
/// # Errors
/// INVALID_ARGUMENT for an annotation that cannot be honoured.
pub fn shape(config: &cri::PodSandboxConfig, defaults: &MicroVmConfig) -> Result<Shape, CriError> {
    Ok(Shape {
        network: wants_network(config)?,
        ..Shape::of(&plan(config, defaults)?)
    })
}

/// The plan of a pod without limits and annotations.
///
/// # Errors
/// See [`plan`].
pub fn usual_plan(defaults: &MicroVmConfig) -> Result<SandboxPlan, CriError> {
    plan(&cri::PodSandboxConfig::default(), defaults)
}

/// The shape of a pod without limits and annotations, which has a network.
///
/// # Errors
/// See [`shape`].
pub fn usual_shape(defaults: &MicroVmConfig) -> Result<Shape, CriError> {
    shape(&cri::PodSandboxConfig::default(), defaults)
}

/// Virtual CPUs and MiB of memory for a pod: its limits, or the configured size where it has none. The guest's own
/// needs come on top of a limit, so that the pod can use all that it was promised.
pub fn machine(config: &cri::PodSandboxConfig, defaults: &MicroVmConfig) -> (u8, u32) {
    let linux = config.linux.clone().unwrap_or_default();
    let resources = linux.resources.unwrap_or_default();
    let overhead = linux.overhead.unwrap_or_default();

    let vcpus = match (
        u64::try_from(resources.cpu_quota).unwrap_or(0),
        u64::try_from(resources.cpu_period).unwrap_or(0),
    ) {
        (0, _) => u64::from(defaults.vcpus),
        (quota, 0) => quota.div_ceil(100_000),
        (quota, period) => quota.div_ceil(period),
    };
    let memory = match u64::try_from(resources.memory_limit_in_bytes).unwrap_or(0) {
        0 => u64::from(defaults.memory_mib),
        limit => {
            let named = u64::try_from(overhead.memory_limit_in_bytes)
                .unwrap_or(0)
                .div_ceil(MIB)
                .saturating_sub(PROCESS_MIB);
            limit
                .div_ceil(MIB)
                .saturating_add(named.max(u64::from(defaults.overhead_mib)))
        }
    };
    (
        u8::try_from(vcpus.clamp(1, MAX_VCPUS)).unwrap_or(1),
        u32::try_from(memory.clamp(64, MAX_MEMORY_MIB)).unwrap_or(64),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(quota: i64, period: i64, memory: i64) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: Some(cri::LinuxContainerResources {
                    cpu_quota: quota,
                    cpu_period: period,
                    memory_limit_in_bytes: memory,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    // must-test: the VMM killed by its own memory limit, because overhead was not accounted for
    #[test]
    fn a_limit_is_what_the_pod_can_use() {
        let defaults = MicroVmConfig::default();
        assert_eq!(
            machine(&cri::PodSandboxConfig::default(), &defaults),
            (2, 512)
        );
        assert_eq!(machine(&pod(150_000, 100_000, 0), &defaults), (2, 512));
        assert_eq!(
            machine(&pod(50_000, 100_000, 256 << 20), &defaults),
            (1, 384)
        );
        for (overhead, memory) in [(160, 384), (512, 736), (0, 384)] {
            let mut config = pod(0, 0, 256 << 20);
            config.linux.as_mut().unwrap().overhead = Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: overhead << 20,
                ..Default::default()
            });
            assert_eq!(machine(&config, &defaults), (2, memory));
        }
        assert_eq!(machine(&pod(-1, 100_000, -5), &defaults), (2, 512));
        assert_eq!(
            machine(&pod(i64::MAX, 1, i64::MAX), &defaults),
            (32, 1 << 20)
        );
    }
}
