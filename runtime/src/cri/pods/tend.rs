//! What a daemon that starts does for the networks of the pods that it has found.

use std::sync::Arc;

use super::super::Context;
use super::super::registry::Pod;
use super::identity;
use crate::network::Known;
use crate::store::SandboxState;

/// Releases the networks of pods that are gone, and checks those of the pods that run. Goes on behind the caller; what
/// fails is logged, and the pod shows it as its reason: a pod is not ended because a plugin doubts its network.
pub fn tend_networks(context: &Arc<Context>) {
    let context = context.clone();
    tokio::spawn(async move {
        let known = || context.registry.pods().iter().map(known).collect();
        if let Err(error) = context.network.collect(known).await {
            tracing::warn!(%error, "networks of pods that are gone were not released");
        }
        let pods = context.registry.pods();
        futures::future::join_all(pods.iter().map(|pod| check(&context, pod))).await;
    });
}

fn known(pod: &Arc<Pod>) -> Known {
    Known {
        id: pod.id.clone(),
        attached: pod.record().network.is_some(),
    }
}

async fn check(context: &Context, pod: &Arc<Pod>) {
    // Nobody takes the network down meanwhile.
    let _in_use = pod.lifecycle.read().await;
    let record = pod.record();
    if record.state != SandboxState::Ready || record.network.is_none() {
        return;
    }
    let reason = match context.network.check(&identity(&record)).await {
        Ok(()) => String::new(),
        Err(error) => {
            tracing::warn!(pod = pod.id, %error, "the pod's network is not as it was made");
            error.to_string()
        }
    };
    pod.change(|record| {
        if record.state == SandboxState::Ready {
            record.reason = reason;
        }
    });
}
