//! Exec with all its streams, and volumes.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use caisson_proto::cli::stream_request::Message as Request;
use caisson_proto::cli::stream_response::Message as Response;
use caisson_proto::cli::{StreamRequest, StreamStart, WindowSize};
use caisson_proto::cri;
use caisson_tests::{Container, ContainerOptions, Node, of_host};
use sha2::{Digest, Sha256};

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// What an exec said.
#[derive(Debug, Default)]
struct Said {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    code: Option<i32>,
}

/// Runs a command with streams; `input` is sent and then closed.
async fn exec(
    node: &Node,
    container: &Container,
    command: &[&str],
    tty: Option<WindowSize>,
    input: Vec<Request>,
) -> Said {
    let start = StreamStart {
        container_id: container.id.clone(),
        command: command.iter().map(|s| (*s).to_owned()).collect(),
        stdin: !input.is_empty(),
        tty: tty.is_some(),
        size: tty,
        ..StreamStart::default()
    };
    let (requests, receiver) = tokio::sync::mpsc::channel(4);
    tokio::spawn(async move {
        for message in std::iter::once(Request::Start(start)).chain(input) {
            let message = StreamRequest {
                message: Some(message),
            };
            if requests.send(message).await.is_err() {
                return;
            }
        }
        // Kept open: the end of the requests is not the end of standard input.
        requests.closed().await;
    });
    let receiver = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut responses = node.cli.clone().exec(receiver).await.unwrap().into_inner();
    let mut said = Said::default();
    while let Some(response) = responses.message().await.unwrap() {
        match response.message {
            Some(Response::Stdout(bytes)) => said.stdout.extend(bytes),
            Some(Response::Stderr(bytes)) => said.stderr.extend(bytes),
            Some(Response::Exited(exit)) => said.code = Some(exit.code),
            Some(Response::Started(_)) | None => {}
        }
    }
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_has_all_streams_and_a_terminal() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("exec").await;
    let container = node.run(&pod, "c", SLEEP).await;

    let script = "cat; echo error >&2; exit 7";
    let input = vec![
        Request::Stdin(b"first ".to_vec()),
        Request::Stdin(b"second".to_vec()),
        Request::StdinClosed(true),
    ];
    let said = exec(&node, &container, &["sh", "-c", script], None, input).await;
    assert_eq!(said.stdout, b"first second");
    assert_eq!(said.stderr, b"error\n");
    assert_eq!(said.code, Some(7));

    let size = WindowSize {
        columns: 93,
        rows: 31,
    };
    let input = vec![Request::Stdin(b"stty size; exit 3\n".to_vec())];
    let said = exec(&node, &container, &["sh"], Some(size), input).await;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(text.contains("31 93\r\n"), "{text:?}");
    assert_eq!(said.code, Some(3));

    let said = exec(&node, &container, &["/no/such/program"], None, vec![]).await;
    assert_eq!(said.code, Some(127), "{said:?}");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn much_goes_through_exec_both_ways() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("both").await;
    let container = node.run(&pod, "c", SLEEP).await;
    // must-test: kubectl cp and exec with standard input hang.
    let mut digest = Sha256::new();
    let mut input = Vec::new();
    for n in 0..640u32 {
        let chunk: Vec<u8> = (0..32_768u32)
            .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(n) >> 13) as u8)
            .collect();
        digest.update(&chunk);
        input.push(Request::Stdin(chunk));
    }
    input.push(Request::StdinClosed(true));
    let said = exec(&node, &container, &["cat"], None, input).await;
    assert_eq!(said.stdout.len(), 20 << 20);
    assert_eq!(Sha256::digest(&said.stdout), digest.finalize());
    assert_eq!(said.code, Some(0));
    node.remove(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_that_takes_too_long_is_killed() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("timeout").await;
    let container = node.run(&pod, "c", SLEEP).await;
    let began = Instant::now();
    let error = node.exec(&container, "sleep 4321", 2).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    assert!(began.elapsed() < Duration::from_secs(30));
    assert!(!node.says(&container, "ps").await.contains("sleep 4321"));
    node.remove(&pod).await;
}

fn mount(host: &Path, container: &str, readonly: bool) -> cri::Mount {
    cri::Mount {
        readonly,
        ..of_host(host, container)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_show_updates_and_keep_their_limits() {
    let Some(node) = Node::start().await else {
        return;
    };
    // A ConfigMap as the kubelet writes it: a link to a directory of one version, swapped as a whole.
    let config = node.dir().join("configmap");
    fs::create_dir_all(config.join("..v1")).unwrap();
    fs::write(config.join("..v1/key"), "one").unwrap();
    symlink("..v1", config.join("..data")).unwrap();
    symlink("..data/key", config.join("key")).unwrap();
    let data = node.dir().join("data");
    fs::create_dir(&data).unwrap();
    let file = node.dir().join("file");
    fs::write(&file, "single").unwrap();

    let pod = node.pod("volumes").await;
    let options = ContainerOptions {
        mounts: vec![
            mount(&config, "/config", true),
            mount(&data, "/data", false),
            mount(&file, "/etc/file", true),
        ],
        ..ContainerOptions::default()
    };
    let container = node.run_with(&pod, "c", SLEEP, options).await;
    assert_eq!(node.says(&container, "cat /config/key").await, "one");
    assert_eq!(node.says(&container, "cat /etc/file").await, "single");

    // must-test: ConfigMap updates that never arrive.
    fs::create_dir(config.join("..v2")).unwrap();
    fs::write(config.join("..v2/key"), "two").unwrap();
    symlink("..v2", config.join("..data.new")).unwrap();
    fs::rename(config.join("..data.new"), config.join("..data")).unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(node.says(&container, "cat /config/key").await, "two");

    for refused in [
        "echo x > /config/new",
        "echo x > /config/key",
        "rm /config/key",
        "echo x > /etc/file",
    ] {
        let (code, _, error) = node.exec(&container, refused, 30).await.unwrap();
        assert_ne!(code, 0, "{refused}");
        assert!(
            error.contains("Read-only file system"),
            "{refused}: {error}"
        );
    }
    node.says(
        &container,
        "echo written > /data/out; chown 1000:1001 /data/out; mkdir /data/d",
    )
    .await;
    assert_eq!(fs::read_to_string(data.join("out")).unwrap(), "written\n");
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(data.join("out")).unwrap());
    assert_eq!(owner, 1000);
    fs::write(data.join("d/in"), "from the host").unwrap();
    assert_eq!(
        node.says(&container, "cat /data/d/in").await,
        "from the host"
    );

    let socket = node.dir().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let options = ContainerOptions {
        mounts: vec![mount(&socket, "/socket", false)],
        ..ContainerOptions::default()
    };
    let error = node.create(&pod, "s", SLEEP, options).await.unwrap_err();
    assert!(error.message().contains("socket"), "{error}");
    let options = ContainerOptions {
        mounts: vec![mount(Path::new("/no/such/path"), "/x", false)],
        ..ContainerOptions::default()
    };
    let error = node.create(&pod, "n", SLEEP, options).await.unwrap_err();
    assert!(error.message().contains("/no/such/path"), "{error}");

    node.remove(&pod).await;
    node.assert_nothing_left().await;
    assert_eq!(fs::read_to_string(data.join("out")).unwrap(), "written\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_has_the_habits_of_podman() {
    let Some(node) = Node::start().await else {
        return;
    };
    let image = caisson_tests::IMAGE;
    let run = |arguments: &[&str]| {
        let output = node.caisson(arguments);
        (
            output.status.code().unwrap(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    // Output apart, exit code passed through, nothing left with --rm.
    let script = "echo out; echo err >&2; echo $X; exit 42";
    let (code, out, err) = run(&["run", "--rm", "-e", "X=set", image, "sh", "-c", script]);
    assert_eq!((code, out.as_str()), (42, "out\nset\n"), "{err}");
    assert!(err.contains("err\n"), "{err}");
    node.assert_nothing_left().await;

    // Standard input, and the network switched off.
    let mut child = node
        .command(&[
            "run",
            "--rm",
            "-i",
            "--network",
            "none",
            image,
            "sh",
            "-c",
            "ip -o addr; cat",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"typed").unwrap();
    let output = child.wait_with_output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(out.ends_with("typed") && out.contains("127.0.0.1"), "{out}");
    assert!(!out.contains("eth0"), "{out}");

    // In the background: ps, exec, logs, stop, rm.
    let (code, id, err) = run(&[
        "run",
        "-d",
        "--name",
        "bg",
        image,
        "sh",
        "-c",
        "echo hello; exec sleep 1000",
    ]);
    assert_eq!(code, 0, "{err}");
    let (_, ps, _) = run(&["ps"]);
    assert!(
        ps.contains("bg") && ps.contains(&id[..12]) && ps.contains("Running"),
        "{ps}"
    );
    let (code, out, _) = run(&["exec", "bg", "sh", "-c", "hostname; exit 9"]);
    assert_eq!((code, out.as_str()), (9, "bg\n"));
    assert_eq!(run(&["logs", "bg"]).1, "hello\n");
    let (code, _, err) = run(&["rm", "bg"]);
    assert!(code == 1 && err.contains("is running"), "{err}");
    let (code, _, err) = run(&["run", "--name", "bg", image, "true"]);
    assert!(code == 125 && err.contains("bg"), "{err}");
    assert_eq!(run(&["stop", "-t", "1", "bg"]).0, 0);
    assert!(run(&["ps", "-a"]).1.contains("Exited (137)"));
    assert_eq!(run(&["rm", "bg"]).0, 0);
    assert!(!run(&["ps", "-a"]).1.contains("bg"));

    // What cannot be said is said in one sentence.
    let (code, _, err) = run(&["exec", "nobody", "true"]);
    assert!(
        code == 125 && err.contains("there is no container"),
        "{err}"
    );
    let (code, _, err) = run(&["run", "--rm", image, "/no/such/program"]);
    assert_eq!(code, 127, "{err}");
    assert!(err.contains("/no/such/program"), "{err}");
    assert!(!err.contains("panicked"), "{err}");
    assert!(run(&["images"]).1.contains("busybox"));
    node.assert_nothing_left().await;
}
