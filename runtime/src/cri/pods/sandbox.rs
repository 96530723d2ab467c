//! Which kind of sandbox a pod has.

use std::sync::Arc;

use super::super::Context;
use crate::config::HandlerKind;
use crate::network::Coming;
use crate::sandbox::host::Host;
use crate::sandbox::microvm::MicroVm;
use crate::sandbox::{Sandbox, SandboxError, SandboxPlan};
use crate::store::SandboxRecord;
use crate::timings::Timings;

/// Starts a sandbox of this kind, which gets its network as soon as that is there.
///
/// # Errors
/// [`SandboxError::Start`] and [`SandboxError::Network`]; nothing is left then but the network.
pub async fn start(
    context: &Context,
    kind: HandlerKind,
    plan: &SandboxPlan,
    network: Coming,
    timings: Timings,
) -> Result<Arc<dyn Sandbox>, SandboxError> {
    match kind {
        HandlerKind::Host => {
            let host = Host::start(plan, &context.host, network, timings).await?;
            Ok(Arc::new(host))
        }
        HandlerKind::MicroVm => {
            let turn = timings
                .step("wait for a turn", context.boots.acquire())
                .await;
            let vm = MicroVm::start(plan, &context.microvm, network, timings).await?;
            drop(turn);
            Ok(Arc::new(vm))
        }
    }
}

/// Finds the sandbox of a pod that an earlier daemon, or an attempt that failed, has made.
///
/// # Errors
/// [`SandboxError::Start`] where the configured directories cannot hold a pod.
pub async fn find(
    context: &Context,
    record: &SandboxRecord,
) -> Result<Arc<dyn Sandbox>, SandboxError> {
    Ok(match record.kind {
        HandlerKind::Host => Arc::new(Host::recover(&record.id, &context.host).await?),
        HandlerKind::MicroVm => Arc::new(MicroVm::recover(&record.id, &context.microvm).await?),
    })
}
