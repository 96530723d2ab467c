//! Limits of containers that change while they run.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::{Container, ContainerOptions, Node, NodeOptions, PodOptions};
use tonic::{Code, Status};

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

async fn update(
    node: &Node,
    container: &Container,
    limits: cri::LinuxContainerResources,
) -> Result<(), Status> {
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(limits),
        ..cri::UpdateContainerResourcesRequest::default()
    };
    let done = node
        .runtime
        .clone()
        .update_container_resources(request)
        .await;
    done.map(drop)
}

fn unified(file: &str, value: &str) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        unified: HashMap::from([(file.to_owned(), value.to_owned())]),
        ..cri::LinuxContainerResources::default()
    }
}

fn huge(size: &str, limit: u64) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        hugepage_limits: vec![cri::HugepageLimit {
            page_size: size.to_owned(),
            limit,
        }],
        ..cri::LinuxContainerResources::default()
    }
}

async fn limits(node: &Node, container: &Container) -> cri::LinuxContainerResources {
    let status = node.status(container).await;
    status.resources.unwrap().linux.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_limit_of_a_running_container_changes() {
    let Some(node) = Node::start().await else {
        return;
    };
    let options = PodOptions {
        millicpus: 2000,
        memory: 256 << 20,
        ..PodOptions::default()
    };
    let pod = node.pod_with("limits", options).await.unwrap();
    let container = ContainerOptions {
        memory: 64 << 20,
        ..ContainerOptions::default()
    };
    let container = node.create(&pod, "c", SLEEP, container).await.unwrap();
    // Made and not started yet: the limits hold from the first moment.
    let none = cri::LinuxContainerResources::default;
    let more = cri::LinuxContainerResources {
        memory_limit_in_bytes: 80 << 20,
        ..none()
    };
    update(&node, &container, more).await.unwrap();
    node.start_container(&container).await.unwrap();
    let file = |name: &str| {
        let script = format!("cat /sys/fs/cgroup/{name}");
        let (node, container) = (&node, &container);
        async move { node.says(container, &script).await }
    };
    assert_eq!(file("memory.max").await, (80 << 20).to_string());

    let cpu = cri::LinuxContainerResources {
        cpu_shares: 512,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..none()
    };
    update(&node, &container, cpu).await.unwrap();
    assert_eq!(file("cpu.max").await, "50000 100000");
    assert_eq!(file("cpu.weight").await, "20");

    let memory = cri::LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        memory_swap_limit_in_bytes: 96 << 20,
        ..none()
    };
    update(&node, &container, memory).await.unwrap();
    assert_eq!(file("memory.max").await, (96 << 20).to_string());
    assert_eq!(file("memory.swap.max").await, "0");

    update(&node, &container, unified("pids.max", "50"))
        .await
        .unwrap();
    assert_eq!(file("pids.max").await, "50");

    let allowed = "grep Cpus_allowed_list /proc/self/status | cut -f2";
    assert_eq!(node.says(&container, allowed).await, "0-1");
    let cpuset = cri::LinuxContainerResources {
        cpuset_cpus: "1".into(),
        cpuset_mems: "0".into(),
        ..none()
    };
    update(&node, &container, cpuset).await.unwrap();
    assert_eq!(file("cpuset.cpus").await, "1");
    assert_eq!(file("cpuset.mems").await, "0");
    assert_eq!(node.says(&container, allowed).await, "1");

    update(&node, &container, huge("2MB", 4 << 20))
        .await
        .unwrap();
    assert_eq!(file("hugetlb.2MB.max").await, (4 << 20).to_string());

    let high = (48 << 20).to_string();
    update(&node, &container, unified("memory.high", &high))
        .await
        .unwrap();
    assert_eq!(file("memory.high").await, high);

    // What was set before stays, and the status tells all of it.
    assert_eq!(file("cpu.max").await, "50000 100000");
    let told = limits(&node, &container).await;
    assert_eq!((told.cpu_shares, told.cpu_quota), (512, 50_000));
    assert_eq!(told.memory_limit_in_bytes, 96 << 20);
    assert_eq!(
        (told.cpuset_cpus.as_str(), told.cpuset_mems.as_str()),
        ("1", "0")
    );
    assert_eq!(told.hugepage_limits, huge("2MB", 4 << 20).hugepage_limits);
    assert_eq!(told.unified["pids.max"], "50");
    assert_eq!(told.unified["memory.high"], high);

    // What cannot be is told by its name and changes nothing.
    let cpus = cri::LinuxContainerResources {
        cpuset_cpus: "7".into(),
        ..none()
    };
    let swap = cri::LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        memory_swap_limit_in_bytes: 1 << 20,
        ..none()
    };
    let shares = cri::LinuxContainerResources {
        cpu_shares: -1,
        ..none()
    };
    for (limits, part) in [
        (cpus, "cpu.cpus"),
        (huge("3MB", 1 << 20), "hugepageLimits"),
        (unified("no.such", "1"), "unified.no.such"),
        (unified("cgroup.procs", "1"), "unified.cgroup.procs"),
        (swap, "memory_swap_limit_in_bytes"),
        (shares, "cpu_shares"),
    ] {
        let error = update(&node, &container, limits).await.unwrap_err();
        assert!(error.message().contains(part), "{part}: {error}");
    }
    assert_eq!(limits(&node, &container).await, told);
    assert_eq!(file("cpuset.cpus").await, "1");

    node.stop_container(&container, 5).await;
    let error = update(&node, &container, none()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_and_network_keep_to_their_limits() {
    let options = NodeOptions {
        microvm: "disk_bytes_per_second = 4_000_000\nnet_bytes_per_second = 1_000_000\n".into(),
        ..NodeOptions::default()
    };
    let Some(node) = Node::start_with(options).await else {
        return;
    };
    let pod = node.pod("limited").await;
    let container = node.run(&pod, "c", SLEEP).await;
    // Never shorter than what the limit leaves it, however slow the machine is. What is written to a container's root is
    // on the disk at once only if it is written past the guest's memory.
    for direct in [
        "if=/dev/zero of=/file oflag=direct",
        "if=/file of=/dev/null iflag=direct",
    ] {
        let begin = Instant::now();
        let script = format!("dd {direct} bs=64k count=192");
        node.says(&container, &script).await;
        let elapsed = begin.elapsed();
        assert!(elapsed >= Duration::from_millis(2900), "{elapsed:?}");
    }

    let listener = TcpListener::bind("10.99.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let host = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut sent = vec![0; 3 << 20];
        stream.read_exact(&mut sent).unwrap();
        drop(stream);
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&sent).unwrap();
    });
    for script in [
        format!("dd if=/dev/zero bs=1M count=3 | nc 10.99.0.1 {port}"),
        format!("nc 10.99.0.1 {port} </dev/null | wc -c"),
    ] {
        let begin = Instant::now();
        let said = node.says(&container, &script).await;
        assert!(begin.elapsed() >= Duration::from_millis(2900), "{said}");
        assert!(said.is_empty() || said == "3145728", "{said}");
    }
    host.join().unwrap();
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

// must-test: memory never returned to the host
#[tokio::test(flavor = "multi_thread")]
async fn memory_that_a_pod_frees_goes_back_to_the_host() {
    let Some(node) = Node::start().await else {
        return;
    };
    let options = PodOptions {
        memory: 256 << 20,
        ..PodOptions::default()
    };
    let pod = node.pod_with("frees", options).await.unwrap();
    let container = ContainerOptions {
        privileged: true,
        ..ContainerOptions::default()
    };
    let container = node.run_with(&pod, "c", SLEEP, container).await;
    node.says(
        &container,
        "mkdir /t && mount -t tmpfs -o size=128m none /t",
    )
    .await;
    let size = 64 << 20;
    let private = || node.stats(&pod)["private_on_host"].as_u64().unwrap();
    let write = |letter: &str| {
        format!(
            "head -c {size} /dev/zero | tr '\\0' {letter} >/t/file; tr -d {letter} </t/file | wc -c; wc -c </t/file"
        )
    };
    let before = private();
    assert_eq!(
        node.says(&container, &write("a")).await,
        format!("0\n{size}")
    );
    let full = private();
    assert!(full > before + size / 2, "{before}, then {full}");
    node.says(&container, "rm /t/file").await;
    let left = node.holds_less(&pod, full - size * 3 / 4).await;
    println!("private: {before} before, {full} full, {left} in the end");
    // What went back can be used again.
    assert_eq!(
        node.says(&container, &write("b")).await,
        format!("0\n{size}")
    );

    let stats = node.stats(&pod);
    let number = |name: &str| stats[name].as_u64().unwrap_or_else(|| panic!("{stats}"));
    let (held, shared) = (number("private_on_host"), number("shared_on_host"));
    assert!(held > 1 << 20 && shared > 0, "{stats}");
    assert!(
        number("pss") >= held && number("pss") <= held + shared,
        "{stats}"
    );
    assert!(
        number("memory_in_pod") > 1 << 20 && number("cpu_ns") > 0,
        "{stats}"
    );
    let table = node.caisson(&["stats"]);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(
        text.contains(&pod.id[..12]) && text.contains(" MiB "),
        "{text}"
    );
    node.remove(&pod).await;
    let table = node.caisson(&["stats"]);
    assert_eq!(String::from_utf8(table.stdout).unwrap().lines().count(), 1);
    node.assert_nothing_left().await;
}
