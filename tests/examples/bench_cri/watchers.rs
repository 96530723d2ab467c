//! Many watchers of events while containers come and go.

use std::path::Path;
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::runtime::Result;
use cri::ContainerEventType as Kind;
use cri::runtime_service_client::RuntimeServiceClient;
use futures::{StreamExt, TryStreamExt};
use tokio::task::JoinSet;

use crate::peer::Peer;

/// Containers that are made, started, stopped and removed meanwhile.
const CONTAINERS: usize = 20;
/// How long a watcher waits for the next event.
const PATIENCE: Duration = Duration::from_secs(120);

/// Counts what each watcher sees of containers that come and go: four events of each.
///
/// # Errors
/// The call that failed.
pub async fn watch(peer: &Peer, socket: &Path, count: usize) -> Result<()> {
    let (pod, config) = &peer.pods[peer.pods.len() - 1];
    // The end, which every watcher sees last.
    let (over, _) = tokio::sync::watch::channel(String::new());
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        // Each with a connection of its own, as clients have.
        let mut client = RuntimeServiceClient::new(caisson_tests::dial(socket, None));
        let events = client.get_container_events(cri::GetEventsRequest {}).await;
        let mut events = events?.into_inner();
        let last = over.subscribe();
        tasks.spawn(async move {
            let mut seen = Vec::new();
            while let Ok(Ok(Some(event))) = tokio::time::timeout(PATIENCE, events.message()).await {
                let deleted = event.container_event_type() == Kind::ContainerDeletedEvent;
                let end = deleted && event.container_id == *last.borrow();
                seen.push((event.container_event_type(), event.container_id));
                if end {
                    break;
                }
            }
            seen
        });
    }
    let began = Instant::now();
    let containers = futures::stream::iter(0..CONTAINERS).map(|number| async move {
        let id = peer.create(pod, config, &format!("seen{number}")).await?;
        peer.start(&id).await?;
        peer.remove(&id).await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(id)
    });
    let mut ids: Vec<_> = containers.buffer_unordered(4).try_collect().await?;
    let last = peer.create(pod, config, "last").await?;
    over.send_replace(last.clone());
    peer.start(&last).await?;
    peer.remove(&last).await?;
    ids.push(last);

    let kinds = [
        Kind::ContainerCreatedEvent,
        Kind::ContainerStartedEvent,
        Kind::ContainerStoppedEvent,
        Kind::ContainerDeletedEvent,
    ];
    let (mut complete, mut missed) = (0, 0);
    for seen in tasks.join_all().await {
        let expected = ids
            .iter()
            .flat_map(|id| kinds.map(|kind| (kind, id.clone())));
        let missing = expected.filter(|event| !seen.contains(event)).count();
        missed += missing;
        complete += usize::from(missing == 0 && seen.len() == ids.len() * kinds.len());
    }
    let met = if complete == count { "met" } else { "not met" };
    println!(
        "- {}: {complete} of {count} watchers saw each of {} events once, {missed} events were missed, in {:.1} s: {met}",
        peer.name,
        ids.len() * kinds.len(),
        began.elapsed().as_secs_f64()
    );
    Ok(())
}
