//! UpdatePodSandboxResources.

use caisson_proto::cri;

use super::super::registry::Pod;
use super::super::{Context, CriError, spec};
use super::size;
use crate::config::HandlerKind;

/// Checks that a pod's machine holds its new limits: one that runs has the CPUs and the memory that it was booted
/// with. There is nothing else to do: the kubelet changes the pod's cgroup on the host, and the containers' own limits
/// change by UpdateContainerResources.
///
/// # Errors
/// FAILED_PRECONDITION for a pod that is not ready; OUT_OF_RANGE with both sizes if the machine would have to grow.
pub fn resize(
    context: &Context,
    pod: &Pod,
    overhead: Option<cri::LinuxContainerResources>,
    resources: Option<cri::LinuxContainerResources>,
) -> Result<(), CriError> {
    pod.ready()?;
    // On the host there is no machine.
    let record = pod.record();
    if record.kind == HandlerKind::Host {
        return Ok(());
    }
    let config = &context.config.microvm;
    let mut wanted = record.config.0.clone();
    let (vcpus, memory) = size::machine(&wanted, config);
    let linux = wanted.linux.get_or_insert_default();
    for (kept, new) in [
        (&mut linux.overhead, overhead),
        (&mut linux.resources, resources),
    ] {
        if let Some(new) = new {
            *kept = Some(spec::merge(&kept.clone().unwrap_or_default(), &new));
        }
    }
    let (more_vcpus, more_memory) = size::machine(&wanted, config);
    if more_vcpus > vcpus || more_memory > memory {
        return Err(CriError::new(
            tonic::Code::OutOfRange,
            format!(
                "the machine of pod {} has {vcpus} CPUs and {memory} MiB and cannot grow to {more_vcpus} CPUs and \
                 {more_memory} MiB while it runs; make the pod anew with the larger limits",
                pod.id
            ),
        ));
    }
    Ok(())
}
