//! Quiesce and Resume: the pod at a standstill, so that its machine can be written down and go on elsewhere.
//!
//! What is on its way between a container and the host would be lost with the machine's connections. So the containers are
//! frozen, what was read of their output is delivered, and no more is read: it stays in its pipe, which is in the machine's
//! memory. The files that the host shares are known by its pod process alone, and are unmounted.

use std::sync::Arc;
use std::time::Duration;

use caisson_proto::agent::ResumeRequest;

use super::blocking;
use super::container::Container;
use super::containers::with_engine;
use super::error::ServiceError;
use super::pod::Pod;
use crate::sandbox::{self, Plan};
use crate::streams::{Endpoint, Kind};
use crate::{info, warn};

/// How long a client may take for the last output before the standstill.
const DELIVERY: Duration = Duration::from_secs(10);

/// Brings the pod to a standstill. Where that is not possible it goes on.
pub async fn quiesce(pod: Arc<Pod>) -> Result<(), ServiceError> {
    let _alone = pod.standstill.lock().await;
    pod.begin_quiescence()?;
    let stopped = stop(&pod.containers()).await;
    if let Err(error) = &stopped {
        warn!("the pod goes on: {error}");
        go_on(&pod).await;
    } else {
        info!("the pod stands still");
    }
    stopped
}

async fn stop(containers: &[Arc<Container>]) -> Result<(), ServiceError> {
    for container in containers {
        if !container.running_execs().is_empty() {
            let what = "an exec runs in it: wait until it has ended";
            return Err(ServiceError::InUse(container.id.clone(), what));
        }
        let stdin = container.init.streams.get(Kind::Stdin);
        if stdin.is_ok_and(|stdin| stdin.has_client()) {
            let what = "somebody is attached to its standard input: detach";
            return Err(ServiceError::InUse(container.id.clone(), what));
        }
    }
    for container in containers {
        with_engine(container, |engine| engine.freeze(true)).await?;
    }
    for container in containers {
        for output in outputs(container) {
            output.hold(true);
            let free = tokio::time::timeout(DELIVERY, output.wait_until_free()).await;
            if free.is_err() {
                let what = "nobody takes its output: is there room for its log?";
                return Err(ServiceError::InUse(container.id.clone(), what));
            }
        }
    }
    blocking(sandbox::unmount_shared).await?.map_err(|error| {
        warn!("{error}");
        ServiceError::Sandbox(error)
    })
}

/// Lets the pod go on, with what the request says; in another machine it has another network and time first, or else stays
/// where it is.
pub async fn resume(pod: Arc<Pod>, request: ResumeRequest) -> Result<(), ServiceError> {
    let _alone = pod.standstill.lock().await;
    if !pod.is_quiescent() {
        return Err(ServiceError::NotQuiescent);
    }
    let plan = Plan::try_from(request.sandbox.unwrap_or_default())?;
    let ready = blocking(move || sandbox::go_on(&plan, request.moved)).await?;
    if request.moved {
        ready?;
        go_on(&pod).await;
    } else {
        // Its containers are not to suffer for what has failed.
        go_on(&pod).await;
        ready?;
    }
    info!("the pod goes on");
    Ok(())
}

/// What was not stopped is not changed.
async fn go_on(pod: &Pod) {
    for container in pod.containers() {
        outputs(&container).for_each(|output| output.hold(false));
        if let Err(error) = with_engine(&container, |engine| engine.freeze(false)).await {
            warn!("{error}");
        }
    }
    pod.end_quiescence();
}

fn outputs(container: &Container) -> impl Iterator<Item = &Arc<Endpoint>> {
    let streams = container.init.streams.all().iter();
    streams.filter(|end| end.kind() != Kind::Stdin)
}
