//! Bad input and a failing machine: a clear error, and nothing left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use caisson_proto::cri;
use caisson_tests::{ContainerOptions, Node, NodeOptions, PodOptions, pod_process};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use tonic::Code;

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_and_leave_nothing() {
    let Some(node) = Node::start().await else {
        return;
    };
    // An unknown handler.
    let options = PodOptions {
        handler: "gvisor".into(),
        ..PodOptions::default()
    };
    let error = node.pod_with("handler", options).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(
        error.message().contains("gvisor") && error.message().contains("microvm"),
        "{error}"
    );

    let pod = node.pod("bad").await;
    // A name in use.
    let error = node
        .pod_with("bad", PodOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    node.create(&pod, "c", SLEEP, ContainerOptions::default())
        .await
        .unwrap();
    let again = node
        .create(&pod, "c", SLEEP, ContainerOptions::default())
        .await;
    assert_eq!(again.unwrap_err().code(), Code::AlreadyExists);

    // A missing image.
    let options = ContainerOptions {
        image: Some("docker.io/library/missing:1".into()),
        ..ContainerOptions::default()
    };
    let error = node
        .create(&pod, "missing", SLEEP, options)
        .await
        .unwrap_err();
    assert!(error.message().contains("missing:1"), "{error}");

    // A program that is not in the image.
    let output = node.caisson(&["run", "--rm", caisson_tests::IMAGE, "/no/such/program"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("/no/such/program"), "{said}");

    // A container in a pod that is stopped, and in one that never was.
    let request = cri::StopPodSandboxRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    node.runtime
        .clone()
        .stop_pod_sandbox(request)
        .await
        .unwrap();
    let error = node
        .create(&pod, "late", SLEEP, ContainerOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    node.remove(&pod).await;
    let error = node
        .create(&pod, "later", SLEEP, ContainerOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    // Removing what is removed is no error.
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_pod_is_reported_and_removed() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("dead").await;
    let container = node.run(&pod, "c", SLEEP).await;
    // must-test: a dead VMM leaves pods Terminating for ever.
    let process = pod_process(&node.pod_directory(&pod)).unwrap();
    kill(process, Signal::SIGKILL).unwrap();
    let status = node.ended(&container).await;
    assert_ne!(status.exit_code, 0);
    assert_eq!(
        node.pod_status(&pod).await.unwrap().state(),
        cri::PodSandboxState::SandboxNotready
    );
    let error = node
        .create(&pod, "late", SLEEP, ContainerOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_archives_and_missing_images_are_told() {
    // Without the image: what is in the store already is not read again.
    let options = NodeOptions {
        no_image: true,
        ..NodeOptions::default()
    };
    let Some(node) = Node::start_with(options).await else {
        return;
    };
    let good = fs::read(make_image(&node)).unwrap();
    let images = || node.caisson(&["images", "-q"]).stdout;
    let before = images();
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for (name, bytes) in [
        ("empty", &b""[..]),
        ("garbage", &b"this is not an archive"[..]),
        ("truncated", &good[..good.len() / 2]),
        ("flipped", &flipped[..]),
    ] {
        let path = node.dir().join(name);
        fs::write(&path, bytes).unwrap();
        let output = node.caisson(&["load", "--name", "x:1", &path.to_string_lossy()]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{name}: {said}");
        assert!(
            said.starts_with("caisson: ") && said.lines().count() == 1,
            "{name}: {said}"
        );
    }
    assert_eq!(images(), before);
    let temporary = node.root().join("images/tmp");
    let left: Vec<_> = fs::read_dir(temporary).into_iter().flatten().collect();
    assert!(left.is_empty(), "{left:?}");

    let output = node.caisson(&["run", "127.0.0.1:9/none:1", "true"]);
    assert_eq!(output.status.code(), Some(125));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("127.0.0.1:9"), "{said}");
    node.assert_nothing_left().await;
}

/// On a node with these options no pod can run, for a reason of which this is a part.
async fn unable(options: NodeOptions, part: &str) {
    let Some(node) = Node::start_with(options).await else {
        return;
    };
    let error = node
        .pod_with("unable", PodOptions::default())
        .await
        .unwrap_err();
    assert!(error.message().contains(part), "{error}");
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_kernel_is_told() {
    let kernel = tempfile::NamedTempFile::new().unwrap();
    fs::write(kernel.path(), vec![0x5a; 1 << 20]).unwrap();
    let options = NodeOptions {
        kernel: Some(kernel.path().to_owned()),
        ..NodeOptions::default()
    };
    unable(options, "kernel").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_kvm_says_so() {
    let options = NodeOptions {
        hide_kvm: true,
        ..NodeOptions::default()
    };
    unable(options, "/dev/kvm").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_network_says_so() {
    let options = NodeOptions {
        no_network: true,
        ..NodeOptions::default()
    };
    unable(options, "CNI").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told() {
    let disk = tempfile::tempdir_in("/var/lib").unwrap();
    let small = |size: &str| {
        mount(
            Some("tmpfs"),
            disk.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(format!("size={size}").as_str()),
        )
        .unwrap();
    };
    small("3m");
    let root = disk.path().join("root");
    let options = NodeOptions {
        root: Some(root.clone()),
        no_image: true,
        ..NodeOptions::default()
    };
    let Some(node) = Node::start_with(options).await else {
        umount2(disk.path(), MntFlags::MNT_DETACH).unwrap();
        return;
    };
    // Room for the records, none for an image or a pod's disk.
    let filler = disk.path().join("filler");
    fill(&filler);
    let archive = make_image(&node);
    let output = node.caisson(&["load", &archive.to_string_lossy()]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(said.contains("is full"), "{said}");
    let error = node
        .pod_with("full", PodOptions::default())
        .await
        .unwrap_err();
    assert!(
        error.message().contains("No space left") || error.message().contains("full"),
        "{error}"
    );
    // With room again, the same name works.
    fs::remove_file(&filler).unwrap();
    mount(
        None::<&str>,
        disk.path(),
        None::<&str>,
        MsFlags::MS_REMOUNT,
        Some("size=200m"),
    )
    .unwrap();
    let pod = node.pod("full").await;
    node.remove(&pod).await;
    node.assert_nothing_left().await;
    drop(node);
    umount2(disk.path(), MntFlags::MNT_DETACH).unwrap();
}

/// The image's archive, not loaded.
fn make_image(node: &Node) -> PathBuf {
    let archive = node.dir().join("image.tar");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/demo-image");
    let made = Command::new(script).arg(&archive).status().unwrap();
    assert!(made.success());
    archive
}

/// Writes until nothing fits any more.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    for size in [64 << 10, 4096] {
        while std::io::Write::write_all(&mut file, &vec![1; size]).is_ok() {}
    }
}
