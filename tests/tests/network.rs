//! The network of pods: what CNI plugins are told and what becomes of their answers, address families, ports of the host,
//! name servers.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::{Container, Node, NodeOptions, Pod, PodOptions, bridged};
use serde_json::Value;

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";
const SERVE: &str = "(while :; do echo served | nc -l -p 8080; done) & trap 'exit 0' TERM; wait";
const V4: &str = r#"[{"subnet": "10.99.0.0/16"}]"#;
const V6: &str = r#"[{"subnet": "fd99::/64"}]"#;

/// A plugin of CNI 1.1.0. It writes down how it is called and fails or hangs where a file says so; what the older
/// versions have of it, Debian's bridge does.
const RECORDER: &str = r#"#!/bin/sh
input=$(cat)
call=$(date +%s%N)-$$
{ echo "$CNI_COMMAND|$CNI_CONTAINERID|$CNI_NETNS|$CNI_IFNAME"; printf '%s\n' "$input"; } >DIR/new.$call
mv DIR/new.$call DIR/calls/$call
while [ -e DIR/hang-$CNI_COMMAND ]; do sleep 0.2; done
[ ! -e DIR/fail-$CNI_COMMAND ] || { cat DIR/fail-$CNI_COMMAND; exit 1; }
case $CNI_COMMAND in
  ADD | CHECK | DEL)
    answer=$(printf '%s' "$input" | sed 's/"1\.1\.0"/"1.0.0"/g; s/"type":"recorder"/"type":"bridge"/' | /usr/lib/cni/bridge)
    code=$?
    while [ -e DIR/late-$CNI_COMMAND ]; do sleep 0.2; done
    printf '%s' "$answer" | sed 's/"1\.0\.0"/"1.1.0"/'
    exit $code ;;
esac
"#;

/// A call of the recorder.
#[derive(Debug)]
struct Call {
    command: String,
    id: String,
    netns: String,
    interface: String,
    input: Value,
}

fn recorded() -> NodeOptions {
    NodeOptions {
        network: Some(bridged("1.1.0", "recorder", &format!("{V4}, {V6}"), "")),
        plugin_seconds: Some(20),
        ..NodeOptions::default()
    }
}

fn install(node: &Node) {
    let (dir, plugins) = (node.dir(), node.dir().join("plugins"));
    fs::create_dir_all(dir.join("calls")).unwrap();
    fs::create_dir_all(&plugins).unwrap();
    let script = RECORDER.replace("DIR", &dir.display().to_string());
    let file = plugins.join("recorder");
    fs::write(dir.join("recorder"), script).unwrap();
    fs::set_permissions(dir.join("recorder"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(dir.join("recorder"), file).unwrap();
}

/// The calls until now, in their order.
fn calls(node: &Node) -> Vec<Call> {
    let entries = fs::read_dir(node.dir().join("calls")).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    files.sort();
    files
        .iter()
        .map(|file| {
            let text = fs::read_to_string(file).unwrap();
            let (head, input) = text.split_once('\n').unwrap();
            let fields: Vec<_> = head.split('|').map(str::to_owned).collect();
            let [command, id, netns, interface] = <[String; 4]>::try_from(fields).unwrap();
            Call {
                command,
                id,
                netns,
                interface,
                input: serde_json::from_str(input).unwrap(),
            }
        })
        .collect()
}

fn forget_calls(node: &Node) {
    for entry in fs::read_dir(node.dir().join("calls")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
}

/// Waits for a call.
async fn call(node: &Node, command: &str, wanted: impl Fn(&Call) -> bool) -> Call {
    let begun = Instant::now();
    loop {
        let all = calls(node);
        let seen = format!("{all:#?}");
        if let Some(call) = all
            .into_iter()
            .find(|call| call.command == command && wanted(call))
        {
            return call;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "no {command} in {seen}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until `NetworkReady` is so, with a part of the message.
async fn network_is(node: &Node, ready: bool, part: &str) {
    let begun = Instant::now();
    loop {
        let request = cri::StatusRequest::default();
        let status = node.runtime.clone().status(request).await.unwrap();
        let conditions = status.into_inner().status.unwrap().conditions;
        let network = conditions
            .iter()
            .find(|c| c.r#type == "NetworkReady")
            .unwrap();
        let reason = if ready { "" } else { "NetworkNotReady" };
        if network.status == ready && network.message.contains(part) && network.reason == reason {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{network:?}, not {part:?}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn ips(node: &Node, pod: &Pod) -> Vec<String> {
    let network = node.pod_status(pod).await.unwrap().network.unwrap();
    std::iter::once(network.ip)
        .chain(network.additional_ips.into_iter().map(|ip| ip.ip))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_are_asked_checked_and_told_what_is_valid() {
    let Some(mut node) = Node::start_with(recorded()).await else {
        return;
    };
    network_is(&node, false, "plugin recorder is not in").await;
    install(&node);
    network_is(&node, true, "").await;
    let status = call(&node, "STATUS", |_| true).await;
    assert!(status.id.is_empty() && status.netns.is_empty() && status.interface.is_empty());
    assert_eq!(status.input["type"], "recorder");
    assert_eq!(status.input["cniVersion"], "1.1.0");

    let a = node.pod("a").await;
    let b = node.pod("b").await;
    let (of_a, of_b) = (ips(&node, &a).await, ips(&node, &b).await);
    let in_a = node.run(&a, "c", SLEEP).await;
    node.run(&b, "c", SERVE).await;
    let add = call(&node, "ADD", |call| call.id == a.id).await;
    assert_eq!(add.interface, "eth0");
    assert!(add.netns.ends_with(&a.id), "{}", add.netns);
    assert!(add.input.get("prevResult").is_none(), "{}", add.input);

    // The daemon ends while a plugin is at work, and in its records is a pod that nobody knows.
    fs::write(node.dir().join("late-ADD"), "").unwrap();
    let runtime = node.runtime.clone();
    let config = cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "half".into(),
            ..cri::PodSandboxMetadata::default()
        }),
        ..a.config.clone()
    };
    let starting = tokio::spawn(async move {
        let request = cri::RunPodSandboxRequest {
            config: Some(config),
            ..cri::RunPodSandboxRequest::default()
        };
        runtime.clone().run_pod_sandbox(request).await
    });
    let half = call(&node, "ADD", |call| call.id != a.id && call.id != b.id)
        .await
        .id;
    let leases = |node: &Node| {
        let dir = fs::read_dir(node.dir().join("leases/test")).unwrap();
        let files = dir.map(|e| fs::read_to_string(e.unwrap().path()).unwrap_or_default());
        files.collect::<Vec<_>>().join("\n")
    };
    let begun = Instant::now();
    while !leases(&node).contains(&half) {
        assert!(begun.elapsed() < Duration::from_secs(60), "no lease");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let stranger = "f".repeat(64);
    node.restart_after(|node| {
        let kept = |id: &str| node.root().join(format!("cni/{id}.json"));
        fs::copy(kept(&a.id), kept(&stranger)).unwrap();
        fs::remove_file(node.dir().join("late-ADD")).unwrap();
        forget_calls(node);
    })
    .await;
    starting.await.unwrap().unwrap_err();
    call(&node, "DEL", |call| call.id == half).await;
    call(&node, "DEL", |call| call.id == stranger).await;
    let gc = call(&node, "GC", |_| true).await;
    assert!(gc.id.is_empty() && gc.netns.is_empty() && gc.interface.is_empty());
    let valid = gc.input["cni.dev/valid-attachments"].as_array().unwrap();
    let mut valid: Vec<_> = valid
        .iter()
        .map(|one| {
            (
                one["containerID"].as_str().unwrap(),
                one["ifname"].as_str().unwrap(),
            )
        })
        .collect();
    valid.sort();
    let mut expected = [(a.id.as_str(), "eth0"), (b.id.as_str(), "eth0")];
    expected.sort();
    assert_eq!(valid, expected);
    for (pod, addresses) in [(&a, &of_a), (&b, &of_b)] {
        let check = call(&node, "CHECK", |call| call.id == pod.id).await;
        let previous = check.input["prevResult"].to_string();
        assert!(
            addresses.iter().all(|ip| previous.contains(ip.as_str())),
            "{previous}"
        );
    }
    assert!(!node.root().join(format!("cni/{stranger}.json")).exists());
    assert!(!leases(&node).contains(&half), "{}", leases(&node));
    // The network is the same: its addresses, and what goes through it.
    assert_eq!(ips(&node, &a).await, of_a);
    let reach = format!("nc -w 10 {} 8080 </dev/null", of_b[0]);
    assert_eq!(node.says(&in_a, &reach).await, "served");

    // A plugin that finds the network otherwise is heard, and the pod goes on.
    fs::write(
        node.dir().join("fail-CHECK"),
        r#"{"code": 100, "msg": "eth0 has another address"}"#,
    )
    .unwrap();
    node.restart().await;
    let begun = Instant::now();
    loop {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: a.id.clone(),
            verbose: true,
        };
        let status = node
            .runtime
            .clone()
            .pod_sandbox_status(request)
            .await
            .unwrap();
        let info = status.into_inner().info["info"].clone();
        if info.contains("failed on CHECK") && info.contains("eth0 has another address") {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{info}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(node.says(&in_a, "echo here").await, "here");

    // Who wants neither has neither.
    let without = recorded().network.unwrap().replace(
        r#""name""#,
        r#""disableGC": true, "disableCheck": true, "name""#,
    );
    node.restart_after(|node| {
        node.set_network(&without);
        forget_calls(node);
    })
    .await;
    node.remove(&a).await;
    node.remove(&b).await;
    let commands: Vec<_> = calls(&node).into_iter().map(|call| call.command).collect();
    assert!(commands.contains(&"DEL".to_owned()), "{commands:?}");
    assert!(
        !commands.iter().any(|c| c == "GC" || c == "CHECK"),
        "{commands:?}"
    );
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_fails_or_hangs_is_told_and_leaves_nothing() {
    let options = NodeOptions {
        plugin_seconds: Some(5),
        ..recorded()
    };
    let Some(node) = Node::start_with(options).await else {
        return;
    };
    install(&node);
    let put = |name: &str, text: &str| fs::write(node.dir().join(name), text).unwrap();
    let take = |name: &str| fs::remove_file(node.dir().join(name)).unwrap();

    put("fail-STATUS", r#"{"code": 50, "msg": "the cable is out"}"#);
    network_is(&node, false, "recorder failed on STATUS: the cable is out").await;
    take("fail-STATUS");
    put("hang-STATUS", "");
    network_is(&node, false, "did not end within 5 s").await;
    take("hang-STATUS");
    network_is(&node, true, "").await;

    put(
        "fail-ADD",
        r#"{"code": 11, "msg": "no address left", "details": "of 254"}"#,
    );
    let error = node
        .pod_with("fails", PodOptions::default())
        .await
        .unwrap_err();
    for part in ["recorder failed on ADD", "no address left (of 254)"] {
        assert!(error.message().contains(part), "{error}");
    }
    take("fail-ADD");
    put("hang-ADD", "");
    let error = node
        .pod_with("hangs", PodOptions::default())
        .await
        .unwrap_err();
    for part in [
        "recorder failed on ADD",
        "did not end within 5 s and was killed",
    ] {
        assert!(error.message().contains(part), "{error}");
    }
    take("hang-ADD");
    node.assert_nothing_left().await;

    // What a plugin does not let go is not lost: the call says so, and the next one goes on from there.
    let pod = node.pod("stays").await;
    put("hang-DEL", "");
    let stop = || {
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        let mut runtime = node.runtime.clone();
        async move { runtime.stop_pod_sandbox(request).await }
    };
    let error = stop().await.unwrap_err();
    assert!(
        error.message().contains("recorder failed on DEL"),
        "{error}"
    );
    let state = node.pod_status(&pod).await.unwrap().state();
    assert_eq!(state, cri::PodSandboxState::SandboxNotready);
    take("hang-DEL");
    stop().await.unwrap();
    node.remove(&pod).await;
    node.assert_nothing_left().await;
    let running = fs::read_dir("/proc").unwrap().flatten().filter(|process| {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("plugins/recorder")
    });
    assert_eq!(running.count(), 0, "plugins run on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_has_the_families_of_its_network() {
    let Some(node) = Node::start().await else {
        return;
    };
    for (ranges, starts) in [
        (V4.to_owned(), &["10.99."][..]),
        (V6.to_owned(), &["fd99:"]),
        (format!("{V4}, {V6}"), &["10.99.", "fd99:"]),
    ] {
        node.set_network(&bridged("1.0.0", "bridge", &ranges, ""));
        let (a, b) = (node.pod("fam-a").await, node.pod("fam-b").await);
        let in_a = node.run(&a, "c", SLEEP).await;
        node.run(&b, "c", SERVE).await;
        for pod in [&a, &b] {
            let ips = ips(&node, pod).await;
            assert_eq!(ips.len(), starts.len(), "{ips:?}");
            for (ip, start) in ips.iter().zip(starts) {
                assert!(ip.starts_with(start), "{ips:?}");
                node.says(&in_a, &format!("ping -c 1 -W 10 {ip}")).await;
            }
        }
        let has = node
            .says(&in_a, "ip -o addr show dev eth0 scope global")
            .await;
        assert_eq!(has.lines().count(), starts.len(), "{has}");
        for ip in ips(&node, &b).await {
            let reach = format!("nc -w 10 {ip} 8080 </dev/null");
            assert_eq!(node.says(&in_a, &reach).await, "served");
        }
        let mtu = node.says(&in_a, "cat /sys/class/net/eth0/mtu").await;
        assert_eq!(mtu, "1400");
        node.remove(&a).await;
        node.remove(&b).await;
    }
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_arrives_is_used_without_a_restart() {
    let options = NodeOptions {
        no_network: true,
        ..NodeOptions::default()
    };
    let Some(node) = Node::start_with(options).await else {
        return;
    };
    network_is(&node, false, "has no .conflist").await;
    node.set_network(&bridged("1.0.0", "bridge", V4, ""));
    network_is(&node, true, "").await;
    let options = PodOptions {
        dns: vec!["10.96.0.10".into(), "fd00::10".into()],
        searches: vec!["a.svc.cluster.local".into(), "cluster.local".into()],
        dns_options: vec!["ndots:5".into(), "timeout:1".into()],
        ..PodOptions::default()
    };
    let pod = node.pod_with("dns", options).await.unwrap();
    let container = node.run(&pod, "c", SLEEP).await;
    let resolver = node.says(&container, "cat /etc/resolv.conf").await;
    for line in [
        "nameserver 10.96.0.10",
        "nameserver fd00::10",
        "search a.svc.cluster.local cluster.local",
        "options ndots:5 timeout:1",
    ] {
        assert!(
            resolver.lines().any(|have| have == line),
            "{line} in {resolver}"
        );
    }
    node.remove(&pod).await;
    node.set_network("{");
    network_is(&node, false, "not JSON").await;
    node.assert_nothing_left().await;
}

/// A network namespace that reaches the node by a wire of its own, not by the pods' bridge.
struct Outside;

impl Outside {
    const NODE: &str = "10.98.0.1";

    fn new() -> Self {
        for command in [
            "netns add ct-outside",
            "link add ct-wire type veth peer name eth0 netns ct-outside",
            "addr add 10.98.0.1/24 dev ct-wire",
            "link set ct-wire up",
            "-n ct-outside addr add 10.98.0.2/24 dev eth0",
            "-n ct-outside link set eth0 up",
            "-n ct-outside route add default via 10.98.0.1",
        ] {
            let done = Command::new("ip")
                .args(command.split(' '))
                .output()
                .unwrap();
            assert!(done.status.success(), "ip {command}: {done:?}");
        }
        Self
    }

    fn connect(&self, port: u16) -> Output {
        let script = format!("busybox nc -w 10 {} {port} </dev/null", Self::NODE);
        Command::new("ip")
            .args(["netns", "exec", "ct-outside", "sh", "-c", &script])
            .output()
            .unwrap()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for command in ["link del ct-wire", "netns del ct-outside"] {
            let _ = Command::new("ip").args(command.split(' ')).output();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_of_the_host_leads_to_the_pod() {
    let outside = Outside::new();
    let portmap = r#", {"type": "portmap", "capabilities": {"portMappings": true}}"#;
    let options = NodeOptions {
        network: Some(bridged("1.0.0", "bridge", V4, portmap)),
        ..NodeOptions::default()
    };
    let Some(mut node) = Node::start_with(options).await else {
        return;
    };
    let port = |host_port, host_ip: &str| cri::PortMapping {
        protocol: cri::Protocol::Tcp.into(),
        container_port: 8080,
        host_port,
        host_ip: host_ip.to_owned(),
    };
    let options = PodOptions {
        ports: vec![port(18080, ""), port(18081, Outside::NODE), port(0, "")],
        ..PodOptions::default()
    };
    let pod = node.pod_with("ports", options).await.unwrap();
    let container = node.run(&pod, "c", SERVE).await;
    node.says(
        &container,
        "until netstat -ltn | grep -q :8080; do sleep 0.2; done",
    )
    .await;
    let served = |port| {
        let said = outside.connect(port);
        assert_eq!(
            String::from_utf8_lossy(&said.stdout),
            "served\n",
            "{said:?}"
        );
    };
    served(18080);
    served(18081);
    node.restart().await;
    served(18080);
    node.remove(&pod).await;
    assert!(!outside.connect(18080).status.success());
    node.assert_nothing_left().await;
}

/// Has a pod send back what the host sends it, both at the same time, and looks at each byte.
async fn there_and_back(node: &Node, container: &Container, bytes: usize) {
    let mut word = 0x9e37_79b9_7f4a_7c15u64;
    let sent: Vec<u8> = std::iter::repeat_with(|| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    })
    .take(bytes / 8)
    .flatten()
    .collect();
    let listen = || TcpListener::bind("10.99.0.1:0").unwrap();
    let (to, from) = (listen(), listen());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let script = format!(
        "nc 10.99.0.1 {} </dev/null | nc 10.99.0.1 {}",
        port(&to),
        port(&from)
    );
    let expected = sent.clone();
    let sender = std::thread::spawn(move || to.accept().unwrap().0.write_all(&sent).unwrap());
    let receiver = std::thread::spawn(move || {
        let mut got = Vec::new();
        from.accept().unwrap().0.read_to_end(&mut got).unwrap();
        got
    });
    node.says(container, &script).await;
    sender.join().unwrap();
    let got = receiver.join().unwrap();
    assert_eq!(got.len(), expected.len());
    assert!(got == expected, "other bytes");
}

/// The cgroup of a process or thread.
fn cgroup(of: &str) -> String {
    fs::read_to_string(format!("/proc/{of}/cgroup")).unwrap()
}

/// Takes vhost-net away from the node until it is dropped.
struct Away;

impl Away {
    const HERE: &str = "/dev/vhost-net";
    const THERE: &str = "/dev/vhost-net-away";

    fn new() -> Self {
        fs::rename(Self::HERE, Self::THERE).unwrap();
        Self
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        let _ = fs::rename(Self::THERE, Self::HERE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_kernel_carries_frames_where_it_can() {
    let options = NodeOptions {
        microvm: "vhost_net = \"auto\"".into(),
        ..NodeOptions::default()
    };
    let Some(mut node) = Node::start_with(options).await else {
        return;
    };
    let pod = node.pod("kernel").await;
    let container = node.run(&pod, "c", SLEEP).await;
    let told = node.inspect(&pod)["confinement"].take();
    assert_eq!(told["vhost_net"], true, "{told}");
    // The kernel's thread is accounted for with the pod: it is one of the process's, or bears the number of one.
    let pid = told["pid"].to_string();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let own: Vec<_> = tasks
        .map(|task| task.unwrap().file_name().into_string().unwrap())
        .collect();
    let all = fs::read_dir("/proc").unwrap().flatten().flat_map(|entry| {
        let task = entry.path().join("task");
        fs::read_dir(task).into_iter().flatten().flatten()
    });
    let workers: Vec<_> = all
        .filter(|task| {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            let number = name.trim().strip_prefix("vhost-");
            number.is_some_and(|number| own.iter().any(|own| own == number))
        })
        .map(|task| task.file_name().into_string().unwrap())
        .collect();
    assert_eq!(workers.len(), 1, "{workers:?} for {own:?}");
    assert_eq!(cgroup(&workers[0]), cgroup(&pid));
    there_and_back(&node, &container, 32 << 20).await;

    // Without it the pod's process does the same.
    let away = Away::new();
    let other = node.pod("process").await;
    let in_other = node.run(&other, "c", SLEEP).await;
    assert_eq!(node.inspect(&other)["confinement"]["vhost_net"], false);
    assert!(node.daemon_log().contains("no vhost-net"));
    there_and_back(&node, &in_other, 4 << 20).await;
    // Who has it keeps it.
    there_and_back(&node, &container, 4 << 20).await;
    node.restart_after(|node| {
        let file = node.dir().join("config.toml");
        let text = fs::read_to_string(&file).unwrap();
        let text = text.replace("vhost_net = \"auto\"", "vhost_net = \"on\"");
        fs::write(file, text).unwrap();
    })
    .await;
    let error = node
        .pod_with("must", PodOptions::default())
        .await
        .unwrap_err();
    assert!(error.message().contains("/dev/vhost-net"), "{error}");
    drop(away);
    there_and_back(&node, &container, 4 << 20).await;
    node.remove(&pod).await;
    node.remove(&other).await;
    node.assert_nothing_left().await;
}
