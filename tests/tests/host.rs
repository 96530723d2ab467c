//! Pods on the host: what a microVM cannot be, and nothing left behind.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::{Container, ContainerOptions, Line, Node, Pod, PodOptions, read_log};
use cri::{MountPropagation, NamespaceMode};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// Namespaces that are the node's as named.
fn of_node(network: bool, pid: bool, ipc: bool) -> cri::NamespaceOption {
    let mode = |node, otherwise: NamespaceMode| {
        let mode = if node { NamespaceMode::Node } else { otherwise };
        mode.into()
    };
    cri::NamespaceOption {
        network: mode(network, NamespaceMode::Pod),
        pid: mode(pid, NamespaceMode::Container),
        ipc: mode(ipc, NamespaceMode::Pod),
        ..cri::NamespaceOption::default()
    }
}

fn on_host(namespaces: cri::NamespaceOption) -> PodOptions {
    PodOptions {
        handler: "host".into(),
        namespaces: Some(namespaces),
        ..PodOptions::default()
    }
}

async fn host_pod(node: &Node, name: &str, namespaces: &cri::NamespaceOption) -> Pod {
    node.pod_with(name, on_host(namespaces.clone()))
        .await
        .unwrap_or_else(|status| panic!("RunPodSandbox {name}: {status}"))
}

async fn run(node: &Node, pod: &Pod, name: &str, namespaces: &cri::NamespaceOption) -> Container {
    let options = ContainerOptions {
        namespaces: Some(namespaces.clone()),
        ..ContainerOptions::default()
    };
    node.run_with(pod, name, SLEEP, options).await
}

fn text(line: &Line) -> String {
    String::from_utf8_lossy(&line.content).into_owned()
}

fn namespace(kind: &str) -> String {
    let link = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
    link.to_string_lossy().into_owned()
}

async fn namespace_of(node: &Node, container: &Container, kind: &str) -> String {
    let script = format!("readlink /proc/self/ns/{kind}");
    node.says(container, &script).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_on_the_host_is_a_pod_like_any_other() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    let own = of_node(false, false, false);
    let pod = host_pod(&node, "plain", &own).await;
    let container = run(&node, &pod, "c", &own).await;
    for kind in ["net", "uts", "ipc", "mnt", "pid", "cgroup"] {
        let inside = namespace_of(&node, &container, kind).await;
        assert_ne!(inside, namespace(kind), "{kind}");
    }
    // CNI's address is the container's, the gateway answers, and so does the pod from the node.
    let ip = node.pod_status(&pod).await.unwrap().network.unwrap().ip;
    assert!(!ip.is_empty());
    let addresses = node.says(&container, "ip -4 addr show eth0").await;
    assert!(addresses.contains(&ip), "{addresses}");
    node.says(&container, "ping -c 1 -W 5 10.99.0.1").await;
    let answered = Command::new("busybox")
        .args(["ping", "-c", "1", "-W", "5", &ip])
        .output();
    assert!(answered.unwrap().status.success());
    assert!(
        node.says(&container, "ip link show lo")
            .await
            .contains("UP")
    );

    assert_eq!(
        node.says(&container, "hostname; cat /etc/hostname").await,
        "plain\nplain"
    );
    assert!(node.says(&container, "cat /etc/hosts").await.contains(&ip));
    assert_eq!(node.says(&container, "echo x >/file; cat /file").await, "x");
    assert_eq!(
        node.exec(&container, "echo e >&2; exit 3", 60)
            .await
            .unwrap()
            .0,
        3
    );
    // Nothing of the host but what the image has.
    assert_eq!(
        node.says(
            &container,
            "ls -d /work /boot /caisson-agent 2>/dev/null; true"
        )
        .await,
        ""
    );

    let (status, lines) = node
        .output(&pod, "out", "echo one; echo two >&2; exit 5")
        .await;
    assert_eq!((status.exit_code, status.reason.as_str()), (5, "Error"));
    let said: Vec<_> = lines.iter().map(text).collect();
    assert!(
        said.contains(&"one".to_owned()) && said.contains(&"two".to_owned()),
        "{said:?}"
    );

    let request = cri::ContainerStatsRequest {
        container_id: container.id.clone(),
    };
    let stats = node.runtime.clone().container_stats(request).await.unwrap();
    let stats = stats.into_inner().stats.unwrap();
    assert!(stats.memory.unwrap().usage_bytes.unwrap().value > 0);
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let request = cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let stats = node
        .runtime
        .clone()
        .pod_sandbox_stats(request)
        .await
        .unwrap();
    let linux = stats.into_inner().stats.unwrap().linux.unwrap();
    let processes = linux.process.unwrap().process_count.unwrap().value;
    assert!(
        (2..50).contains(&processes),
        "{processes} of the pod, not of the host"
    );

    node.stop_container(&container, 10).await;
    assert_eq!(node.status(&container).await.exit_code, 0);
    node.remove(&pod).await;
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writable_layers_have_a_limit_of_the_pod() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    let own = of_node(false, false, false);
    let pod = host_pod(&node, "full", &own).await;
    let (a, b) = (
        run(&node, &pod, "a", &own).await,
        run(&node, &pod, "b", &own).await,
    );
    node.says(&a, "fallocate -l 1200M /first").await;
    for script in ["fallocate -l 1200M /second", "fallocate -l 3000M /third"] {
        let (code, _, error) = node.exec(&b, script, 60).await.unwrap();
        assert_ne!(code, 0, "{script}");
        assert!(error.contains("No space left"), "{error}");
    }
    node.says(&a, "rm /first").await;
    node.says(&b, "fallocate -l 1200M /second").await;
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_and_a_shared_pid_namespace_is_shared() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    let options = PodOptions {
        handler: "host".into(),
        share_pids: true,
        ..PodOptions::default()
    };
    let pod = node.pod_with("limits", options).await.unwrap();
    let shared = || ContainerOptions {
        share_pids: true,
        ..ContainerOptions::default()
    };
    let a = node.run_with(&pod, "a", SLEEP, shared()).await;
    let b = node.run_with(&pod, "b", "exec sleep 98765", shared()).await;
    assert!(node.says(&a, "ps").await.contains("sleep 98765"));
    node.stop_container(&b, 0).await;

    let options = ContainerOptions {
        memory: 32 << 20,
        ..shared()
    };
    let script = "x=x; while :; do x=$x$x; done";
    let hungry = node.run_with(&pod, "hungry", script, options).await;
    let status = node.ended(&hungry).await;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    assert_eq!(node.says(&a, "echo well").await, "well");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_namespaces_are_shared_on_request() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    let all = of_node(true, true, true);
    let pod = host_pod(&node, "agent", &all).await;
    let container = run(&node, &pod, "c", &all).await;
    for kind in ["net", "uts", "ipc", "pid"] {
        let inside = namespace_of(&node, &container, kind).await;
        assert_eq!(inside, namespace(kind), "{kind}");
    }
    // The host's interfaces, its name, this very process, its shared memory.
    let mut interfaces: Vec<_> = fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    interfaces.sort();
    let seen = node.says(&container, "ls /sys/class/net | sort").await;
    assert_eq!(seen.split_whitespace().collect::<Vec<_>>(), interfaces);
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(node.says(&container, "hostname").await, name.trim());
    assert_eq!(node.says(&container, "echo $HOSTNAME").await, name.trim());
    let script = format!("cat /proc/{}/comm", std::process::id());
    let own = fs::read_to_string("/proc/self/comm").unwrap();
    assert_eq!(node.says(&container, &script).await, own.trim());
    node.says(&container, "echo here >/dev/shm/caisson-host-test")
        .await;
    let shared = Path::new("/dev/shm/caisson-host-test");
    assert_eq!(fs::read_to_string(shared).unwrap(), "here\n");
    fs::remove_file(shared).unwrap();
    assert_eq!(node.pod_status(&pod).await.unwrap().network.unwrap().ip, "");

    // What the pod does not share, its containers cannot have.
    let own = of_node(false, false, false);
    let other = host_pod(&node, "other", &own).await;
    for namespaces in [
        of_node(true, false, false),
        of_node(false, true, false),
        of_node(false, false, true),
    ] {
        let options = ContainerOptions {
            namespaces: Some(namespaces),
            ..ContainerOptions::default()
        };
        let error = node.create(&other, "c", SLEEP, options).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    }
    // A parameter of the node is not a pod's to set.
    let mut options = on_host(all.clone());
    let key = "net.ipv4.ip_unprivileged_port_start";
    options.sysctls.insert(key.into(), "0".into());
    let error = node.pod_with("sysctl", options).await.unwrap_err();
    assert!(
        error.message().contains("ip_unprivileged_port_start"),
        "{error}"
    );
    let mut options = on_host(own);
    options.sysctls.insert(key.into(), "7".into());
    let pod_with_sysctl = node.pod_with("sysctl", options).await.unwrap();
    let reader = node.run(&pod_with_sysctl, "c", SLEEP).await;
    let value = node
        .says(&reader, &format!("cat /proc/sys/{}", key.replace('.', "/")))
        .await;
    assert_eq!(value, "7");
    for pod in [&pod, &other, &pod_with_sysctl] {
        node.remove(pod).await;
    }
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_costs_no_byte_and_no_exit_code() {
    let Some(mut node) = Node::start_allowing_host().await else {
        return;
    };
    let own = of_node(false, false, false);
    let pod = host_pod(&node, "lasting", &own).await;
    const LINES: usize = 3000;
    let script = format!(
        "i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); [ $((i % 300)) = 0 ] && sleep 1; done; exit 7"
    );
    let counting = node.run(&pod, "counting", &script).await;
    let lasting = node.run(&pod, "lasting", SLEEP).await;
    node.restart().await;
    let status = node.ended(&counting).await;
    assert_eq!(status.exit_code, 7);
    let said: Vec<_> = read_log(&counting.log)
        .into_iter()
        .map(|line| text(&line))
        .collect();
    let wanted: Vec<_> = (0..LINES).map(|i| format!("line {i}")).collect();
    assert_eq!(said, wanted);
    assert_eq!(node.says(&lasting, "echo still here").await, "still here");
    assert_eq!(
        node.pod_status(&pod).await.unwrap().state(),
        cri::PodSandboxState::SandboxReady
    );
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_ends_with_its_agent_or_its_pod_process() {
    let Some(mut node) = Node::start_allowing_host().await else {
        return;
    };
    let all = of_node(true, true, true);
    for (round, victim) in ["caisson-agent", "caisson-vmm", "caisson-agent"]
        .iter()
        .enumerate()
    {
        let pod = host_pod(&node, &format!("victim-{round}"), &all).await;
        let options = ContainerOptions {
            namespaces: Some(all.clone()),
            ..ContainerOptions::default()
        };
        let marked = format!("exec sleep 4{round}4242");
        let container = node.run_with(&pod, "c", &marked, options).await;
        let sleeping = || process(|line| line.contains(&format!("sleep\04{round}4242")));
        // The shell has still to become it.
        wait_until("the container's process runs", || sleeping().is_some()).await;
        let found = process(|line| {
            line.split('\0')
                .next()
                .is_some_and(|name| name.ends_with(victim))
        });
        kill(found.expect("it runs"), Signal::SIGKILL).unwrap();
        if round == 2 {
            // Also when nobody looks.
            node.restart().await;
        }
        let status = node.ended(&container).await;
        assert_ne!(status.exit_code, 0);
        wait_until("no process outlives its pod", || sleeping().is_none()).await;
        let state = node.pod_status(&pod).await.unwrap().state();
        assert_eq!(state, cri::PodSandboxState::SandboxNotready);
        node.remove(&pod).await;
    }
    node.assert_nothing_left().await;
}

async fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "not so: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A process whose command line, with a NUL after each argument, is as asked.
fn process(wanted: impl Fn(&str) -> bool) -> Option<Pid> {
    fs::read_dir("/proc").unwrap().find_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        wanted(&String::from_utf8_lossy(&line)).then(|| Pid::from_raw(pid))
    })
}

fn bind(host: &Path, container: &str, propagation: MountPropagation) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        propagation: propagation.into(),
        ..cri::Mount::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_vm_refuses_works_on_the_host() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    let own = of_node(false, false, false);
    let pod = host_pod(&node, "files", &own).await;
    let shared = node.dir().join("shared");
    fs::create_dir(&shared).unwrap();
    let none = None::<&str>;
    mount(Some("t"), &shared, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, &shared, none, MsFlags::MS_SHARED, none).unwrap();
    let private = node.dir().join("private");
    fs::create_dir(&private).unwrap();
    mount(Some("t"), &private, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, &private, none, MsFlags::MS_PRIVATE, none).unwrap();
    fs::write(private.join("file"), "content").unwrap();
    let socket = node.dir().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();

    let options = ContainerOptions {
        namespaces: Some(own.clone()),
        privileged: true,
        mounts: vec![
            bind(&shared, "/both", MountPropagation::PropagationBidirectional),
            bind(&shared, "/in", MountPropagation::PropagationHostToContainer),
            bind(&shared, "/none", MountPropagation::PropagationPrivate),
            bind(
                &private.join("file"),
                "/single",
                MountPropagation::PropagationPrivate,
            ),
            bind(&socket, "/socket", MountPropagation::PropagationPrivate),
        ],
        ..ContainerOptions::default()
    };
    let container = node.run_with(&pod, "privileged", SLEEP, options).await;
    assert_eq!(node.says(&container, "cat /single").await, "content");
    node.says(&container, "test -S /socket").await;
    // From the container to the host, and from the host to those who asked.
    node.says(
        &container,
        "mkdir /both/a && mount -t tmpfs a /both/a && touch /both/a/made",
    )
    .await;
    assert!(shared.join("a/made").exists());
    fs::create_dir(shared.join("b")).unwrap();
    mount(
        Some("b"),
        &shared.join("b"),
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
    fs::write(shared.join("b/made"), "").unwrap();
    node.says(
        &container,
        "test -e /both/b/made && test -e /in/b/made && test ! -e /none/b/made",
    )
    .await;
    // All of the host's devices and cgroups.
    node.says(
        &container,
        "test -c /dev/loop-control && test -b /dev/loop0",
    )
    .await;
    let groups = node
        .says(&container, "cat /proc/self/cgroup; ls /sys/fs/cgroup")
        .await;
    assert!(
        groups.contains("/caisson-") && groups.contains("init.scope\n")
            || groups.contains("caisson"),
        "{groups}"
    );

    // Not privileged: what was given, and nothing more.
    let options = ContainerOptions {
        namespaces: Some(own.clone()),
        devices: vec![cri::Device {
            host_path: "/dev/loop-control".into(),
            container_path: "/dev/given".into(),
            permissions: "r".into(),
        }],
        mounts: vec![cri::Mount {
            readonly: true,
            ..bind(&private, "/ro", MountPropagation::PropagationPrivate)
        }],
        ..ContainerOptions::default()
    };
    let plain = node.run_with(&pod, "plain", SLEEP, options).await;
    node.says(&plain, "exec 3</dev/given").await;
    for refused in [
        "exec 3>/dev/given",
        "echo x >/ro/file",
        "mount -t tmpfs x /mnt",
        "cat /dev/loop0",
    ] {
        let (code, ..) = node.exec(&plain, refused, 60).await.unwrap();
        assert_ne!(code, 0, "{refused}");
    }
    // A mount that cannot propagate.
    let options = ContainerOptions {
        mounts: vec![bind(
            &private,
            "/x",
            MountPropagation::PropagationBidirectional,
        )],
        ..ContainerOptions::default()
    };
    let error = node.create(&pod, "x", SLEEP, options).await.unwrap_err();
    assert!(error.message().contains("make-rshared"), "{error}");

    node.remove(&pod).await;
    for path in ["shared/a", "shared/b", "shared", "private"] {
        umount2(&node.dir().join(path), MntFlags::empty()).unwrap();
    }
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn apparmor_profiles_hold_on_the_host() {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if enabled.unwrap_or_default().trim() != "Y" || !Path::new("/sbin/apparmor_parser").exists() {
        eprintln!("skipped: needs AppArmor and apparmor_parser");
        return;
    }
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    load_profile(
        "profile caisson-test flags=(attach_disconnected) { file, deny /denied/** w, capability, network, signal, }",
    );
    let own = of_node(false, false, false);
    let pod = host_pod(&node, "apparmor", &own).await;
    let with = |profile: &str| ContainerOptions {
        apparmor: Some(profile.to_owned()),
        ..ContainerOptions::default()
    };
    let confined = node
        .run_with(&pod, "confined", SLEEP, with("localhost/caisson-test"))
        .await;
    let (code, ..) = node
        .exec(&confined, "mkdir /denied && echo x >/denied/file", 60)
        .await
        .unwrap();
    assert_ne!(code, 0);
    node.says(&confined, "echo x >/allowed").await;
    let current = node.says(&confined, "cat /proc/self/attr/current").await;
    assert!(current.starts_with("caisson-test (enforce)"), "{current}");
    let plain = node.run(&pod, "plain", SLEEP).await;
    let current = node.says(&plain, "cat /proc/self/attr/current").await;
    assert!(
        current.starts_with("caisson-default (enforce)"),
        "{current}"
    );
    let error = node
        .create(&pod, "missing", SLEEP, with("no-such-profile"))
        .await
        .unwrap_err();
    assert!(error.message().contains("no-such-profile"), "{error}");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

fn load_profile(text: &str) {
    let mut parser = Command::new("/sbin/apparmor_parser")
        .args(["--replace", "--skip-cache"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    parser
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    assert!(parser.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_on_the_host_are_refused_until_they_are_allowed() {
    let Some(node) = Node::start().await else {
        return;
    };
    let error = node
        .pod_with("host", on_host(of_node(true, false, false)))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("allow_host"), "{error}");
    assert_eq!(handlers(&node).await, ["", "microvm"]);
    let in_vm = |namespaces| PodOptions {
        namespaces: Some(namespaces),
        ..PodOptions::default()
    };
    let error = node
        .pod_with("vm", in_vm(of_node(true, false, false)))
        .await
        .unwrap_err();
    assert!(
        error.message().contains("hostNetwork") && error.message().contains("allow_host"),
        "{error}"
    );
    drop(node);

    let Some(node) = self::Node::start_allowing_host().await else {
        return;
    };
    assert_eq!(handlers(&node).await, ["", "host", "microvm"]);
    for (namespaces, name) in [
        (of_node(true, false, false), "hostNetwork"),
        (of_node(false, true, false), "hostPID"),
        (of_node(false, false, true), "hostIPC"),
    ] {
        let error = node.pod_with("vm", in_vm(namespaces)).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(
            error.message().contains(name) && error.message().contains("`host`"),
            "{error}"
        );
    }
    node.assert_nothing_left().await;
}

async fn handlers(node: &Node) -> Vec<String> {
    let status = node
        .runtime
        .clone()
        .status(cri::StatusRequest::default())
        .await
        .unwrap();
    let mut names: Vec<_> = status
        .into_inner()
        .runtime_handlers
        .into_iter()
        .map(|handler| handler.name)
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_is_taken_back() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    // The agent's program is not a program.
    let broken = node.dir().join("broken-agent");
    fs::write(&broken, "").unwrap();
    let config: PathBuf = node.dir().join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("agent = "))
        .unwrap();
    let changed = text.replace(line, &format!("agent = \"{}\"", broken.display()));
    fs::write(&config, changed).unwrap();
    let mut node = node;
    node.restart().await;
    let own = of_node(false, false, false);
    let error = node.pod_with("broken", on_host(own)).await.unwrap_err();
    assert!(error.message().contains("broken-agent"), "{error}");
    node.assert_nothing_left().await;
}
