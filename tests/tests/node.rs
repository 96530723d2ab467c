//! The node as a whole: many pods, a daemon that is killed, the network.

use caisson_proto::cri;
use caisson_tests::{Node, PodOptions, read_log};
use tokio::task::JoinSet;

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

#[tokio::test(flavor = "multi_thread")]
async fn twenty_pods_at_once_run_and_leave_nothing() {
    let Some(node) = Node::start().await else {
        return;
    };
    let node = std::sync::Arc::new(node);
    let mut starting = JoinSet::new();
    for n in 0..20 {
        let node = node.clone();
        starting.spawn(async move {
            let pod = node.pod(&format!("many{n}")).await;
            let container = node.run(&pod, "c", &format!("echo pod {n}; {SLEEP}")).await;
            (n, pod, container)
        });
    }
    let pods = starting.join_all().await;
    let mut ips = std::collections::HashSet::new();
    for (n, pod, container) in &pods {
        assert_eq!(node.says(container, "hostname").await, format!("many{n}"));
        let log = read_log(&container.log);
        assert_eq!(log[0].content, format!("pod {n}").into_bytes());
        let ip = node.pod_status(pod).await.unwrap().network.unwrap().ip;
        assert!(ips.insert(ip.clone()), "{ip} is given twice");
    }
    let mut ending = JoinSet::new();
    for (_, pod, _) in pods {
        let node = node.clone();
        ending.spawn(async move { node.remove(&pod).await });
    }
    ending.join_all().await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_have_a_network() {
    let Some(node) = Node::start().await else {
        return;
    };
    let a = node.pod("net-a").await;
    let b = node.pod("net-b").await;
    let ip_a = node.pod_status(&a).await.unwrap().network.unwrap();
    let ip_b = node.pod_status(&b).await.unwrap().network.unwrap();
    assert!(ip_a.ip.starts_with("10.99."), "{ip_a:?}");
    assert!(ip_a.additional_ips[0].ip.starts_with("fd99:"), "{ip_a:?}");
    let in_a = node.run(&a, "c", SLEEP).await;
    let in_b = node
        .run(
            &b,
            "c",
            &format!("(while :; do echo from-b | nc -l -p 8080; done) & {SLEEP}"),
        )
        .await;
    let addresses = node.says(&in_a, "ip addr show dev eth0").await;
    assert!(
        addresses.contains(&ip_a.ip) && addresses.contains("mtu 1400"),
        "{addresses}"
    );
    assert!(
        node.says(&in_a, "ip route")
            .await
            .contains("default via 10.99.0.1")
    );
    // Pod to pod, pod to host, both families.
    let reach = format!("nc -w 10 {} 8080 </dev/null", ip_b.ip);
    assert_eq!(node.says(&in_a, &reach).await, "from-b");
    let reach = format!("ping -c 1 -W 10 {}", ip_b.additional_ips[0].ip);
    node.says(&in_a, &reach).await;
    node.says(&in_a, "ping -c 1 -W 10 10.99.0.1").await;
    assert_eq!(node.says(&in_b, "cat /etc/hostname").await, "net-b");
    node.remove(&a).await;
    node.remove(&b).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_outlive_a_daemon_that_is_killed() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let pod = node.pod("outlive").await;
    let stays = node.run(&pod, "stays", SLEEP).await;
    let counts = node
        .run(
            &pod,
            "counts",
            "for i in $(seq 1 40); do echo $i; sleep 0.1; done; exit 5",
        )
        .await;
    let ip = node.pod_status(&pod).await.unwrap().network.unwrap().ip;
    node.restart().await;
    assert_eq!(node.says(&stays, "echo here").await, "here");
    let status = node.pod_status(&pod).await.unwrap();
    assert_eq!(status.state(), cri::PodSandboxState::SandboxReady);
    assert_eq!(status.network.unwrap().ip, ip);
    assert_eq!(node.ended(&counts).await.exit_code, 5);
    let log = read_log(&counts.log);
    assert_eq!(log.len(), 40);
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_and_stats_know_the_containers() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("lists").await;
    let container = node.run(&pod, "c", SLEEP).await;
    let other = node
        .pod_with("lists2", PodOptions::default())
        .await
        .unwrap();
    let mut runtime = node.runtime.clone();
    let filter = cri::PodSandboxFilter {
        label_selector: [("test".to_owned(), "lists2".to_owned())].into(),
        ..cri::PodSandboxFilter::default()
    };
    let request = cri::ListPodSandboxRequest {
        filter: Some(filter),
    };
    let listed = runtime
        .list_pod_sandbox(request)
        .await
        .unwrap()
        .into_inner()
        .items;
    assert_eq!(
        listed.iter().map(|p| &p.id).collect::<Vec<_>>(),
        [&other.id]
    );
    let filter = cri::ContainerFilter {
        state: Some(cri::ContainerStateValue {
            state: cri::ContainerState::ContainerRunning.into(),
        }),
        ..cri::ContainerFilter::default()
    };
    let request = cri::ListContainersRequest {
        filter: Some(filter),
    };
    let listed = runtime
        .list_containers(request)
        .await
        .unwrap()
        .into_inner()
        .containers;
    assert_eq!(
        listed.iter().map(|c| &c.id).collect::<Vec<_>>(),
        [&container.id]
    );

    let request = cri::ContainerStatusRequest {
        container_id: container.id.clone(),
        verbose: false,
    };
    let status = runtime.container_status(request).await.unwrap();
    let user = status.into_inner().status.unwrap().user.unwrap();
    let user = user.linux.unwrap();
    assert_eq!((user.uid, user.gid), (0, 0));
    assert!(user.supplemental_groups.contains(&0));

    // must-test: metrics missing or zero.
    let request = cri::ContainerStatsRequest {
        container_id: container.id.clone(),
    };
    let stats = runtime
        .container_stats(request)
        .await
        .unwrap()
        .into_inner()
        .stats
        .unwrap();
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);
    assert!(stats.io.unwrap().psi.is_some());
    streamed_lists_have_the_same(&node, &[&pod.id, &other.id], &container.id).await;
    metrics_have_what_their_descriptors_say(&node, &pod.id, &container.id).await;

    // What the machine can hold is taken, more is refused with both sizes.
    let resize = |memory: i64| cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        resources: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            ..Default::default()
        }),
        overhead: None,
    };
    runtime
        .update_pod_sandbox_resources(resize(64 << 20))
        .await
        .unwrap();
    let error = runtime
        .update_pod_sandbox_resources(resize(4 << 30))
        .await
        .unwrap_err();
    assert_eq!(error.code(), tonic::Code::OutOfRange);
    assert!(
        error.message().contains("192 MiB and cannot grow to"),
        "{error}"
    );
    node.remove(&pod).await;
    node.remove(&other).await;
    node.assert_nothing_left().await;
}

async fn streamed_lists_have_the_same(node: &Node, pods: &[&str], container: &str) {
    let mut runtime = node.runtime.clone();
    let mut stream = runtime
        .stream_pod_sandboxes(cri::StreamPodSandboxesRequest::default())
        .await
        .unwrap()
        .into_inner();
    let mut found = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        found.extend(message.pod_sandboxes.into_iter().map(|pod| pod.id));
    }
    assert_eq!(found.len(), pods.len());
    assert!(pods.iter().all(|pod| found.iter().any(|id| id == pod)));
    let mut stream = runtime
        .stream_container_stats(cri::StreamContainerStatsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let stats = stream.message().await.unwrap().unwrap().container_stats;
    assert_eq!(stats[0].attributes.as_ref().unwrap().id, container);
    assert!(stream.message().await.unwrap().is_none());
}

async fn metrics_have_what_their_descriptors_say(node: &Node, pod: &str, container: &str) {
    let mut runtime = node.runtime.clone();
    let descriptors = runtime
        .list_metric_descriptors(cri::ListMetricDescriptorsRequest {})
        .await
        .unwrap()
        .into_inner()
        .descriptors;
    let all = runtime
        .list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {})
        .await
        .unwrap()
        .into_inner()
        .pod_metrics;
    let of_pod = all.iter().find(|one| one.pod_sandbox_id == pod).unwrap();
    let of_container = &of_pod.container_metrics[0];
    assert_eq!(of_container.container_id, container);
    for metric in of_pod.metrics.iter().chain(&of_container.metrics) {
        let descriptor = descriptors.iter().find(|one| one.name == metric.name);
        let labels = &descriptor.unwrap().label_keys;
        assert_eq!(labels.len(), metric.label_values.len(), "{}", metric.name);
    }
    let value = |name: &str| {
        let metric = of_container.metrics.iter().find(|one| one.name == name);
        metric
            .unwrap_or_else(|| panic!("no {name}"))
            .value
            .unwrap()
            .value
    };
    assert!(value("container_processes") >= 2);
    assert!(value("container_memory_usage_bytes") > 0);
    assert!(value("container_fs_limit_bytes") > 0);
    let received = of_pod
        .metrics
        .iter()
        .find(|one| one.name == "container_network_receive_bytes_total");
    assert!(received.unwrap().label_values.contains(&"eth0".to_owned()));
}
