//! Calls to an agent: bounded in time, and over at once when its sandbox ends.

use std::time::Duration;

use tonic::{Response, Status};

use super::CriError;
use crate::sandbox::{Sandbox, sentence};

/// Making a container: mounts of all layers, which a slow disk delays. This and the next ones are for nodes that do too much at a
/// time; a pod that hangs is found out by its silence, in seconds. A kubelet waits for two minutes.
pub const CREATE: Duration = Duration::from_secs(100);
/// Everything that the agent answers out of its own memory.
pub const QUICK: Duration = Duration::from_secs(30);
/// Starting a process.
pub const START: Duration = Duration::from_secs(100);

/// Awaits an agent's answer.
///
/// # Errors
/// What the agent said; DEADLINE_EXCEEDED after `limit`; FAILED_PRECONDITION when the sandbox ends meanwhile; UNAVAILABLE,
/// at once, for a pod that has not answered for a while.
pub async fn call<T>(
    sandbox: &dyn Sandbox,
    what: &str,
    limit: Duration,
    request: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CriError> {
    if let Some(reason) = sandbox.health().borrow().silence() {
        return Err(CriError::unavailable(format!(
            "the agent was not asked to {what}: the pod does not answer ({reason}); stop the pod"
        )));
    }
    let (mut ended, state) = (sandbox.ended(), sandbox.ended());
    let over = |reason: String| {
        CriError::precondition(format!(
            "the agent could not {what}: the pod's sandbox has ended ({reason})"
        ))
    };
    tokio::select! {
        biased;
        answer = tokio::time::timeout(limit, request) => match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => match state.borrow().as_ref() {
                Some(reason) => Err(over(sentence(reason))),
                None => Err(CriError::from_agent(what, &status)),
            },
            Err(_) => Err(CriError::deadline(format!(
                "the agent did not {what} within {} s",
                limit.as_secs()
            ))),
        },
        reason = ended.wait_for(Option::is_some) => Err(over(
            reason.ok().and_then(|reason| reason.as_ref().map(sentence)).unwrap_or_default(),
        )),
    }
}
