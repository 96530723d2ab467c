//! Pods that are clones of a template: the same kernel in the same memory, and nothing else in common.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use caisson_tests::{Container, Node, NodeOptions, Pod, PodOptions, pod_process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const WAIT: Duration = Duration::from_secs(120);
const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

async fn node() -> Option<Node> {
    let options = NodeOptions {
        microvm: "templates = true".into(),
        ..NodeOptions::default()
    };
    Node::start_with(options).await
}

/// The steps of the pod's start.
fn timeline(node: &Node, pod: &Pod) -> String {
    let output = node.caisson(&["timeline", &pod.id]);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether the pod is a clone, as its timeline says.
fn is_clone(node: &Node, pod: &Pod) -> bool {
    let steps = timeline(node, pod);
    let (resumed, booted) = (steps.contains("resume guest"), steps.contains("boot guest"));
    assert!(resumed != booted, "{steps}");
    resumed
}

/// The pod's address.
async fn ip(node: &Node, pod: &Pod) -> String {
    let status = node.pod_status(pod).await.unwrap();
    status.network.unwrap().ip
}

/// Has a pod with this address reach its gateway, which is the host: frames go both ways, so the pod's MAC is the one that CNI
/// gave it.
async fn ping_host(node: &Node, container: &Container, ip: &str) {
    let gateway = format!("{}.1", ip.rsplit_once('.').unwrap().0);
    let ping = format!("ping -c 1 -W 20 {gateway}");
    node.says(container, &ping).await;
}

async fn sleeper(node: &Node, pod: &Pod) -> Container {
    node.run(pod, "c", SLEEP).await
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_have_nothing_in_common_that_is_a_secret() {
    let Some(node) = node().await else { return };
    node.wait_for_templates(2).await;
    let mut facts: Vec<BTreeSet<String>> = Vec::new();
    for name in ["one", "two", "three"] {
        let pod = node.pod(name).await;
        assert!(is_clone(&node, &pod), "{}", node.daemon_log());
        let container = sleeper(&node, &pod).await;
        // What a guest would be told apart by, and what keys are made of. AT_RANDOM and the places of the stack, the heap and
        // the libraries are of a new process.
        let script = "cat /proc/sys/kernel/random/boot_id; cat /proc/sys/kernel/random/uuid; \
            head -c 16 /dev/urandom | od -An -tx1; \
            sed -n 's/-.*\\[stack\\]/ stack/p;s/-.*\\[heap\\]/ heap/p' /proc/self/maps; \
            od -An -tx8 /proc/self/auxv; cat /sys/class/net/eth0/address; hostname";
        let said = node.says(&container, script).await;
        let lines: BTreeSet<String> = said.lines().map(|line| line.trim().to_owned()).collect();
        assert!(said.contains(name), "the hostname: {said}");
        facts.push(lines);

        let now = node.says(&container, "date +%s").await;
        let now: i64 = now.trim().parse().unwrap();
        let host = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(
            (host as i64 - now).abs() <= 5,
            "{now} in the pod, {host} here"
        );
        let ip = ip(&node, &pod).await;
        let shown = node.says(&container, "ip addr show eth0").await;
        assert!(shown.contains(&format!("{ip}/")), "{ip}: {shown}");
        ping_host(&node, &container, &ip).await;
    }
    // What is the same in two of them is no secret: auxiliary values of the kernel's own, such as page and clock sizes.
    for (a, b) in [(0, 1), (0, 2), (1, 2)] {
        let both: Vec<_> = facts[a].intersection(&facts[b]).collect();
        let secret = |line: &&&String| {
            line.contains('-')
                || line.split(' ').count() == 16
                || line.ends_with("stack")
                || line.ends_with("heap")
        };
        assert_eq!(both.iter().filter(secret).count(), 0, "{both:#?}");
        assert!(facts[a].len() >= 8, "{:#?}", facts[a]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_a_pod_like_any_other() {
    let Some(node) = node().await else { return };
    node.wait_for_templates(2).await;
    let pod = node.pod("clone").await;
    assert!(is_clone(&node, &pod), "{}", node.daemon_log());
    let container = sleeper(&node, &pod).await;
    let private = |pod| node.stats(pod)["private_on_host"].as_u64().unwrap();
    let before = private(&pod);
    // More memory than the template has ever touched, and more than its page cache; then a disk that remembers.
    let script = "head -c 100000000 /dev/urandom >/tmp/a && cp /tmp/a /tmp/b && sync && \
        echo 3 >/proc/sys/vm/drop_caches 2>/dev/null; cmp /tmp/a /tmp/b && echo same";
    assert_eq!(node.says(&container, script).await.trim(), "same");
    // What of it was memory goes back to the host, whether the template had something there or not.
    let full = private(&pod);
    assert!(full > before + (32 << 20), "{before}, then {full}");
    node.says(&container, "rm /tmp/a /tmp/b").await;
    node.holds_less(&pod, before + (full - before) / 2).await;
    let other = node.run(&pod, "d", "echo out; echo err >&2; exit 7").await;
    assert_eq!(node.ended(&other).await.exit_code, 7);
    // The template is as it was: the next clone begins as this one did.
    let next = node.pod("next").await;
    assert!(is_clone(&node, &next), "{}", node.daemon_log());
    let fresh = sleeper(&node, &next).await;
    assert_eq!(node.says(&fresh, "ls /tmp | wc -l").await.trim(), "0");
    node.remove(&pod).await;
    node.says(&fresh, "echo 3").await;
    node.remove(&next).await;
    node.assert_nothing_left().await;
}

/// Whether the pod has grown beyond its template: its guest then has a memory device.
async fn has_grown(node: &Node, container: &Container) -> bool {
    let script = "cat /sys/bus/virtio/devices/*/device";
    // virtio 1.2 §5: the memory device is 24.
    node.says(container, script).await.contains("0x0018")
}

/// What a guest's kernel derives from its memory, by name.
async fn limits(node: &Node, container: &Container) -> Vec<(String, u64)> {
    let script = "cd /proc/sys; for i in kernel/threads-max fs/file-max net/ipv4/tcp_mem net/ipv4/udp_mem \
        net/ipv4/tcp_rmem net/ipv4/tcp_wmem net/netfilter/nf_conntrack_max user/max_user_namespaces; do \
        [ ! -e $i ] || for n in $(cat $i); do echo $i $n; done; done; echo processes $(ulimit -u); \
        echo memory $(sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)";
    let said = node.says(container, script).await;
    let parts = said.lines().map(|line| {
        let (name, number) = line.split_once(' ').unwrap();
        (name.to_owned(), number.parse().unwrap_or(u64::MAX))
    });
    let limits: Vec<_> = parts.collect();
    assert!(limits.len() > 10, "{said}");
    limits
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_grows_to_its_pods_size_until_there_is_a_template_of_that() {
    let Some(node) = node().await else { return };
    node.wait_for_templates(2).await;
    let shape = || PodOptions {
        millicpus: 2000,
        memory: 700 << 20,
        ..PodOptions::default()
    };
    let mut grown = Vec::new();
    for name in ["first", "second"] {
        let pod = node.pod_with(name, shape()).await.unwrap();
        assert!(is_clone(&node, &pod), "{}", node.daemon_log());
        let container = sleeper(&node, &pod).await;
        assert!(has_grown(&node, &container).await);
        both_processors_work(&node, &container).await;
        // All of the memory is there at once.
        let script = "dd if=/dev/zero of=/dev/null bs=650M count=1 2>/dev/null && echo all";
        assert_eq!(node.says(&container, script).await.trim(), "all");
        grown = limits(&node, &container).await;
        ping_host(&node, &container, &ip(&node, &pod).await).await;
        node.remove(&pod).await;
    }
    node.wait_for_templates(3).await;
    let pod = node.pod_with("third", shape()).await.unwrap();
    assert!(is_clone(&node, &pod), "{}", node.daemon_log());
    let container = sleeper(&node, &pod).await;
    assert!(!has_grown(&node, &container).await);
    both_processors_work(&node, &container).await;
    // A kernel that booted with all of it has no other limits than one that has grown.
    let booted = limits(&node, &container).await;
    for ((name, grown), (_, booted)) in grown.iter().zip(&booted) {
        let apart = grown.abs_diff(*booted);
        assert!(
            apart <= booted / 10,
            "{name}: {grown} grown, {booted} booted"
        );
    }
    assert_eq!(grown.len(), booted.len());
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

async fn both_processors_work(node: &Node, container: &Container) {
    assert_eq!(node.says(container, "nproc").await.trim(), "2");
    let script = "for i in 1 2; do (i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done) & done; wait";
    let said = node.says(container, script).await;
    assert_eq!(said.matches("done").count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_has_grown_goes_on_from_a_snapshot() {
    let Some(node) = node().await else { return };
    node.wait_for_templates(2).await;
    let shape = PodOptions {
        millicpus: 2000,
        memory: 333 << 20,
        ..PodOptions::default()
    };
    let pod = node.pod_with("grown", shape).await.unwrap();
    let container = sleeper(&node, &pod).await;
    assert!(has_grown(&node, &container).await);
    let before = limits(&node, &container).await;
    let dir = node.root().join("snapshot");
    let dir = dir.to_str().unwrap();
    for command in [&["snapshot", &pod.id, dir][..], &["restore", dir]] {
        let output = node.caisson(command);
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(limits(&node, &container).await, before);
    both_processors_work(&node, &container).await;
    let script = "dd if=/dev/zero of=/dev/null bs=300M count=1 2>/dev/null && echo all";
    assert_eq!(node.says(&container, script).await.trim(), "all");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_is_damaged_costs_a_boot_and_no_more() {
    let Some(mut node) = node().await else { return };
    node.wait_for_templates(2).await;
    for template in node.templates() {
        let state = template.join("state");
        let text = fs::read(&state).unwrap();
        fs::write(&state, &text[..text.len() / 2]).unwrap();
    }
    // First the one of the pod's size, then the one that would grow.
    for left in [1, 0] {
        let pod = node.pod("pod").await;
        assert!(!is_clone(&node, &pod));
        assert_eq!(node.templates().len(), left);
        node.remove(&pod).await;
    }

    // A daemon that dies while it makes one leaves a machine behind, which the next one takes back; and it makes its own.
    node.restart_after(|_| ()).await;
    let deadline = Instant::now() + WAIT;
    let making = node.state().join("templates/pods");
    while fs::read_dir(&making).map_or(0, Iterator::count) == 0 {
        assert!(Instant::now() < deadline, "{}", node.daemon_log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.restart().await;
    node.wait_for_templates(2).await;
    let pod = node.pod("pod").await;
    assert!(is_clone(&node, &pod), "{}", node.daemon_log());
    node.remove(&pod).await;
    node.assert_nothing_left().await;
    assert_eq!(fs::read_dir(&making).unwrap().count(), 0);
}

/// Waits until so many machines wait for their pods, beside those of these pods; their directories.
async fn wait_for_ready(node: &Node, count: usize, pods: &[&Pod]) -> Vec<PathBuf> {
    let known: Vec<_> = pods.iter().map(|pod| node.pod_directory(pod)).collect();
    let deadline = Instant::now() + WAIT;
    loop {
        let log = node.daemon_log();
        let said: Vec<_> = log
            .lines()
            .filter(|line| line.contains("waits for its pod"))
            .collect();
        let mut there = node.pod_directories();
        there.retain(|directory| !known.contains(directory));
        let wait = there.iter().all(|directory| {
            let id = directory.file_name().unwrap().to_string_lossy();
            said.iter().any(|line| line.contains(&*id))
        });
        if wait && there.len() == count {
            return there;
        }
        assert!(Instant::now() < deadline, "{there:?}: {log}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Whether the pod got a machine that waited for it, as its timeline says.
fn was_ready(node: &Node, pod: &Pod) -> bool {
    timeline(node, pod).contains("take ready machine")
}

fn cgroup(node: &Node, pod: &Pod) -> String {
    let process = pod_process(&node.pod_directory(pod)).unwrap();
    fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_waits_becomes_the_next_pod() {
    let options = NodeOptions {
        microvm: "templates = true\nready_clones = 2".into(),
        ..NodeOptions::default()
    };
    let Some(mut node) = Node::start_with(options).await else {
        return;
    };
    let waiting = wait_for_ready(&node, 2, &[]).await;
    // Nobody sees them: they are no pods.
    let listed = node.caisson(&["pods"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let short =
        |directory: &PathBuf| directory.file_name().unwrap().to_string_lossy()[..12].to_owned();
    assert!(
        !waiting.iter().any(|one| listed.contains(&short(one))),
        "{listed}"
    );

    let parent = "/caisson-test/ready";
    let options = PodOptions {
        cgroup_parent: parent.into(),
        ..PodOptions::default()
    };
    let pod = node.pod_with("one", options).await.unwrap();
    assert!(was_ready(&node, &pod), "{}", node.daemon_log());
    assert!(waiting.contains(&node.pod_directory(&pod)));
    let place = cgroup(&node, &pod);
    assert!(place.contains(parent), "{place}");
    let container = sleeper(&node, &pod).await;
    assert_eq!(node.says(&container, "hostname").await.trim(), "one");
    ping_host(&node, &container, &ip(&node, &pod).await).await;

    // A pod of another size, or without a network, is none of theirs.
    wait_for_ready(&node, 2, &[&pod]).await;
    let larger = PodOptions {
        memory: 160 << 20,
        ..PodOptions::default()
    };
    let other = node.pod_with("larger", larger).await.unwrap();
    assert!(!was_ready(&node, &other));
    node.remove(&other).await;

    // Those that wait end with the daemon, whose pods go on; its successor has others.
    let before = wait_for_ready(&node, 2, &[&pod]).await;
    node.restart().await;
    let after = wait_for_ready(&node, 2, &[&pod]).await;
    assert!(before.iter().all(|old| !after.contains(old)), "{after:?}");
    assert_eq!(node.says(&container, "hostname").await.trim(), "one");

    // One that has died while it waited costs the pod its advantage and no more.
    for directory in &after {
        kill(pod_process(directory).unwrap(), Signal::SIGKILL).unwrap();
    }
    let next = node.pod("two").await;
    let fresh = sleeper(&node, &next).await;
    assert_eq!(node.says(&fresh, "hostname").await.trim(), "two");
    wait_for_ready(&node, 2, &[&pod, &next]).await;

    // A daemon that is told to stop leaves its pods and nothing else.
    node.remove(&next).await;
    wait_for_ready(&node, 2, &[&pod]).await;
    kill(Pid::from_raw(node.daemon_pid() as i32), Signal::SIGTERM).unwrap();
    let deadline = Instant::now() + WAIT;
    while !node.is_dead() {
        assert!(Instant::now() < deadline, "{}", node.daemon_log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(node.pod_directories(), [node.pod_directory(&pod)]);
    node.start_again(None);
    node.wait_until_serving().await;
    assert_eq!(node.says(&container, "hostname").await.trim(), "one");
}
