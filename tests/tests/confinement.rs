//! Pod processes as the kernel sees them, what lies open on the node, and a pod that attacks its own machine.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use caisson_proto::cri;
use caisson_tests::{ContainerOptions, Node, Pod};

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";
const NAMESPACES: [&str; 6] = ["ipc", "mnt", "net", "pid", "user", "uts"];
/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP (capability.h).
const FILE_SERVER: u64 = 0x8800_00db;

fn must(node: &Node, arguments: &[&str]) -> String {
    let output = node.caisson(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A field of every thread's status.
fn of_threads(pid: u64, field: &str) -> BTreeSet<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok())
        .map(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            line.unwrap().trim().to_owned()
        })
        .collect()
}

fn namespace(pid: impl std::fmt::Display, name: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap()
}

/// A pod's process and the user that it runs as, once all else that confines it was found in /proc.
fn confined(node: &Node, pod: &Pod) -> (u64, String) {
    let info = node.inspect(pod);
    let pid = info["pid"].as_u64().unwrap();
    let users = of_threads(pid, "Uid:");
    let user: BTreeSet<_> = users
        .iter()
        .map(|ids| ids.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(user.len(), 1, "{users:?}");
    let user = user.first().unwrap().to_string();
    assert_ne!(user, "0");
    assert_eq!(of_threads(pid, "NoNewPrivs:"), ["1".to_owned()].into());
    assert_eq!(of_threads(pid, "Seccomp:"), ["2".to_owned()].into());
    assert_eq!(of_threads(pid, "Groups:"), [String::new()].into());
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        for mask in of_threads(pid, set) {
            let mask = u64::from_str_radix(&mask, 16).unwrap();
            assert_eq!(mask & !FILE_SERVER, 0, "{set} {mask:#x}");
        }
    }
    for name in NAMESPACES {
        assert_ne!(namespace(pid, name), namespace("self", name), "{name}");
    }
    // It is the first process of its PID namespace.
    let numbers = of_threads(pid, "NSpid:");
    let own = format!("{pid}\t1");
    assert!(numbers.contains(&own), "{numbers:?}");
    let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let group = group.trim().strip_prefix("0::/").unwrap();
    let limit = |file: &str| {
        let path = Path::new("/sys/fs/cgroup").join(group).join(file);
        fs::read_to_string(path).unwrap().trim().to_owned()
    };
    // 192 MiB for the guest, and what goes with it.
    let memory: u64 = limit("memory.max").parse().unwrap();
    assert!((224 << 20..1 << 30).contains(&memory), "{memory}");
    assert_eq!(limit("pids.max"), "1024");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    for (name, most) in [
        ("Max core file size", "0"),
        ("Max processes", "1024"),
        ("Max locked memory", "0"),
        ("Max msgqueue size", "0"),
    ] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let found = line.unwrap().split_whitespace().next();
        assert_eq!(found, Some(most), "{name}");
    }
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment.is_empty(), "{environment:?}");

    // The same, told to people.
    let told = &info["confinement"];
    assert_eq!(told["threads"][0]["users"][0].to_string(), user);
    assert!(told["threads"].as_array().unwrap().len() > 5, "{told}");
    assert_eq!(told["own_root"], true, "{told}");
    assert!(told["landlock"].as_u64().unwrap() >= 2, "{told}");
    let doctor = must(node, &["doctor", "--pod", &pod.id]);
    assert_eq!(doctor.matches("ok    ").count(), 10, "{doctor}");
    assert!(doctor.contains(&user), "{doctor}");
    (pid, user)
}

/// What others than its owner can reach below a directory, or write.
fn open_to_others(directory: &Path, found: &mut Vec<String>) {
    let meta = fs::symlink_metadata(directory).unwrap();
    if meta.uid() != 0 || meta.mode() & 0o077 != 0 {
        found.push(format!("{} {:o}", directory.display(), meta.mode()));
    }
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        let kind = meta.file_type();
        let wrong = match () {
            () if kind.is_symlink() => false,
            () if kind.is_socket() => meta.mode() & 0o077 != 0,
            () => meta.mode() & 0o022 != 0,
        };
        if wrong {
            found.push(format!("{} {:o}", path.display(), meta.mode()));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pod_process_is_alone_and_can_do_nothing() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let (one, two) = (node.pod("one").await, node.pod("two").await);
    let container = node.run(&one, "c", SLEEP).await;
    let (pid, user) = confined(&node, &one);
    let (other_pid, other_user) = confined(&node, &two);
    assert_ne!(user, other_user);
    for name in NAMESPACES {
        assert_ne!(namespace(pid, name), namespace(other_pid, name), "{name}");
    }

    // Nothing of the node is in the guest: no secret on its command line, no environment.
    let line = node.says(&container, "cat /proc/cmdline").await;
    let words: Vec<_> = line
        .split_whitespace()
        .map(|word| word.split('=').next().unwrap())
        .collect();
    let known = [
        // The kernel's own, and then the daemon's.
        "dummy.numdummies",
        "console",
        "earlyprintk",
        "quiet",
        "panic",
        "reboot",
        "tsc",
        "no_timer_check",
        "random.trust_cpu",
        "cryptomgr.notests",
        "pci",
    ];
    assert_eq!(words, known, "{line}");
    let environment = node.says(&container, "env | sed s/=.*// | sort").await;
    for name in environment.lines() {
        assert!(
            ["HOME", "HOSTNAME", "PATH", "PWD", "SHLVL", "_"].contains(&name),
            "{environment}"
        );
    }
    // Entropy: there is a device for it, and the guest's generator was seeded.
    let entropy = "cat /sys/class/misc/hw_random/rng_current; head -c 16 /dev/random | wc -c";
    assert_eq!(node.says(&container, entropy).await, "virtio_rng.0\n16");

    // The node's own directories, and the socket, are root's.
    let mut open = Vec::new();
    for directory in [node.root(), node.state()] {
        open_to_others(directory, &mut open);
    }
    for pod in fs::read_dir(node.state().join("pods")).unwrap() {
        open_to_others(&pod.unwrap().path(), &mut open);
    }
    for pod in fs::read_dir(node.root().join("pods")).unwrap() {
        open_to_others(&pod.unwrap().path(), &mut open);
    }
    let socket = fs::metadata(node.socket()).unwrap();
    assert_eq!((socket.uid(), socket.mode() & 0o777), (0, 0o600));
    assert_eq!(open, [""; 0]);

    // Users stay with their pods.
    node.restart().await;
    assert_eq!(confined(&node, &one), (pid, user.clone()));
    let three = node.pod("three").await;
    let (_, third) = confined(&node, &three);
    assert!(third != user && third != other_user);
    for pod in [&one, &two, &three] {
        node.remove(pod).await;
    }
    node.assert_nothing_left().await;
}

/// What root in a guest can do to it: memory and ports of the machine, the kernel's triggers, drivers torn from their
/// devices again and again, and at last from all of them.
const ATTACK: &str = "
    mkdir -p /t; mknod /t/mem c 1 1; mknod /t/port c 1 4; mknod /t/kmsg c 1 11
    for f in /t/mem /t/port; do head -c 16 $f && echo readable; done
    echo storm >/t/kmsg
    for f in b c o; do echo $f >/proc/sysrq-trigger; done
    cd /sys/bus/virtio/drivers || echo no drivers
    for i in 1 2 3 4 5 6 7 8; do
        for d in virtio_rng virtio_net; do
            for v in $d/virtio*; do
                n=${v##*/}; echo $n >$d/unbind; echo $n >$d/bind
            done
        done
    done
    head -c 2000000 /dev/zero | tr '\\0' k >/t/kmsg
    echo torn
    for v in */virtio*; do echo ${v##*/} >${v%/*}/unbind & done
    sleep 100000";

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_attacks_its_machine_harms_nobody_else() {
    let Some(node) = Node::start().await else {
        return;
    };
    let (neighbour, hostile) = (node.pod("neighbour").await, node.pod("hostile").await);
    let peace = node.run(&neighbour, "c", SLEEP).await;
    let before = node.inspect(&neighbour);
    let options = ContainerOptions {
        privileged: true,
        ..ContainerOptions::default()
    };
    let attacker = node.run_with(&hostile, "c", ATTACK, options).await;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    loop {
        let log = fs::read_to_string(&attacker.log).unwrap_or_default();
        assert!(!log.contains("readable"), "{log}");
        if log.contains("torn") {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{log}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    // The neighbour is what it was, and the daemon answers.
    assert_eq!(node.says(&peace, "echo peace").await, "peace");
    let after = node.inspect(&neighbour);
    assert_eq!(after["pid"], before["pid"]);
    let request = cri::ListPodSandboxRequest::default();
    let listed = node.runtime.clone().list_pod_sandbox(request).await;
    assert_eq!(listed.unwrap().into_inner().items.len(), 2);
    // A guest that does not answer any more is ended all the same.
    node.remove(&hostile).await;
    assert_eq!(node.says(&peace, "echo still").await, "still");
    node.remove(&neighbour).await;
    node.assert_nothing_left().await;
}
