//! Exec, attach and port-forward at streaming URLs, with a SPDY client and a WebSocket client.

use std::time::{Duration, Instant};

use bytes::Bytes;
use caisson_proto::cri;
use caisson_streaming::Wants;
use caisson_streaming::client::{DialError, dial};
use caisson_streaming::spdy::{Connection, Headers, Stream};
use caisson_streaming::status::Status;
use caisson_tests::streaming::{Channels, Message, Spdy, V4, all};
use caisson_tests::{Container, ContainerOptions, Node, Pod, read_log};
use futures::{SinkExt, StreamExt};
use tonic::Code;

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";
const ALL: Wants = Wants {
    stdin: true,
    stdout: true,
    stderr: true,
    tty: false,
};
const TERMINAL: Wants = Wants {
    stdin: true,
    stdout: true,
    stderr: false,
    tty: true,
};

async fn exec_url(
    node: &Node,
    container: &Container,
    script: &str,
    wants: Wants,
) -> Result<String, tonic::Status> {
    let request = cri::ExecRequest {
        container_id: container.id.clone(),
        cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
        stdin: wants.stdin,
        stdout: wants.stdout,
        stderr: wants.stderr,
        tty: wants.tty,
    };
    let response = node.runtime.clone().exec(request).await?;
    Ok(response.into_inner().url)
}

async fn attach_url(node: &Node, container: &Container, wants: Wants) -> String {
    let request = cri::AttachRequest {
        container_id: container.id.clone(),
        stdin: wants.stdin,
        stdout: wants.stdout,
        stderr: wants.stderr,
        tty: wants.tty,
    };
    let response = node.runtime.clone().attach(request).await;
    response.expect("Attach").into_inner().url
}

async fn forward_url(node: &Node, pod: &Pod, ports: &[i32]) -> String {
    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: ports.to_vec(),
    };
    let response = node.runtime.clone().port_forward(request).await;
    response.expect("PortForward").into_inner().url
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_has_all_streams_over_both_transports() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("exec").await;
    let container = node.run(&pod, "c", SLEEP).await;
    let script = "cat; echo error >&2; exit 7";

    // SPDY: standard input half-closed, standard error apart, the exit status.
    let url = exec_url(&node, &container, script, ALL).await.unwrap();
    let mut client = Spdy::connect(&url, ALL).await;
    client.say("first ").await;
    client.say("second").await;
    client.close_stdin().await;
    assert_eq!(client.stdout().await, "first second");
    assert_eq!(client.stderr().await, "error\n");
    assert_eq!(client.status().await.exit_code(), Some(7));
    // The URL was used.
    match dial(&url, V4).await.map(drop) {
        Err(DialError::Refused { status: 404, .. }) => {}
        other => panic!("{other:?}"),
    }

    // WebSocket, with the signal that closes a channel.
    let url = exec_url(&node, &container, script, ALL).await.unwrap();
    let mut client = Channels::connect(&url, "v5.channel.k8s.io").await;
    client.say(0, b"typed").await;
    client.say(255, &[0]).await;
    let channels = client.hear(|_| false).await;
    assert_eq!(
        (channels[1].as_str(), channels[2].as_str()),
        ("typed", "error\n")
    );
    let status: Status = serde_json::from_str(&channels[3]).unwrap();
    assert_eq!(status.exit_code(), Some(7));

    // A terminal, resized while it is used.
    let url = exec_url(&node, &container, "exec sh", TERMINAL).await;
    let mut client = Spdy::connect(&url.unwrap(), TERMINAL).await;
    let resize = client.resize.as_ref().unwrap();
    let size = Bytes::from_static(br#"{"Width":93,"Height":31}"#);
    resize.output.write(size).await.unwrap();
    let url = exec_url(&node, &container, "exec sh", TERMINAL).await;
    let mut other = Channels::connect(&url.unwrap(), "v4.channel.k8s.io").await;
    other.say(4, br#"{"Width":40,"Height":20}"#).await;
    let ask = "until stty size | grep -q '31 93'; do sleep 0.1; done; echo size is $(stty size); exit 3\n";
    client.say(ask).await;
    let said = client.stdout().await;
    assert!(said.contains("size is 31 93\r\n"), "{said:?}");
    assert_eq!(client.status().await.exit_code(), Some(3));
    other.say(0, ask.replace("31 93", "20 40").as_bytes()).await;
    let channels = other.hear(|_| false).await;
    assert!(channels[1].contains("size is 20 40\r\n"), "{channels:?}");

    // A program that is not there.
    let request = cri::ExecRequest {
        container_id: container.id.clone(),
        cmd: vec!["/no/such/program".into()],
        stdout: true,
        ..cri::ExecRequest::default()
    };
    let url = node.runtime.clone().exec(request).await.unwrap();
    let wants = Wants {
        stdout: true,
        ..Wants::default()
    };
    let mut client = Spdy::connect(&url.into_inner().url, wants).await;
    let status = client.status().await;
    assert!(status.message.contains("/no/such/program"), "{status:?}");

    // A client that goes away ends what it ran.
    let url = exec_url(&node, &container, "echo on; sleep 4321", ALL).await;
    let mut client = Spdy::connect(&url.unwrap(), ALL).await;
    client.hears("on").await;
    drop(client);
    let deadline = Instant::now() + Duration::from_secs(30);
    while node.says(&container, "ps").await.contains("echo on") {
        assert!(Instant::now() < deadline, "the process goes on");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    // What the interface refuses.
    let code = |result: Result<String, tonic::Status>| result.unwrap_err().code();
    let none = Wants::default();
    let both = Wants { tty: true, ..ALL };
    assert_eq!(
        code(exec_url(&node, &container, "x", none).await),
        Code::InvalidArgument
    );
    assert_eq!(
        code(exec_url(&node, &container, "x", both).await),
        Code::InvalidArgument
    );
    let nobody = Container {
        id: "no-such".into(),
        log: container.log.clone(),
    };
    assert_eq!(
        code(exec_url(&node, &nobody, "x", ALL).await),
        Code::NotFound
    );
    node.stop_container(&container, 5).await;
    assert_eq!(
        code(exec_url(&node, &container, "x", ALL).await),
        Code::FailedPrecondition
    );
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

/// Bytes without a pattern that go through an exec and come back, compared as they come.
struct Noise {
    /// Sent again and again.
    bytes: Bytes,
    times: usize,
    received: usize,
    /// The daemon's resident memory before.
    before: u64,
    /// The most that was seen of it meanwhile.
    most: u64,
}

impl Noise {
    /// As many mebibytes as `CAISSON_STREAM_MIB` says.
    fn new(node: &Node) -> Self {
        let asked = std::env::var("CAISSON_STREAM_MIB");
        let times = asked.map_or(64, |text| {
            text.parse().expect("CAISSON_STREAM_MIB is a number")
        });
        let bytes: Vec<u8> = (0..1_048_573u32) // a prime: no frame begins where another one did
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        Self {
            bytes: bytes.into(),
            times,
            received: 0,
            before: node.daemon_memory(),
            most: 0,
        }
    }

    fn take(&mut self, node: &Node, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let from = self.received % self.bytes.len();
            let same = rest.len().min(self.bytes.len() - from);
            let expected = &self.bytes[from..from + same];
            assert!(rest[..same] == *expected, "at {}", self.received);
            (self.received, rest) = (self.received + same, &rest[same..]);
        }
        if self.received % (1 << 20) < bytes.len() {
            self.most = self.most.max(node.daemon_memory());
        }
    }

    fn assert_whole(&self, how: &str) {
        let Self { before, most, .. } = self;
        assert_eq!(self.received, self.times * self.bytes.len());
        println!(
            "{how}: {} bytes went both ways; the daemon had {before} bytes before, at most {most} meanwhile",
            self.received
        );
        assert!(*most < before + (24 << 20), "{before} to {most}");
    }
}

// must-test: `kubectl cp` and exec with standard input hang: large streams both ways.
#[tokio::test(flavor = "multi_thread")]
async fn much_goes_through_exec_and_the_daemon_does_not_grow() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("much").await;
    let container = node.run(&pod, "c", SLEEP).await;

    let url = exec_url(&node, &container, "exec cat", ALL).await.unwrap();
    let mut noise = Noise::new(&node);
    let (times, sent) = (noise.times, noise.bytes.clone());
    let client = Spdy::connect(&url, ALL).await;
    let (stdin, mut stdout) = (client.stdin.unwrap(), client.stdout.unwrap());
    let send = async {
        for _ in 0..times {
            stdin.output.write(sent.clone()).await.unwrap();
        }
        stdin.output.finish().await;
    };
    let receive = async {
        while let Some(chunk) = stdout.input.next().await.unwrap() {
            noise.take(&node, &chunk.bytes);
        }
    };
    tokio::join!(send, receive);
    noise.assert_whole("SPDY");

    let url = exec_url(&node, &container, "exec cat", ALL).await.unwrap();
    let mut noise = Noise::new(&node);
    let message = Bytes::from([&[0], &noise.bytes[..]].concat());
    let client = Channels::connect(&url, "v5.channel.k8s.io").await;
    let (mut sink, mut source) = client.split();
    let send = async {
        for _ in 0..times {
            sink.send(Message::Binary(message.clone())).await.unwrap();
        }
        let end = Bytes::from_static(&[255, 0]);
        sink.send(Message::Binary(end)).await.unwrap();
    };
    let receive = async {
        let mut status = Vec::new();
        while let Some(message) = source.next().await {
            match message.unwrap() {
                Message::Binary(bytes) if bytes[0] == 1 => noise.take(&node, &bytes[1..]),
                Message::Binary(bytes) if bytes[0] == 3 => status.extend_from_slice(&bytes[1..]),
                Message::Binary(bytes) => assert_eq!(bytes.len(), 1, "{bytes:?}"),
                Message::Close(_) => {}
                other => panic!("{other:?}"),
            }
        }
        serde_json::from_slice::<Status>(&status).unwrap()
    };
    let ((), status) = tokio::join!(send, receive);
    assert_eq!(status.exit_code(), Some(0));
    noise.assert_whole("WebSocket");
    node.remove(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_leaves_or_ends_standard_input_as_the_container_was_made() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("attach").await;
    let script = "while read line; do echo got $line; done; echo over";
    let options = ContainerOptions {
        stdin: true,
        ..ContainerOptions::default()
    };
    let container = node.run_with(&pod, "open", script, options.clone()).await;

    // The end of a client's input is the end of its attachment, and of nothing else.
    let url = attach_url(&node, &container, ALL).await;
    let mut client = Spdy::connect(&url, ALL).await;
    client.say("one\n").await;
    client.hears("got one\n").await;
    client.close_stdin().await;
    assert_eq!(client.status().await.status, "Success");
    let url = attach_url(&node, &container, ALL).await;
    let mut client = Channels::connect(&url, "v5.channel.k8s.io").await;
    client.say(0, b"two\n").await;
    client
        .hear(|channels| channels[1].contains("got two\n"))
        .await;
    drop(client);
    assert_eq!(
        node.status(&container).await.state(),
        cri::ContainerState::ContainerRunning
    );
    // Without input, one only listens.
    let listen = Wants {
        stdin: false,
        ..ALL
    };
    let mut listener = Spdy::connect(&attach_url(&node, &container, listen).await, listen).await;
    let mut client = Spdy::connect(&attach_url(&node, &container, ALL).await, ALL).await;
    client.say("three\n").await;
    listener.hears("got three\n").await;
    client.hears("got three\n").await;
    drop((client, listener));

    // Made so, the container's input ends with its first client's.
    let once = ContainerOptions {
        stdin_once: true,
        ..options
    };
    let container = node.run_with(&pod, "once", script, once).await;
    let url = attach_url(&node, &container, ALL).await;
    let mut client = Spdy::connect(&url, ALL).await;
    client.say("four\n").await;
    client.close_stdin().await;
    assert_eq!(client.stdout().await, "got four\nover\n");
    assert_eq!(client.status().await.status, "Success");
    assert_eq!(node.ended(&container).await.exit_code, 0);
    let log: String = read_log(&container.log)
        .iter()
        .map(|line| format!("{}\n", String::from_utf8_lossy(&line.content)))
        .collect();
    assert_eq!(log, "got four\nover\n");

    // A terminal.
    let options = ContainerOptions {
        stdin: true,
        tty: true,
        ..ContainerOptions::default()
    };
    let container = node.run_with(&pod, "tty", "exec sh", options).await;
    let url = attach_url(&node, &container, TERMINAL).await;
    let mut client = Spdy::connect(&url, TERMINAL).await;
    let resize = client.resize.as_ref().unwrap();
    let size = Bytes::from_static(br#"{"Width":77,"Height":11}"#);
    resize.output.write(size).await.unwrap();
    client
        .say("until stty size | grep -q '11 77'; do sleep 0.1; done; echo size is $(stty size)\n")
        .await;
    client.hears("size is 11 77\r\n").await;
    client.say("exit 5\n").await;
    assert_eq!(client.status().await.status, "Success");
    assert_eq!(node.ended(&container).await.exit_code, 5);

    // No input where there is none.
    let container = node.run(&pod, "none", SLEEP).await;
    let request = cri::AttachRequest {
        container_id: container.id.clone(),
        stdin: true,
        ..cri::AttachRequest::default()
    };
    let refused = node.runtime.clone().attach(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}

async fn forwarded(connection: &Connection, port: u16, request: u32) -> (Stream, Stream) {
    let (port, request) = (port.to_string(), request.to_string());
    let headers = |kind: &str| {
        Headers::new([
            ("streamType", kind),
            ("port", port.as_str()),
            ("requestID", request.as_str()),
        ])
    };
    let error = connection.open(headers("error")).await.unwrap();
    error.output.finish().await;
    let data = connection.open(headers("data")).await.unwrap();
    (error, data)
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_that_listen_on_localhost_are_forwarded() {
    let Some(node) = Node::start().await else {
        return;
    };
    let pod = node.pod("forward").await;
    // An echo, and two servers that answer on one address of the loopback device alone.
    let script = "echo page >/tmp/index.html
        nc -ll -p 7001 -e cat &
        httpd -f -h /tmp -p 127.0.0.1:7002 & httpd -f -h /tmp -p [::1]:7003 & wait";
    let container = node.run(&pod, "c", script).await;
    let listening = "for port in 7001 7002 7003; do until netstat -ltn | grep -q :$port; do sleep 0.1; done; done";
    node.says(&container, listening).await;

    let url = forward_url(&node, &pod, &[]).await;
    let (connection, _) = dial(&url, &["portforward.k8s.io"]).await.unwrap();
    let mut open = Vec::new();
    for (request, port) in [7001, 7002, 7003, 7001].into_iter().enumerate() {
        open.push((port, forwarded(&connection, port, request as u32).await));
    }
    for (port, (error, data)) in &mut open {
        let text = format!("GET / HTTP/1.0\r\nX-Port: {port}\r\n\r\n");
        data.output.write(Bytes::from(text.clone())).await.unwrap();
        data.output.finish().await;
        let answer = all(&mut data.input).await;
        match port {
            7001 => assert_eq!(answer, text),
            _ => assert!(answer.ends_with("\r\n\r\npage\n"), "{answer}"),
        }
        assert_eq!(all(&mut error.input).await, "");
    }
    // Much, both ways.
    let (mut error, mut data) = forwarded(&connection, 7001, 10).await;
    let chunk = Bytes::from(vec![b'y'; 1 << 20]);
    let send = async {
        for _ in 0..8 {
            data.output.write(chunk.clone()).await.unwrap();
        }
        data.output.finish().await;
    };
    let ((), answer) = tokio::join!(send, all(&mut data.input));
    assert!(answer.len() == 8 << 20 && answer.bytes().all(|byte| byte == b'y'));
    assert_eq!(all(&mut error.input).await, "");
    // Nobody listens: the reason is told, and the others go on.
    let (mut error, _data) = forwarded(&connection, 7004, 11).await;
    let why = all(&mut error.input).await;
    assert!(why.contains("7004") && why.contains("refused"), "{why}");
    let (_error, mut data) = forwarded(&connection, 7001, 12).await;
    data.output.finish().await;
    assert_eq!(all(&mut data.input).await, "");
    connection.close().await;

    // WebSocket channels: each begins with its port.
    let url = forward_url(&node, &pod, &[7001]).await;
    let mut client = Channels::connect(&url, "v4.channel.k8s.io").await;
    client.say(0, b"hello").await;
    let channels = client.hear(|channels| channels[0].ends_with("hello")).await;
    assert!(!channels[1].is_empty());

    let request = cri::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![70_000],
    };
    let refused = node.runtime.clone().port_forward(request).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    node.remove(&pod).await;
    node.assert_nothing_left().await;
}
