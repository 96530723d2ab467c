//! Pods over CRI: what containers share and what they have of their own, their output, their ends.

use caisson_proto::cri;
use caisson_tests::{ContainerOptions, Node, PodOptions, read_log};

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

#[tokio::test(flavor = "multi_thread")]
async fn two_containers_share_a_pod_and_have_their_own_files_and_limits() {
    let Some(node) = Node::start().await else {
        return;
    };
    let options = PodOptions {
        dns: vec!["10.0.0.53".into()],
        ..PodOptions::default()
    };
    let pod = node.pod_with("shared", options).await.unwrap();
    let a = ContainerOptions {
        memory: 64 << 20,
        ..ContainerOptions::default()
    };
    let a = node.run_with(&pod, "a", SLEEP, a).await;
    let b = node.run(&pod, "b", SLEEP).await;

    for ns in ["net", "ipc", "uts"] {
        let of = format!("readlink /proc/self/ns/{ns}");
        assert_eq!(node.says(&a, &of).await, node.says(&b, &of).await, "{ns}");
    }
    for ns in ["pid", "mnt"] {
        let of = format!("readlink /proc/self/ns/{ns}");
        assert_ne!(node.says(&a, &of).await, node.says(&b, &of).await, "{ns}");
    }
    // One network: what one serves on localhost the other reaches.
    node.says(&a, "echo pong | nc -l -p 7777 >/dev/null 2>&1 & sleep 0.3")
        .await;
    assert_eq!(
        node.says(&b, "nc -w 5 127.0.0.1 7777 </dev/null").await,
        "pong"
    );
    // One IPC namespace: shared memory is shared.
    node.says(&a, "echo memory > /dev/shm/x").await;
    assert_eq!(node.says(&b, "cat /dev/shm/x").await, "memory");
    // Their own files, which are written to their own layer.
    node.says(&a, "echo a > /own; rm /bin/vi").await;
    assert_eq!(
        node.says(&b, "test ! -e /own && test -e /bin/vi && echo apart")
            .await,
        "apart"
    );
    // Their own limits.
    let limit = "cat /sys/fs/cgroup/memory.max";
    assert_eq!(node.says(&a, limit).await, (64 << 20).to_string());
    assert_eq!(node.says(&b, limit).await, "max");

    assert_eq!(node.says(&a, "hostname").await, "shared");
    assert!(
        node.says(&a, "cat /etc/resolv.conf")
            .await
            .contains("nameserver 10.0.0.53")
    );
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_share_pids_if_asked() {
    let Some(node) = Node::start().await else {
        return;
    };
    let options = PodOptions {
        share_pids: true,
        ..PodOptions::default()
    };
    let pod = node.pod_with("pids", options).await.unwrap();
    let shared = ContainerOptions {
        share_pids: true,
        ..ContainerOptions::default()
    };
    let a = node
        .run_with(&pod, "a", "exec sleep 1234", shared.clone())
        .await;
    let b = node.run_with(&pod, "b", SLEEP, shared).await;
    let of = "readlink /proc/self/ns/pid";
    assert_eq!(node.says(&a, of).await, node.says(&b, of).await);
    assert!(node.says(&b, "ps").await.contains("sleep 1234"));
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

// As the kubelet runs an ephemeral container that `kubectl debug --target` asks for.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_comes_later_joins_the_processes_of_another() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("ephemeral").await;
    let app = node
        .run(&pod, "app", "echo secret >/own; exec sleep 4321")
        .await;
    let of = |target: &str| ContainerOptions {
        namespaces: Some(cri::NamespaceOption {
            pid: cri::NamespaceMode::Target.into(),
            target_id: target.to_owned(),
            ..cri::NamespaceOption::default()
        }),
        ..ContainerOptions::default()
    };
    let debugger = node.run_with(&pod, "debugger", SLEEP, of(&app.id)).await;
    let first = "tr '\\0' ' ' </proc/1/cmdline";
    assert_eq!(node.says(&debugger, first).await, "sleep 4321");
    let of_pid = "readlink /proc/self/ns/pid";
    assert_eq!(
        node.says(&debugger, of_pid).await,
        node.says(&app, of_pid).await
    );
    // Its own files, and the other's by way of its process.
    assert_eq!(
        node.says(&debugger, "ls /own 2>/dev/null || echo none")
            .await,
        "none"
    );
    assert_eq!(node.says(&debugger, "cat /proc/1/root/own").await, "secret");
    // It can end the other's processes but for the first, and its own end is nobody else's.
    node.says(&app, "sleep 8765 >/dev/null 2>&1 &").await;
    node.says(&debugger, "kill -9 $(ps | awk '/[s]leep 8765/ {print $1}')")
        .await;
    assert!(!node.says(&app, "ps").await.contains("sleep 8765"));
    node.stop_container(&debugger, 5).await;
    assert_eq!(node.says(&app, "echo alive").await, "alive");

    let other = node.pod("elsewhere").await;
    let error = node
        .create(&other, "d", SLEEP, of(&app.id))
        .await
        .unwrap_err();
    assert!(error.message().contains("another pod"), "{error}");
    let error = node
        .create(&pod, "d", SLEEP, of(&debugger.id))
        .await
        .unwrap_err();
    assert!(error.message().contains("does not run"), "{error}");
    node.remove(&other).await;
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_and_error_arrive_apart_and_complete() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("output").await;
    let (status, lines) = node
        .output(
            &pod,
            "both",
            "for i in 1 2 3; do echo out$i; echo err$i >&2; done; printf end",
        )
        .await;
    assert_eq!(status.exit_code, 0);
    let of = |stream: &str| {
        lines
            .iter()
            .filter(|l| l.stream == stream)
            .map(|l| String::from_utf8_lossy(&l.content).into_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(of("stdout"), ["out1", "out2", "out3", "end"]);
    assert_eq!(of("stderr"), ["err1", "err2", "err3"]);

    // must-test: exec and logs that lose the tail of the output when the process ends quickly.
    for round in 0..5 {
        let name = format!("quick{round}");
        let (_, lines) = node.output(&pod, &name, "seq 1 2000").await;
        assert_eq!(lines.len(), 2000, "{name}");
    }
    node.remove(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_arrive_byte_for_byte() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("large").await;
    // 100 MiB of numbered lines, and their digest on standard error.
    const TOTAL: usize = 105_000_000;
    let text = "0123456789".repeat(8);
    let script = format!("yes {text} | head -c {TOTAL}");
    let container = node.run(&pod, "large", &script).await;
    let status = node.ended(&container).await;
    assert_eq!(status.exit_code, 0);
    let mut got = Vec::with_capacity(TOTAL);
    for line in read_log(&container.log) {
        assert_eq!(line.stream, "stdout");
        got.extend_from_slice(&line.content);
        if !line.partial {
            got.push(b'\n');
        }
    }
    let mut sent = format!("{text}\n").repeat(TOTAL / 81 + 1).into_bytes();
    sent.truncate(TOTAL);
    // No `assert_eq`: nobody wants to read the difference of 100 MB.
    assert!(got == sent, "{} bytes came, not the ones sent", got.len());
    node.remove(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_and_signals_arrive() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("codes").await;
    let shell = node.run(&pod, "shell", SLEEP).await;
    // Every bit alone and missing, by exec; eight at a time.
    let codes: Vec<i32> = (0..8).flat_map(|bit| [1 << bit, 255 ^ 1 << bit]).collect();
    for some in codes.chunks(8) {
        let codes = some.iter().map(|&code| {
            let (node, shell) = (&node, &shell);
            async move {
                let script = format!("exit {code}");
                let (got, _, _) = node.exec(shell, &script, 60).await.unwrap();
                assert_eq!(got, code);
            }
        });
        join_all(codes).await;
    }
    for code in [0, 1, 127, 255] {
        let name = format!("c{code}");
        let (status, _) = node.output(&pod, &name, &format!("exit {code}")).await;
        assert_eq!(status.exit_code, code);
        let reason = if code == 0 { "Completed" } else { "Error" };
        assert_eq!(status.reason, reason);
        assert!(status.finished_at >= status.started_at && status.started_at > 0);
    }
    for (signal, code) in [("KILL", 137), ("SEGV", 139)] {
        let (status, _) = node
            .output(&pod, signal, &format!("sh -c 'kill -{signal} $$'; exit $?"))
            .await;
        assert_eq!(status.exit_code, code);
    }
    // Stop: the stop signal first, then, for one that does not listen, the kill.
    node.stop_container(&shell, 10).await;
    assert_eq!(node.status(&shell).await.exit_code, 0);
    let deaf = node
        .run(&pod, "deaf", "trap '' TERM; exec sleep 100000")
        .await;
    node.stop_container(&deaf, 1).await;
    assert_eq!(node.status(&deaf).await.exit_code, 137);
    // Stopping what has stopped is no error.
    node.stop_container(&deaf, 1).await;
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_over_its_memory_limit_is_oom_killed_and_the_pod_lives_on() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("memory").await;
    let good = node.run(&pod, "good", SLEEP).await;
    let small = ContainerOptions {
        memory: 16 << 20,
        ..ContainerOptions::default()
    };
    let hungry = node
        .run_with(&pod, "hungry", "exec tail /dev/zero", small)
        .await;
    let status = node.ended(&hungry).await;
    assert_eq!(status.exit_code, 137);
    assert_eq!(status.reason, "OOMKilled");
    assert_eq!(node.says(&good, "echo alive").await, "alive");
    assert_eq!(
        node.pod_status(&pod).await.unwrap().state(),
        cri::PodSandboxState::SandboxReady
    );
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

async fn join_all<F: Future<Output = ()>>(futures: impl Iterator<Item = F>) {
    let mut pending: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        pending.retain_mut(|f| f.as_mut().poll(context).is_pending());
        if pending.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}
