//! The lists of pods and containers with their use, for the List calls and for the calls that stream the same lists;
//! and the stream of what happens to them.
//!
//! A streamed list comes in messages of a bounded size, so that no node has more pods than fit into one message.

use std::sync::Arc;

use caisson_proto::cri;
use tonic::Status;
use tonic::codegen::BoxStream;

use super::containers::{self, stats};
use super::events::Event;
use super::{Context, filters, pods};
use crate::store::SandboxState;

/// Entries in one message of a stream.
const CHUNK: usize = 100;

/// The pods that pass.
pub fn pods(context: &Context, filter: &cri::PodSandboxFilter) -> Vec<cri::PodSandbox> {
    let records = context.registry.pods().into_iter().map(|pod| pod.record());
    records
        .filter(|record| record.state != SandboxState::Creating && filters::pod(filter, record))
        .map(|record| pods::item(&record))
        .collect()
}

/// The containers that pass.
pub fn containers(context: &Context, filter: &cri::ContainerFilter) -> Vec<cri::Container> {
    let all = context.registry.containers();
    let records = all.iter().map(|container| container.record());
    records
        .filter(|record| containers::is_visible(record.state) && filters::container(filter, record))
        .map(|record| containers::item(&record))
        .collect()
}

/// The use of the running containers that pass.
pub async fn container_stats(
    context: &Arc<Context>,
    filter: cri::ContainerStatsFilter,
) -> Vec<cri::ContainerStats> {
    let filter = cri::ContainerFilter {
        id: filter.id,
        state: None,
        pod_sandbox_id: filter.pod_sandbox_id,
        label_selector: filter.label_selector,
    };
    stats::list(context, |container| {
        filters::container(&filter, &container.record())
    })
    .await
}

/// The use of the ready pods that pass. A pod that does not answer is left out.
pub async fn pod_stats(
    context: &Arc<Context>,
    filter: cri::PodSandboxStatsFilter,
) -> Vec<cri::PodSandboxStats> {
    let filter = cri::PodSandboxFilter {
        id: filter.id,
        state: None,
        label_selector: filter.label_selector,
    };
    let pods = context.registry.pods();
    let asked = pods
        .iter()
        .filter(|pod| pod.ready().is_ok() && filters::pod(&filter, &pod.record()))
        .map(|pod| stats::pod(context, pod));
    let answers = futures::future::join_all(asked).await;
    answers.into_iter().filter_map(Result::ok).collect()
}

/// What happens to containers and pods from now on, each with what its pod and its containers are when it is told.
/// The stream of a watcher that does not read ends with DATA_LOSS, once it is too far behind.
pub fn events(context: &Arc<Context>) -> BoxStream<cri::ContainerEventResponse> {
    let start = (context.registry.watch(), context.clone());
    let events = futures::stream::try_unfold(start, |(mut watcher, context)| async {
        match watcher.next().await {
            Ok(event) => Ok(Some((told(&context, &event), (watcher, context)))),
            Err(behind) => Err(Status::data_loss(behind.to_string())),
        }
    });
    Box::pin(events)
}

fn told(context: &Context, event: &Event) -> cri::ContainerEventResponse {
    let pod = context.registry.pod(&event.sandbox_id).ok();
    let (status, containers) = match pod {
        Some(pod) => {
            let status = pods::status(context, &pod);
            (status.status, status.containers_statuses)
        }
        None => (event.last.clone(), Vec::new()),
    };
    cri::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: event.kind as i32,
        created_at: event.at,
        pod_sandbox_status: status,
        containers_statuses: containers,
    }
}

/// A list as a stream of messages.
pub fn stream<T: Send + 'static, M: Send + 'static>(
    list: Vec<T>,
    message: fn(Vec<T>) -> M,
) -> BoxStream<M> {
    let mut rest = list.into_iter();
    let chunks = std::iter::from_fn(move || {
        let chunk: Vec<T> = rest.by_ref().take(CHUNK).collect();
        (!chunk.is_empty()).then(|| Ok::<_, Status>(message(chunk)))
    });
    Box::pin(tokio_stream::iter(chunks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt as _;

    #[tokio::test]
    async fn a_stream_has_every_entry_once_in_messages_of_a_bounded_size() {
        for count in [0, 1, CHUNK, CHUNK + 1, 7 * CHUNK + 3] {
            let list: Vec<usize> = (0..count).collect();
            let messages: Vec<_> = stream(list.clone(), |chunk| chunk).collect().await;
            let messages: Vec<_> = messages.into_iter().map(Result::unwrap).collect();
            assert!(messages.iter().all(|message| message.len() <= CHUNK));
            assert_eq!(messages.concat(), list);
        }
    }
}
