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
    node.remove(&pod).await;
    node.remove(&other).await;
    node.assert_nothing_left().await;
}
