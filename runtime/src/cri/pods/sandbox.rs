//! Which kind of sandbox a pod has.

use std::sync::Arc;
use std::time::Duration;

use super::super::{Context, CriError};
use super::identity;
use crate::config::HandlerKind;
use crate::network::Coming;
use crate::sandbox::host::Host;
use crate::sandbox::microvm::MicroVm;
use crate::sandbox::{Sandbox, SandboxError, SandboxPlan};
use crate::store::SandboxRecord;
use crate::timings::Timings;

/// Starts a sandbox of this kind, which gets its network as soon as that is there, and the machine that was started `ahead`
/// for it, if there is one.
///
/// # Errors
/// [`SandboxError::Start`] and [`SandboxError::Network`]; nothing is left then but the network.
pub async fn start(
    context: &Context,
    kind: HandlerKind,
    plan: &SandboxPlan,
    network: Coming,
    timings: Timings,
    ahead: Option<MicroVm>,
) -> Result<Arc<dyn Sandbox>, SandboxError> {
    match kind {
        HandlerKind::Host => {
            let host = Host::start(plan, &context.host, network, timings).await?;
            Ok(Arc::new(host))
        }
        HandlerKind::MicroVm => {
            let turn = match ahead {
                None => {
                    let turn = context.boots.acquire();
                    Some(timings.step("wait for a turn", turn).await)
                }
                // It runs already.
                Some(_) => None,
            };
            let vm = MicroVm::start(plan, &context.microvm, network, timings, ahead).await?;
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

/// Ends and removes all of a pod that was not finished, its network too, by what is on disk. Idempotent.
///
/// # Errors
/// The step that failed.
pub async fn take_back(context: &Context, record: &SandboxRecord) -> Result<(), CriError> {
    let sandbox = find(context, record).await?;
    sandbox.stop(Duration::ZERO).await?;
    sandbox.remove().await?;
    Ok(context.network.teardown(&identity(record)).await?)
}
