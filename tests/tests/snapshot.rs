//! Pods that are written to a directory and go on from there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use caisson_proto::cri;
use caisson_tests::users::mapped;
use caisson_tests::{
    Container, ContainerOptions, Disk, IMAGE, ImageMaker, Node, NodeOptions, Pod, PodOptions,
    of_host, read_log,
};
use cri::ContainerState;

const WAIT: Duration = Duration::from_secs(120);
/// Counts in its memory alone, and says each number: a hundred at once, so that some are on their way at any moment.
const COUNT: &str = "trap 'exit 7' TERM; i=0; while :; do i=$((i+1)); echo number $i; \
    [ $((i % 100)) != 0 ] || sleep 0.1; done";

/// Runs `caisson` with these arguments; what it said, or why not.
fn caisson(node: &Node, arguments: &[&str]) -> Result<String, String> {
    let output = node.caisson(arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr)),
    }
}

fn snapshot(node: &Node, pod: &Pod, dir: &Path) -> Result<String, String> {
    caisson(node, &["snapshot", &pod.id, dir.to_str().unwrap()])
}

fn restore(node: &Node, dir: &Path) -> Result<String, String> {
    caisson(node, &["restore", dir.to_str().unwrap()])
}

/// The numbers that a container has said, each once and in order.
fn numbers(container: &Container) -> usize {
    let log = read_log(&container.log);
    // What a snapshot came into the middle of is a line in two parts.
    let mut text = String::new();
    for line in &log {
        text.push_str(std::str::from_utf8(&line.content).unwrap());
        if !line.partial {
            text.push('\n');
        }
    }
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for (index, line) in whole.lines().enumerate() {
        assert_eq!(line, format!("number {}", index + 1));
    }
    whole.lines().count()
}

async fn counts_to(node: &Node, container: &Container, number: usize) {
    let deadline = Instant::now() + WAIT;
    while !container.log.exists() || numbers(container) < number {
        assert!(Instant::now() < deadline, "{}", node.daemon_log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn pods(node: &Node) -> usize {
    let request = cri::ListPodSandboxRequest { filter: None };
    let pods = node.runtime.clone().list_pod_sandbox(request).await;
    pods.unwrap().into_inner().items.len()
}

async fn ip(node: &Node, pod: &Pod) -> String {
    let status = node.pod_status(pod).await.unwrap();
    status.network.unwrap().ip
}

/// A pod's address is its own, and frames go both ways.
async fn is_reachable(node: &Node, pod: &Pod, container: &Container) {
    let ip = ip(node, pod).await;
    let shown = node
        .says(container, "ip addr show eth0; cat /etc/hosts")
        .await;
    assert_eq!(shown.matches("inet ").count(), 1, "{shown}");
    assert!(shown.contains(&format!("{ip}/")), "{ip}: {shown}");
    assert!(shown.contains(&format!("{ip}\t")), "{ip}: {shown}");
    let gateway = format!("{}.1", ip.rsplit_once('.').unwrap().0);
    node.says(container, &format!("ping -c 1 -W 20 {gateway}"))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_goes_on_where_it_was() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let dir = node.root().join("snapshot");
    let pod = node.pod("counter").await;
    let container = node.run(&pod, "count", COUNT).await;
    let other = node.run(&pod, "other", "exit 3").await;
    node.ended(&other).await;
    let terminal = ContainerOptions {
        tty: true,
        ..ContainerOptions::default()
    };
    let terminal = node.run_with(&pod, "tty", "sleep 100000", terminal).await;
    node.says(&container, "echo kept >/kept; echo shared >/dev/shm/kept")
        .await;
    counts_to(&node, &container, 200).await;
    let before = ip(&node, &pod).await;

    assert_eq!(snapshot(&node, &pod, &dir).unwrap(), pod.id);
    assert_eq!(pods(&node).await, 0);
    node.assert_nothing_left().await;
    let said = numbers(&container);
    for (name, mode) in [
        ("", 0o700),
        ("memory", 0o600),
        ("state", 0o600),
        ("manifest.json", 0o600),
    ] {
        let meta = fs::metadata(dir.join(name)).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{name}");
    }
    // Another pod has taken its address meanwhile, which plugins give in turn.
    let stranger = node.pod("stranger").await;
    // It goes on whatever daemon there is.
    node.restart().await;

    assert_eq!(restore(&node, &dir).unwrap(), pod.id);
    let shown = node.pod_status(&pod).await.unwrap();
    assert_eq!(shown.metadata.unwrap().name, "counter");
    for (container, state) in [
        (&container, ContainerState::ContainerRunning),
        (&terminal, ContainerState::ContainerRunning),
        (&other, ContainerState::ContainerExited),
    ] {
        assert_eq!(node.status(container).await.state(), state);
    }
    assert_eq!(node.status(&other).await.exit_code, 3);
    counts_to(&node, &container, said + 200).await;
    assert_ne!(ip(&node, &pod).await, before);
    is_reachable(&node, &pod, &container).await;
    let kept = node.says(&container, "cat /kept /dev/shm/kept").await;
    assert_eq!(kept, "kept\nshared");
    let now: u64 = node.says(&container, "date +%s").await.parse().unwrap();
    let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(host.as_secs().abs_diff(now) <= 5, "{now} in the pod");
    let twice = restore(&node, &dir).unwrap_err();
    assert!(twice.contains("is here already"), "{twice}");

    // It is a pod like any other: a container may come, with a volume, and one may end.
    let volume = node.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "of the host").unwrap();
    let options = ContainerOptions {
        mounts: vec![of_host(&volume, "/volume")],
        ..ContainerOptions::default()
    };
    let script = "cat /volume/file; sleep 100000";
    let late = node.run_with(&pod, "late", script, options).await;
    assert_eq!(node.says(&late, "cat /volume/file").await, "of the host");
    let refused = snapshot(&node, &pod, &node.root().join("other")).unwrap_err();
    let path = volume.display().to_string();
    assert!(
        refused.contains(&path) && refused.contains("/volume"),
        "{refused}"
    );
    node.says(&container, "kill -TERM 1").await;
    assert_eq!(node.ended(&container).await.exit_code, 7);
    numbers(&container);
    node.remove(&pod).await;
    node.remove(&stranger).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_users_of_its_own_keeps_them() {
    let Some(node) = Node::start().await else {
        return;
    };
    let dir = node.root().join("snapshot");
    let options = PodOptions {
        namespaces: Some(mapped()),
        ..PodOptions::default()
    };
    let pod = node.pod_with("users", options).await.unwrap();
    let in_pod = || ContainerOptions {
        namespaces: Some(mapped()),
        ..ContainerOptions::default()
    };
    let early = node.run_with(&pod, "early", "sleep 100000", in_pod()).await;
    node.says(&early, "echo kept >/kept; chown 1000:2000 /kept")
        .await;
    let show = "cat /proc/self/uid_map /proc/self/gid_map; stat -c %u:%g /kept /bin; cat /kept";
    let before = node.says(&early, show).await;
    assert!(before.contains("1000:2000"), "{before}");

    assert_eq!(snapshot(&node, &pod, &dir).unwrap(), pod.id);
    assert_eq!(restore(&node, &dir).unwrap(), pod.id);
    assert_eq!(node.says(&early, show).await, before);
    let late = node.run_with(&pod, "late", "sleep 100000", in_pod()).await;
    let maps = "cat /proc/self/uid_map /proc/self/gid_map";
    let (of_early, of_late) = (node.says(&early, maps).await, node.says(&late, maps).await);
    assert_eq!(of_early, of_late);
    assert!(of_late.contains("65536"), "{of_late}");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_left_running_goes_on_and_so_does_its_copy_later() {
    // A clone of a template: its memory is a file's in part.
    let options = NodeOptions {
        microvm: "templates = true".into(),
        ..NodeOptions::default()
    };
    let Some(node) = Node::start_with(options).await else {
        return;
    };
    node.wait_for_templates(2).await;
    let dir = node.root().join("snapshot");
    let pod = node.pod("counter").await;
    let steps = caisson(&node, &["timeline", &pod.id]).unwrap();
    assert!(steps.contains("resume guest"), "{steps}");
    let container = node.run(&pod, "count", COUNT).await;
    counts_to(&node, &container, 100).await;
    let arguments = [
        "snapshot",
        "--leave-running",
        &pod.id,
        dir.to_str().unwrap(),
    ];
    assert_eq!(caisson(&node, &arguments).unwrap(), pod.id);
    let then = numbers(&container);
    counts_to(&node, &container, then + 300).await;
    is_reachable(&node, &pod, &container).await;
    let beside = restore(&node, &dir).unwrap_err();
    assert!(
        beside.contains("is here already") && beside.contains(&pod.id),
        "{beside}"
    );
    let again = snapshot(&node, &pod, &dir).unwrap_err();
    assert!(again.contains("exists already"), "{again}");
    counts_to(&node, &container, numbers(&container) + 100).await;
    node.remove(&pod).await;

    // A clone of a moment that is past, as often as one likes.
    for _ in 0..2 {
        let log = fs::metadata(&container.log).unwrap().len();
        assert_eq!(restore(&node, &dir).unwrap(), pod.id);
        let deadline = Instant::now() + WAIT;
        while fs::metadata(&container.log).unwrap().len() == log {
            assert!(Instant::now() < deadline, "{}", node.daemon_log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        node.says(&container, "true").await;
        node.remove(&pod).await;
    }
    node.assert_nothing_left().await;

    // An image that has gone meanwhile is named.
    caisson(&node, &["rmi", IMAGE]).unwrap();
    let refused = restore(&node, &dir).unwrap_err();
    assert!(
        refused.contains("an image of the pod is not on this node"),
        "{refused}"
    );
    node.load_image();

    // What is not whole, or not as it was, is refused, and nothing comes of it.
    damage(&dir.join("memory"));
    let refused = restore(&node, &dir).unwrap_err();
    assert!(refused.contains("memory is damaged"), "{refused}");
    damage(&dir.join("memory"));
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    let refused = restore(&node, &dir).unwrap_err();
    assert!(refused.contains("not root's alone"), "{refused}");
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    let manifest = fs::read_to_string(dir.join("manifest.json")).unwrap();
    let kernel = manifest.find("\"kernel\": \"").unwrap() + 11;
    let mut other = manifest.clone();
    other.replace_range(kernel..kernel + 4, "0000");
    fs::write(dir.join("manifest.json"), other).unwrap();
    let refused = restore(&node, &dir).unwrap_err();
    assert!(refused.contains("another guest kernel"), "{refused}");
    fs::write(dir.join("manifest.json"), &manifest[..manifest.len() / 2]).unwrap();
    let refused = restore(&node, &dir).unwrap_err();
    assert!(refused.contains("manifest.json is damaged"), "{refused}");
    fs::remove_file(dir.join("manifest.json")).unwrap();
    let refused = restore(&node, &dir).unwrap_err();
    assert!(refused.contains("not a whole snapshot"), "{refused}");
    assert_eq!(pods(&node).await, 0);
    node.assert_nothing_left().await;
}

/// Turns the bits of a byte that is not zero, in the middle of a file.
fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let from = bytes.len() / 2;
    let at = from
        + bytes[from..]
            .iter()
            .position(|byte| !matches!(byte, 0 | 255))
            .unwrap();
    bytes[at] = !bytes[at];
    fs::write(path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_written_goes_on() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    let dir: PathBuf = node.root().join("snapshot");
    let unknown = caisson(&node, &["snapshot", "nobody", dir.to_str().unwrap()]).unwrap_err();
    assert!(unknown.contains("nobody"), "{unknown}");
    let options = PodOptions {
        handler: "host".into(),
        ..PodOptions::default()
    };
    let host = node.pod_with("host", options).await.unwrap();
    let refused = snapshot(&node, &host, &dir).unwrap_err();
    assert!(refused.contains("only pods in microVMs"), "{refused}");
    node.remove(&host).await;

    let pod = node.pod("counter").await;
    let container = node.run(&pod, "count", COUNT).await;
    counts_to(&node, &container, 100).await;
    // An exec under way.
    let exec = node.exec(&container, "sleep 20", 60);
    let (exec, refused) = tokio::join!(exec, async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        tokio::task::block_in_place(|| snapshot(&node, &pod, &dir)).unwrap_err()
    });
    assert!(refused.contains("an exec runs in it"), "{refused}");
    assert_eq!(exec.unwrap().0, 0);
    // More layers than a message to a pod process has descriptors.
    let many = "docker.io/library/layers:many";
    let layers = (0..caisson::snapshot::MOST_LAYERS).fold(ImageMaker::new(), |maker, layer| {
        maker.files(&[("number", &layer.to_string())])
    });
    layers.load(&node, many);
    let of_many = ContainerOptions {
        image: Some(many.into()),
        ..ContainerOptions::default()
    };
    let layered = node.run_with(&pod, "many", "sleep 100000", of_many).await;
    let refused = snapshot(&node, &pod, &dir).unwrap_err();
    assert!(
        refused.contains("image layers, and one with more than 48 cannot be written"),
        "{refused}"
    );
    node.remove_container(&layered.id).await;
    // A disk that has no room for it: half of it is written, and removed.
    let disk = Disk::new(64, &[]);
    disk.leave(8 << 10);
    let full = disk.path().join("snapshot");
    let refused = snapshot(&node, &pod, &full).unwrap_err();
    assert!(refused.contains("No space left"), "{refused}");
    assert!(!full.exists() && !dir.exists());
    drop(disk);
    let said = numbers(&container);
    counts_to(&node, &container, said + 200).await;
    assert_eq!(
        node.status(&container).await.state(),
        ContainerState::ContainerRunning
    );
    node.says(&container, "true").await;
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}
