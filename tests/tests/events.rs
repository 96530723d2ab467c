//! Events of containers and pods, as kubelets watch them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::{Node, Pod, dial};
use cri::ContainerEventType as Kind;
use cri::runtime_service_client::RuntimeServiceClient;
use tokio::task::JoinSet;
use tonic::Streaming;
use tonic::transport::Channel;

const WATCHERS: usize = 200;
const CONTAINERS: usize = 12;

/// What happened, to what, and when.
type Seen = (Kind, String, i64);

async fn watch(channel: Channel) -> Streaming<cri::ContainerEventResponse> {
    let mut runtime = RuntimeServiceClient::new(channel);
    let events = runtime.get_container_events(cri::GetEventsRequest {}).await;
    events.expect("GetContainerEvents").into_inner()
}

async fn told(node: &Node, pod: &Pod) -> cri::PodSandboxStatusResponse {
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    let answer = node.runtime.clone().pod_sandbox_status(request).await;
    answer.expect("PodSandboxStatus").into_inner()
}

/// Everything until a pod was deleted. Each event is checked against the state that it carries.
async fn all(mut events: Streaming<cri::ContainerEventResponse>, pod: &str) -> Vec<Seen> {
    let mut seen: Vec<Seen> = Vec::new();
    loop {
        let event = tokio::time::timeout(Duration::from_secs(120), events.message());
        let event = event.await.expect("an event in time");
        let event = event.expect("no error").expect("no end");
        let (kind, id) = (event.container_event_type(), event.container_id.clone());
        let last = seen.last().map_or(0, |last| last.2);
        assert!(event.created_at >= last, "the order of time");
        seen.push((kind, id.clone(), event.created_at));
        check(&event);
        if kind == Kind::ContainerDeletedEvent && id == pod {
            // By this a kubelet knows whose sandbox it was.
            let status = event.pod_sandbox_status.expect("the last status");
            assert_eq!(
                status.metadata.as_ref().expect("metadata").uid,
                "uid-events"
            );
            assert_eq!(status.state(), cri::PodSandboxState::SandboxNotready);
            return seen;
        }
    }
}

/// A state is what it is when the event is told, so it can be further than the event, and never behind.
fn check(event: &cri::ContainerEventResponse) {
    use cri::ContainerState as State;
    let Some(pod) = &event.pod_sandbox_status else {
        return; // the pod was removed meanwhile
    };
    if pod.id == event.container_id {
        return;
    }
    let statuses = &event.containers_statuses;
    let found = statuses
        .iter()
        .find(|status| status.id == event.container_id);
    let state = found.map(cri::ContainerStatus::state);
    let possible: &[_] = match event.container_event_type() {
        Kind::ContainerCreatedEvent => &[
            None,
            Some(State::ContainerCreated),
            Some(State::ContainerRunning),
            Some(State::ContainerExited),
        ],
        Kind::ContainerStartedEvent => &[
            None,
            Some(State::ContainerRunning),
            Some(State::ContainerExited),
        ],
        Kind::ContainerStoppedEvent => &[None, Some(State::ContainerExited)],
        Kind::ContainerDeletedEvent => &[None],
    };
    assert!(possible.contains(&state), "{event:?}");
}

// must-test: one that does not read holds back nobody
#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_watchers_miss_nothing() {
    let Some(node) = Node::start().await else {
        return;
    };
    let memory = node.daemon_memory();
    let mut watchers = Vec::new();
    for _ in 0..WATCHERS {
        watchers.push(watch(node.channel.clone()).await);
    }
    // One reads only when all is over, and takes next to nothing before.
    let late = watch(dial(&node.socket(), Some(4096))).await;
    let pod = node.pod("events").await;
    let answer = told(&node, &pod).await;
    assert!(answer.timestamp > 0, "a watcher is told the containers");
    let mut tasks = JoinSet::new();
    for events in watchers {
        let id = pod.id.clone();
        tasks.spawn(async move { all(events, &id).await });
    }
    let mut expected = BTreeSet::new();
    for number in 0..CONTAINERS {
        let name = format!("c{number}");
        let container = node.run(&pod, &name, "exit 3").await;
        // The first are removed by themselves, the others with their pod.
        if number < CONTAINERS / 2 {
            node.ended(&container).await;
            let request = cri::RemoveContainerRequest {
                container_id: container.id.clone(),
            };
            let removed = node.runtime.clone().remove_container(request).await;
            removed.expect("RemoveContainer");
        }
        expected.insert(container.id);
    }
    let answer = told(&node, &pod).await;
    assert_eq!(answer.containers_statuses.len(), CONTAINERS / 2);
    node.remove(&pod).await;
    expected.insert(pod.id.clone());

    let first = all(late, &pod.id).await;
    while let Some(seen) = tasks.join_next().await {
        assert_eq!(seen.expect("a watcher"), first);
    }
    for id in &expected {
        let of = first.iter().filter(|(_, of, _)| of == id);
        let kinds: Vec<_> = of.map(|(kind, ..)| *kind).collect();
        let whole = [
            Kind::ContainerCreatedEvent,
            Kind::ContainerStartedEvent,
            Kind::ContainerStoppedEvent,
            Kind::ContainerDeletedEvent,
        ];
        assert_eq!(kinds, whole, "{id}");
    }
    assert_eq!(first.len(), expected.len() * 4);
    let after = node.daemon_memory();
    // Nobody watches any more: a kubelet is to ask for each container.
    let pod = node.pod("unwatched").await;
    let container = node.run(&pod, "c", "exit 0").await;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = told(&node, &pod).await;
        if (answer.timestamp, answer.containers_statuses.len()) == (0, 0) {
            break;
        }
        assert!(Instant::now() < deadline, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    node.ended(&container).await;
    node.remove(&pod).await;
    println!("daemon: {memory} bytes before, {after} with {WATCHERS} watchers");
    node.assert_nothing_left().await;
}
