//! The end of the pod.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::reboot::{RebootMode, reboot};

use super::blocking;
use super::containers;
use super::pod::{Ending, Pod};
use crate::{info, sandbox, warn};

/// The grace that a `SHUTDOWN` on the stream port gives.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(5);
/// How long containers may take to go away after SIGKILL.
const REMOVAL: Duration = Duration::from_secs(10);
/// Lets the last answer leave the guest.
const FLUSH: Duration = Duration::from_millis(50);

/// Ends every container in order and syncs. [`end`] is what follows.
pub async fn shut_down(pod: &Arc<Pod>, grace: Duration) {
    let all = pod.containers();
    info!("shutting down, {} containers", all.len());
    for container in &all {
        if container.init.exit().is_none() {
            pod.reaper.signal(container.init.pid, libc::SIGTERM);
        }
    }
    let exits = futures::future::join_all(all.iter().map(|container| container.init.wait()));
    if !all.is_empty() && tokio::time::timeout(grace, exits).await.is_err() {
        info!("the grace of {} ms is over", grace.as_millis());
    }
    let ids = all.iter().map(|container| container.id.clone());
    // A task each: a removal goes on when this gives up waiting.
    let removals = ids.map(|id| tokio::spawn(containers::remove(pod.clone(), id)));
    let removals = futures::future::join_all(removals);
    if tokio::time::timeout(REMOVAL, removals).await.is_err() {
        warn!("containers are left that do not go away");
    }
    let power_off = pod.ending == Ending::PowerOff;
    let _ = blocking(move || {
        sandbox::tear_down();
        if power_off {
            nix::unistd::sync();
        }
    })
    .await;
}

/// Ends the guest, or this process.
pub async fn end(pod: &Pod) {
    tokio::time::sleep(FLUSH).await;
    match pod.ending {
        Ending::PowerOff => {
            info!("powering off");
            let Err(error) = reboot(RebootMode::RB_POWER_OFF);
            crate::error!("power off: {error}");
        }
        Ending::Exit => pod.ended.notify_one(),
    }
}

/// The whole end, for whoever awaits no answer. Only the first call does anything.
pub async fn run(pod: &Arc<Pod>, grace: Duration) {
    if pod.begin_shutdown() {
        shut_down(pod, grace).await;
        end(pod).await;
    }
}
