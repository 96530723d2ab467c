//! A node that runs out of something, or whose clock jumps: an error with a reason, and the other pods go on.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::{Node, PodOptions, read_log};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// The most files that a process may have open from now on.
fn limit_files(pid: u32, most: usize) {
    let limit = format!("--nofile={most}:{most}");
    let limited = Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &limit])
        .status();
    assert!(limited.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_without_descriptors_says_so_and_serves_on() {
    let Some(node) = Node::start().await else {
        return;
    };
    let neighbour = node.pod("neighbour").await;
    let container = node.run(&neighbour, "c", SLEEP).await;
    let pid = node.daemon_pid();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    limit_files(pid, open + 8);
    let error = node.pod_with("many", PodOptions::default()).await;
    let error = error.unwrap_err();
    assert!(error.message().contains("Too many open files"), "{error}");
    assert_eq!(node.says(&container, "echo here").await, "here");
    limit_files(pid, 4096);
    assert_eq!(node.says(&container, "echo here").await, "here");
    // What could not be taken back then is what a kubelet removes now, before it tries again.
    let request = cri::ListPodSandboxRequest { filter: None };
    let pods = node.runtime.clone().list_pod_sandbox(request).await;
    for half in pods.unwrap().into_inner().items {
        if half.id != neighbour.id {
            assert_eq!(half.state(), cri::PodSandboxState::SandboxNotready);
            let half = caisson_tests::Pod {
                id: half.id,
                config: cri::PodSandboxConfig::default(),
            };
            node.remove(&half).await;
        }
    }
    let pod = node.pod("many").await;
    tokio::join!(node.remove(&pod), node.remove(&neighbour));
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_log_disk_holds_back_whoever_writes_and_nobody_else() {
    let Some(node) = Node::start().await else {
        return;
    };
    let logs = node.dir().join("logs/writes");
    fs::create_dir_all(&logs).unwrap();
    let small = |flags, size: &str| {
        let size = Some(size);
        mount(Some("tmpfs"), &logs, Some("tmpfs"), flags, size).unwrap();
    };
    small(MsFlags::empty(), "size=64k");
    let pod = node.pod("writes").await;
    let lines = 4000;
    let script = format!("seq {lines}; echo done >&2; exit 3");
    let writer = node.run(&pod, "writer", &script).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !node.daemon_log().contains("No space left on device") {
        assert!(Instant::now() < deadline, "{}", node.daemon_log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(node.daemon_log().contains(&writer.id));
    let running = node.status(&writer).await;
    assert!(running.message.contains("No space left"), "{running:?}");
    // Another container of the same pod, whose log is as full, is of use all the same.
    let other = node.run(&pod, "other", SLEEP).await;
    assert_eq!(node.says(&other, "echo here").await, "here");
    // With room again nothing is lost.
    small(MsFlags::MS_REMOUNT, "size=4m");
    let status = node.ended(&writer).await;
    assert_eq!(status.exit_code, 3);
    let last = format!(" stdout F {lines}\n");
    let log = || String::from_utf8(fs::read(&writer.log).unwrap()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !log().contains(&last) || !log().contains("done\n") {
        assert!(Instant::now() < deadline, "the log is not complete");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let out = read_log(&writer.log);
    let out = out.iter().filter(|line| line.stream == "stdout");
    let out: Vec<_> = out.map(|line| line.content.clone()).collect();
    let all: Vec<_> = (1..=lines).map(|n| n.to_string().into_bytes()).collect();
    assert_eq!(out, all);
    node.remove(&pod).await;
    umount2(&logs, MntFlags::MNT_DETACH).unwrap();
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_ends_nothing() {
    // The clock of a machine of one's own.
    if std::env::var_os("KVM_LAB").is_none() {
        eprintln!("skipped: needs a machine whose clock may be set, which the KVM lab is");
        return;
    }
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("jumps").await;
    let first = node.run(&pod, "first", "sleep 1; exit 4").await;
    let stays = node.run(&pod, "stays", SLEEP).await;
    let jump = |by: &str| {
        let date = Command::new("date").args(["-s", by]).output().unwrap();
        assert!(date.status.success(), "{date:?}");
    };
    jump("-3 hours");
    let status = node.ended(&first).await;
    assert_eq!(status.exit_code, 4);
    assert!(
        status.created_at <= status.started_at && status.started_at <= status.finished_at,
        "{status:?}"
    );
    jump("+30 days");
    assert_eq!(node.says(&stays, "echo here").await, "here");
    let second = node.run(&pod, "second", "exit 5").await;
    let status = node.ended(&second).await;
    assert_eq!(status.exit_code, 5);
    assert!(status.started_at <= status.finished_at, "{status:?}");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}
