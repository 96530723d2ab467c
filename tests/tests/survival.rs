//! Pods whose machine, process or agent hangs, stops or dies, and a node that is rebooted: all of it is told with its
//! reason, can be stopped and removed, and leaves nothing. The neighbours go on.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::{ContainerOptions, Node, Pod, PodOptions, pod_process};
use caisson_vmm_protocol::{Channel, PROTOCOL_VERSION, Reply, Request, VmState, VmStatus};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// The process of a pod.
fn process(node: &Node, pod: &Pod) -> Pid {
    pod_process(&node.pod_directory(pod)).unwrap()
}

/// The agent of a pod on the host.
fn agent(node: &Node, pod: &Pod) -> Pid {
    let group = fs::read_to_string(node.pod_directory(pod).join("cgroup")).unwrap();
    let agents = fs::read_to_string(PathBuf::from(group).join("sandbox/agent/cgroup.procs"));
    let agents = agents.unwrap();
    Pid::from_raw(agents.lines().next().unwrap().parse().unwrap())
}

/// Asks a pod's process what a daemon would.
fn ask(node: &Node, pod: &Pod, request: &Request) -> Reply {
    let stream = UnixStream::connect(node.pod_directory(pod).join("control.sock")).unwrap();
    let mut channel = Channel::new(stream);
    channel.send(request, &[]).unwrap();
    channel.recv::<Reply>().unwrap().message
}

/// The pod's state, and the reason for it.
async fn state(node: &Node, pod: &Pod) -> (bool, String) {
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let answer = node.runtime.clone().pod_sandbox_status(request).await;
    let answer = answer.unwrap().into_inner();
    let info: serde_json::Value = serde_json::from_str(&answer.info["info"]).unwrap();
    let ready = answer.status.unwrap().state() == cri::PodSandboxState::SandboxReady;
    (ready, info["reason"].as_str().unwrap().to_owned())
}

/// Waits until the pod is ready or not, with a reason of which this is a part; the reason.
async fn becomes(node: &Node, pod: &Pod, ready: bool, part: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let (now, reason) = state(node, pod).await;
        if now == ready && reason.contains(part) {
            return reason;
        }
        assert!(
            Instant::now() < deadline,
            "ready: {now}, {reason:?}; not {ready}, {part:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

// must-test: a dead VMM leaves pods Terminating for ever; Stop and Remove always end
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_silent_is_told_and_ends_when_it_is_told_to() {
    let Some(mut node) = Node::start_allowing_host().await else {
        return;
    };
    let on_host = PodOptions {
        handler: "host".into(),
        ..PodOptions::default()
    };
    let (stopped, hung, host) = tokio::join!(
        node.pod("stopped"),
        node.pod("hung"),
        node.pod_with("host", on_host)
    );
    let host = host.unwrap();
    let (in_stopped, in_hung, in_host) = tokio::join!(
        node.run(&stopped, "c", SLEEP),
        node.run(&hung, "c", SLEEP),
        node.run(&host, "c", SLEEP)
    );

    // The pod process is stopped, by hand or by a debugger.
    kill(process(&node, &stopped), Signal::SIGSTOP).unwrap();
    let reason = becomes(&node, &stopped, false, "was stopped by a signal").await;
    let shown = node.caisson(&["pods"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let line = shown.lines().find(|line| line.contains(&reason));
    assert!(
        line.is_some_and(|line| line.contains("not ready")),
        "{shown}"
    );
    let refused = node.exec(&in_stopped, "true", 10).await.unwrap_err();
    assert!(refused.message().contains(&reason), "{refused}");
    assert_eq!(node.says(&in_hung, "echo here").await, "here");
    let stats = cri::ListPodSandboxStatsRequest { filter: None };
    let stats = node.runtime.clone().list_pod_sandbox_stats(stats).await;
    assert_eq!(stats.unwrap().into_inner().stats.len(), 2);
    let stop = cri::StopContainerRequest {
        container_id: in_stopped.id.clone(),
        timeout: 0,
    };
    let error = node.runtime.clone().stop_container(stop).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    // It goes on as if nothing had been.
    kill(process(&node, &stopped), Signal::SIGCONT).unwrap();
    becomes(&node, &stopped, true, "").await;
    assert_eq!(node.says(&in_stopped, "echo here").await, "here");

    // The guest hangs; its pod process does not.
    assert!(matches!(ask(&node, &hung, &Request::Pause), Reply::Done));
    becomes(&node, &hung, false, "its agent does not answer").await;
    node.remove(&hung).await;

    // The agent on the host is stopped.
    kill(agent(&node, &host), Signal::SIGSTOP).unwrap();
    becomes(&node, &host, false, "its agent does not answer").await;
    kill(agent(&node, &host), Signal::SIGCONT).unwrap();
    becomes(&node, &host, true, "").await;
    assert_eq!(node.says(&in_host, "echo here").await, "here");
    kill(agent(&node, &host), Signal::SIGSTOP).unwrap();

    // A daemon that comes meanwhile is not held up, and what it stops at once, it need not have asked first.
    kill(process(&node, &stopped), Signal::SIGSTOP).unwrap();
    node.restart().await;
    becomes(&node, &stopped, false, "was stopped by a signal").await;
    tokio::join!(node.remove(&stopped), node.remove(&host));
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_has_its_reason() {
    let Some(node) = Node::start().await else {
        return;
    };
    let (panics, starves) = tokio::join!(node.pod("panics"), node.pod("starves"));
    let options = ContainerOptions {
        privileged: true,
        memory: 32 << 20,
        ..ContainerOptions::default()
    };
    // As an administrator of the guest may ask for: no process is killed, the kernel gives up.
    let script = "echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero";
    let container = node.run_with(&panics, "c", script, options).await;
    let reason = becomes(&node, &panics, false, "panicked").await;
    assert!(
        reason.contains("its console ends with: ")
            && reason.contains("Kernel panic - not syncing: Out of memory"),
        "{reason}"
    );
    let status = node.ended(&container).await;
    assert_eq!(status.exit_code, 137);
    assert!(status.message.contains("panicked"), "{status:?}");

    // The node's kernel kills the pod process.
    let group = fs::read_to_string(node.pod_directory(&starves).join("cgroup")).unwrap();
    let group = PathBuf::from(group);
    for above in [Path::new("/sys/fs/cgroup"), group.parent().unwrap()] {
        fs::write(above.join("cgroup.subtree_control"), "+memory").unwrap();
    }
    fs::write(group.join("memory.max"), "1M").unwrap();
    becomes(&node, &starves, false, "want of memory").await;
    tokio::join!(node.remove(&panics), node.remove(&starves));
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_process_of_another_version_is_not_spoken_to() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let pod = node.pod("other").await;
    node.run(&pod, "c", SLEEP).await;
    let version = PROTOCOL_VERSION + 1;
    let Reply::Error { message } = ask(&node, &pod, &Request::Status { version }) else {
        panic!("a daemon of the next version is answered");
    };
    let both = format!("speaks control protocol {version}, this VMM speaks {PROTOCOL_VERSION}");
    assert!(message.contains(&both), "{message}");

    // The other way round: this daemon finds a pod process of the next version.
    let socket = node.pod_directory(&pod).join("control.sock");
    node.restart_after(|_| {
        fs::rename(&socket, socket.with_extension("away")).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                std::thread::spawn(move || of_the_next_version(stream.unwrap()));
            }
        });
    })
    .await;
    let theirs = format!("this VMM speaks {version}");
    becomes(&node, &pod, false, &theirs).await;
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

/// Answers as the pod process of a later release would.
fn of_the_next_version(stream: UnixStream) {
    let theirs = PROTOCOL_VERSION + 1;
    let mut channel = Channel::new(stream);
    while let Ok(frame) = channel.recv::<Request>() {
        let answer = match frame.message {
            Request::Status { version } if version == theirs => Reply::Status(VmStatus {
                version: theirs,
                build: "9.9.9".into(),
                pid: 1,
                state: VmState::Running,
                agent_ready: true,
                logs_held: false,
                landlock: 0,
                timings: Vec::new(),
            }),
            Request::Status { version } => Reply::Error {
                message: format!(
                    "the daemon speaks control protocol {version}, this VMM speaks {theirs}; install both from one release"
                ),
            },
            _ => Reply::Done,
        };
        if channel.send(&answer, &[]).is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_is_told_and_its_pods_are_made_anew() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let pod = node.pod("booted").await;
    let container = node.run(&pod, "c", SLEEP).await;
    let victim = process(&node, &pod);
    let leases = node.dir().join("leases/test");
    let held = || {
        let names = fs::read_dir(&leases).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(['1', 'f'])).count()
    };
    assert_eq!(held(), 2, "an address of each family");
    // What a reboot does: no process, mount, namespace or file below /run is left, and the kernel has another boot ID.
    node.restart_after(|node| {
        kill(victim, Signal::SIGKILL).unwrap();
        let group = fs::read_to_string(node.pod_directory(&pod).join("cgroup")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(error) = fs::remove_dir(&group) {
            assert!(Instant::now() < deadline, "{victim} does not die: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
        umount2(
            &node.pod_directory(&pod).join("share"),
            MntFlags::MNT_DETACH,
        )
        .unwrap();
        for entry in fs::read_dir(node.state().join("netns")).unwrap() {
            let namespace = entry.unwrap().path();
            umount2(&namespace, MntFlags::MNT_DETACH).unwrap();
            fs::remove_file(namespace).unwrap();
        }
        fs::remove_dir_all(node.state().join("pods")).unwrap();
        let file = node.root().join("boot_id");
        let other = "00000000-0000-4000-8000-000000000000\n";
        assert_ne!(fs::read_to_string(&file).unwrap(), other);
        fs::write(file, other).unwrap();
    })
    .await;
    becomes(&node, &pod, false, "the node was rebooted").await;
    let status = node.ended(&container).await;
    assert!(status.message.contains("rebooted"), "{status:?}");
    // The addresses are free before anybody asks for it.
    let deadline = Instant::now() + Duration::from_secs(60);
    while held() > 0 {
        assert!(Instant::now() < deadline, "addresses are kept");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The kubelet's next attempt, then the removal of the last one.
    let again = node.pod("booted-again").await;
    let container = node.run(&again, "c", SLEEP).await;
    assert_eq!(node.says(&container, "echo here").await, "here");
    node.restart().await;
    becomes(&node, &again, true, "").await;
    tokio::join!(node.remove(&pod), node.remove(&again));
    node.assert_nothing_left().await;
}
