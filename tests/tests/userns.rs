//! Pods whose IDs are others on the node (KEP-127), of both kinds.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use caisson_proto::cri;
use caisson_streaming::client::dial;
use caisson_streaming::spdy::Headers;
use caisson_tests::streaming::all;
use caisson_tests::users::{GIDS, LENGTH, UIDS, mapped, mapping, with};
use caisson_tests::{Container, ContainerOptions, IMAGE, Node, Pod, PodOptions, of_host, read_log};
use cri::NamespaceMode;
use tonic::Code;

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

fn in_pod(mounts: Vec<cri::Mount>) -> ContainerOptions {
    ContainerOptions {
        namespaces: Some(mapped()),
        mounts,
        ..ContainerOptions::default()
    }
}

fn with_ids(mount: cri::Mount) -> cri::Mount {
    cri::Mount {
        uid_mappings: vec![mapping(0, UIDS, LENGTH)],
        gid_mappings: vec![mapping(0, GIDS, LENGTH)],
        ..mount
    }
}

/// A directory of the node that everybody may write to.
fn directory(node: &Node, name: &str) -> PathBuf {
    let path = node.dir().join(name);
    fs::create_dir_all(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    path
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (meta.uid(), meta.gid())
}

async fn fails(node: &Node, container: &Container, script: &str) {
    let (code, out, err) = node.exec(container, script, 60).await.unwrap();
    assert_ne!(code, 0, "{script:?} said {out:?} and {err:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn root_of_a_pod_is_nobody_on_the_node_in_a_microvm() {
    let Some(mut node) = Node::start_allowing_host().await else {
        return;
    };
    has_ids_of_its_own(&mut node, "microvm").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_of_a_pod_is_nobody_on_the_node_on_the_host() {
    let Some(mut node) = Node::start_allowing_host().await else {
        return;
    };
    has_ids_of_its_own(&mut node, "host").await;
}

async fn has_ids_of_its_own(node: &mut Node, handler: &str) {
    let name = format!("ids-{handler}");
    let options = PodOptions {
        handler: handler.to_owned(),
        namespaces: Some(mapped()),
        sysctls: [
            (
                "net.ipv4.ip_local_port_range".to_owned(),
                "20000\t21000".to_owned(),
            ),
            ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
        ]
        .into(),
        ..PodOptions::default()
    };
    let pod = node.pod_with(&name, options).await.unwrap();
    let (theirs, plain) = (directory(node, "theirs"), directory(node, "plain"));
    fs::write(theirs.join("given"), "given").unwrap();
    chown(theirs.join("given"), Some(1000), Some(2000)).unwrap();
    let mut image = with_ids(of_host(Path::new(""), "/image"));
    image.host_path.clear();
    image.readonly = true;
    image.image = Some(cri::ImageSpec {
        image: IMAGE.to_owned(),
        ..cri::ImageSpec::default()
    });
    let mounts = vec![
        with_ids(of_host(&theirs, "/theirs")),
        with_ids(cri::Mount {
            readonly: true,
            ..of_host(&theirs, "/read-only")
        }),
        with_ids(of_host(&theirs.join("given"), "/given")),
        of_host(&plain, "/plain"),
        image,
    ];
    let a = node.run_with(&pod, "a", SLEEP, in_pod(mounts)).await;
    let b = node
        .run_with(&pod, "b", "exec sleep 98765", in_pod(Vec::new()))
        .await;

    // One user namespace, and PIDs in it.
    for (file, first) in [("uid_map", UIDS), ("gid_map", GIDS)] {
        let script = format!("id -u; echo $(cat /proc/self/{file})");
        assert_eq!(
            node.says(&a, &script).await,
            format!("0\n0 {first} {LENGTH}")
        );
    }
    for kind in ["user", "net", "ipc", "uts", "pid"] {
        let script = format!("readlink /proc/self/ns/{kind}");
        let inside = node.says(&a, &script).await;
        assert_eq!(inside, node.says(&b, &script).await, "{kind}");
        let own = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert_ne!(Path::new(&inside), own, "{kind}");
    }
    assert!(node.says(&a, "ps").await.contains("sleep 98765"));
    let user = node.status(&a).await.user.unwrap().linux.unwrap();
    assert_eq!((user.uid, user.gid), (0, 0));

    files_have_owners(node, &a, &theirs, &plain).await;
    the_pods_own_is_its_roots(node, &pod, &a, &name).await;
    streams_and_terminals_work(node, &pod).await;
    privileged_is_privileged_in_the_pod(node, &pod).await;

    // A daemon that comes later takes up the pod with its IDs.
    node.restart().await;
    assert_eq!(node.says(&a, "stat -c %u /theirs/made").await, "5");
    let mounts = vec![with_ids(of_host(&theirs, "/theirs"))];
    let later = node.run_with(&pod, "later", SLEEP, in_pod(mounts)).await;
    assert_eq!(node.says(&later, "stat -c %u /theirs/made").await, "5");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

async fn files_have_owners(node: &Node, a: &Container, theirs: &Path, plain: &Path) {
    // On the node what has mappings looks as if there was no user namespace, and what has none as it is.
    let script = "cd /theirs && echo x >made && mkdir dir && ln made linked && mv dir moved && ln -s made link &&
        chmod 600 made && cd /plain && echo x >made && mkdir dir && stat -c %u:%g /theirs/made /plain/made";
    assert_eq!(node.says(a, script).await, "0:0\n0:0");
    for name in ["made", "linked", "moved", "link"] {
        assert_eq!(owner(&theirs.join(name)), (0, 0), "{name}");
    }
    for name in ["made", "dir"] {
        assert_eq!(owner(&plain.join(name)), (UIDS, GIDS), "{name}");
    }
    assert_eq!(
        node.says(
            a,
            "cd /; stat -c %u:%g theirs theirs/given given plain image/etc etc/passwd"
        )
        .await,
        "0:0\n1000:2000\n1000:2000\n65534:65534\n0:0\n0:0"
    );
    node.says(
        a,
        "chown 5:6 /theirs/made /plain/made /etc/passwd && echo more >>/theirs/made",
    )
    .await;
    assert_eq!(owner(&theirs.join("made")), (5, 6));
    assert_eq!(owner(&plain.join("made")), (UIDS + 5, GIDS + 6));
    assert_eq!(
        node.says(a, "stat -c %u:%g /etc/passwd; cat /theirs/linked")
            .await,
        "5:6\nx\nmore"
    );
    for script in [
        "chown 70000 /theirs/made",
        "chown 70000 /plain/made",
        "chown 70000 /etc/group",
        "echo x >/read-only/made",
        "echo x >/image/etc/passwd",
    ] {
        fails(node, a, script).await;
    }
    // Root's own file of the node is out of reach where nothing is mapped.
    fs::write(plain.join("of-the-node"), "x").unwrap();
    fails(node, a, "chmod 600 /plain/of-the-node").await;
}

async fn the_pods_own_is_its_roots(node: &Node, pod: &Pod, a: &Container, name: &str) {
    assert_eq!(
        node.says(
            a,
            "hostname; cat /proc/sys/kernel/shm_rmid_forced; cat /proc/sys/net/ipv4/ip_local_port_range"
        )
        .await,
        format!("{name}\n1\n20000\t21000")
    );
    node.says(a, "echo '# mine' >>/etc/hosts && echo x >/dev/shm/x && echo x >/dev/null && head -c 1 /dev/zero").await;
    let ip = node.pod_status(pod).await.unwrap().network.unwrap().ip;
    let addresses = node.says(a, "ip -4 addr show eth0; ip link show lo").await;
    assert!(addresses.contains(&ip), "{addresses}");
    node.says(a, "ping -c 1 -W 5 10.99.0.1").await;
    let answered = Command::new("busybox")
        .args(["ping", "-c", "1", "-W", "5", &ip])
        .output();
    assert!(answered.unwrap().status.success());
    // A port that only root may have, reached from the pod and through the agent.
    node.says(
        a,
        "echo page >/tmp/index.html; httpd -h /tmp -p 127.0.0.1:80; wget -qO- http://127.0.0.1/",
    )
    .await;
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![80],
    };
    let url = node
        .runtime
        .clone()
        .port_forward(request)
        .await
        .unwrap()
        .into_inner()
        .url;
    let (connection, _) = dial(&url, &["portforward.k8s.io"]).await.unwrap();
    let headers = |kind| Headers::new([("streamType", kind), ("port", "80"), ("requestID", "0")]);
    let error = connection.open(headers("error")).await.unwrap();
    error.output.finish().await;
    let mut data = connection.open(headers("data")).await.unwrap();
    data.output
        .write(Bytes::from("GET / HTTP/1.0\r\n\r\n"))
        .await
        .unwrap();
    data.output.finish().await;
    let answer = all(&mut data.input).await;
    assert!(answer.ends_with("page\n"), "{answer}");
    let request = cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let stats = node
        .runtime
        .clone()
        .pod_sandbox_stats(request)
        .await
        .unwrap();
    let network = stats
        .into_inner()
        .stats
        .unwrap()
        .linux
        .unwrap()
        .network
        .unwrap();
    let interface = network.default_interface.unwrap();
    assert_eq!(interface.name, "eth0");
    assert!(interface.rx_bytes.unwrap().value > 0);
}

async fn streams_and_terminals_work(node: &Node, pod: &Pod) {
    let script = "echo one; echo two >/dev/stdout; echo three >/dev/stderr";
    let c = node
        .run_with(pod, "streams", script, in_pod(Vec::new()))
        .await;
    assert_eq!(node.ended(&c).await.exit_code, 0);
    let text = |c: &Container| -> Vec<_> {
        let lines = read_log(&c.log);
        let text =
            |line: &caisson_tests::Line| String::from_utf8_lossy(&line.content).trim().to_owned();
        lines.iter().map(text).collect()
    };
    let mut lines = text(&c);
    lines.sort();
    assert_eq!(lines, ["one", "three", "two"]);
    let terminal = ContainerOptions {
        tty: true,
        ..in_pod(Vec::new())
    };
    let script = "tty; stat -c %u:%g $(tty); echo typed >/dev/tty";
    let c = node.run_with(pod, "terminal", script, terminal).await;
    assert_eq!(node.ended(&c).await.exit_code, 0);
    assert_eq!(text(&c), ["/dev/pts/0", "0:5", "typed"]);
}

async fn privileged_is_privileged_in_the_pod(node: &Node, pod: &Pod) {
    let options = ContainerOptions {
        privileged: true,
        ..in_pod(Vec::new())
    };
    let c = node.run_with(pod, "privileged", SLEEP, options).await;
    node.says(
        &c,
        "mount -t tmpfs t /mnt 2>/dev/null || { mkdir -p /mnt && mount -t tmpfs t /mnt; }",
    )
    .await;
    node.says(
        &c,
        "ip link add name d0 type dummy 2>/dev/null || ip addr add 192.0.2.1/32 dev lo",
    )
    .await;
    // What is everybody's stays as it is.
    for script in [
        "echo 1 >/proc/sys/vm/drop_caches",
        "echo 10 >/proc/sys/kernel/panic",
        "mount -t ext4 /dev/vda /mnt",
    ] {
        fails(node, &c, script).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_user_namespace_of_a_pod_is_refused() {
    let Some(node) = Node::start_allowing_host().await else {
        return;
    };
    let status = node
        .runtime
        .clone()
        .status(cri::StatusRequest::default())
        .await;
    for handler in status.unwrap().into_inner().runtime_handlers {
        assert!(
            handler.features.unwrap().user_namespaces,
            "{}",
            handler.name
        );
    }
    let good = [mapping(0, UIDS, LENGTH)];
    for handler in ["microvm", "host"] {
        let pod = async |namespaces| {
            let options = PodOptions {
                handler: handler.to_owned(),
                namespaces: Some(namespaces),
                ..PodOptions::default()
            };
            node.pod_with(&format!("bad-{handler}"), options).await
        };
        use NamespaceMode::{Container, Node, Pod, Target};
        for (namespaces, part) in [
            (with(Container, &[], &[]), "CONTAINER"),
            (with(Target, &[], &[]), "TARGET"),
            (with(Node, &good, &good), "NODE"),
            (with(Pod, &good, &[]), "one mapping of group IDs"),
            (with(Pod, &[good[0], mapping(LENGTH, 1, 1)], &good), "has 2"),
            (with(Pod, &good, &[mapping(1, GIDS, LENGTH)]), "from 0 on"),
            (with(Pod, &[mapping(0, UIDS, 0)], &good), "no range"),
            (with(Pod, &[mapping(0, 2, u32::MAX)], &good), "no range"),
        ] {
            let error = pod(namespaces).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{error}");
            assert!(error.message().contains(part), "{error}");
        }
        let node_users = pod(with(Node, &[], &[])).await.unwrap();
        let script = "cat /proc/self/uid_map; echo x >/etc/made; stat -c %u /etc/made";
        let (status, lines) = node.output(&node_users, "c", script).await;
        assert_eq!(status.exit_code, 0);
        let words = String::from_utf8_lossy(&lines[0].content).into_owned();
        let words: Vec<_> = words.split_ascii_whitespace().collect();
        assert_eq!(words, ["0", "0", "4294967295"]);

        // Containers and volumes have the pod's IDs, or none.
        let dir = directory(&node, "dir");
        let error = node
            .create(&node_users, "r", SLEEP, in_pod(Vec::new()))
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        let plain = ContainerOptions {
            mounts: vec![with_ids(of_host(&dir, "/dir"))],
            ..ContainerOptions::default()
        };
        let error = node
            .create(&node_users, "r", SLEEP, plain)
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        node.remove(&node_users).await;

        let ours = pod(mapped()).await.unwrap();
        let other = cri::Mount {
            uid_mappings: vec![mapping(0, UIDS + 1, LENGTH)],
            ..with_ids(of_host(&dir, "/dir"))
        };
        for options in [ContainerOptions::default(), in_pod(vec![other])] {
            let error = node.create(&ours, "r", SLEEP, options).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        }
        // A tmpfs has mappings from Linux 6.3 on, and before there is an answer.
        let memory = node.state().join("memory");
        fs::create_dir_all(&memory).unwrap();
        let mount = with_ids(of_host(&memory, "/memory"));
        match node.create(&ours, "m", SLEEP, in_pod(vec![mount])).await {
            Ok(_) => assert!(kernel() >= (6, 3)),
            Err(error) => {
                assert!(kernel() < (6, 3), "{error}");
                assert!(error.message().contains("6.3"), "{error}");
            }
        }
        node.remove(&ours).await;
    }
    node.assert_nothing_left().await;
}

/// The version of the node's kernel.
fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}
