//! Exec and attach.

use std::time::Duration;

use futures::SinkExt;

use super::*;
use crate::client::{DialError, dial};
use crate::status::Status;

const V4: &[&str] = &["v4.channel.k8s.io"];

struct Client {
    connection: Connection,
    error: Stream,
    stdin: Stream,
    stdout: Stream,
    stderr: Stream,
}

async fn client(url: &str) -> Client {
    let (connection, protocol) = dial(url, V4).await.unwrap();
    assert_eq!(protocol, "v4.channel.k8s.io");
    Client {
        error: open(&connection, &[("streamType", "error")]).await,
        stdin: open(&connection, &[("streamType", "stdin")]).await,
        stdout: open(&connection, &[("streamType", "stdout")]).await,
        stderr: open(&connection, &[("streamType", "stderr")]).await,
        connection,
    }
}

async fn status(stream: &mut Stream) -> Status {
    serde_json::from_slice(&all(&mut stream.input).await).unwrap()
}

// must-test: `kubectl cp` and exec with standard input hang: half-close, large streams both ways.
#[tokio::test(flavor = "multi_thread")]
async fn much_goes_both_ways_over_spdy() {
    let (endpoint, _) = serve().await;
    let mut client = client(&exec(&endpoint, "cat", false)).await;
    let chunk = Bytes::from(noise(1, 1 << 20));
    let send = async {
        for _ in 0..64 {
            client.stdin.output.write(chunk.clone()).await.unwrap();
        }
        client.stdin.output.finish().await;
    };
    let receive = async {
        let mut received = 0;
        while let Some(part) = client.stdout.input.next().await.unwrap() {
            let from = received % chunk.len();
            let first = part.bytes.len().min(chunk.len() - from);
            assert!(part.bytes[..first] == chunk[from..from + first]);
            assert!(part.bytes[first..] == chunk[..part.bytes.len() - first]);
            received += part.bytes.len();
        }
        received
    };
    let ((), received) = tokio::join!(send, receive);
    assert_eq!(received, 64 << 20);
    assert_eq!(status(&mut client.error).await.exit_code(), Some(0));
    assert_eq!(all(&mut client.stderr.input).await, b"");
    assert_eq!(all(&mut client.stdin.input).await, b"");
    client.connection.close().await;
}

// must-test: `kubectl cp` and exec with standard input hang: half-close, large streams both ways.
#[tokio::test(flavor = "multi_thread")]
async fn much_goes_both_ways_over_websocket() {
    let (endpoint, _) = serve().await;
    let socket = websocket(&exec(&endpoint, "cat", false), "v5.channel.k8s.io").await;
    let (mut sink, mut source) = socket.split();
    let data = noise(2, 256 << 10);
    let message = Bytes::from([&[0], &data[..]].concat());
    let send = async {
        for _ in 0..256 {
            sink.send(Message::Binary(message.clone())).await.unwrap();
        }
        let close = Bytes::from_static(&[255, 0]);
        sink.send(Message::Binary(close)).await.unwrap();
    };
    let receive = async {
        let (mut received, mut status) = (0, Vec::new());
        while let Some(message) = source.next().await {
            match message.unwrap() {
                Message::Binary(bytes) if bytes[0] == 1 => {
                    for (at, byte) in bytes[1..].iter().enumerate().step_by(997) {
                        assert_eq!(*byte, data[(received + at) % data.len()]);
                    }
                    received += bytes.len() - 1;
                }
                Message::Binary(bytes) if bytes[0] == 3 => status.extend_from_slice(&bytes[1..]),
                Message::Close(_) => {}
                other => panic!("{other:?}"),
            }
        }
        (received, serde_json::from_slice::<Status>(&status).unwrap())
    };
    let ((), (received, status)) = tokio::join!(send, receive);
    assert_eq!(received, 64 << 20);
    assert_eq!(status.exit_code(), Some(0));
}

#[tokio::test]
async fn error_output_and_exit_status_are_apart() {
    let (endpoint, _) = serve().await;
    let mut client = client(&exec(&endpoint, "fail", false)).await;
    assert_eq!(all(&mut client.stderr.input).await, b"it failed\n");
    assert_eq!(all(&mut client.stdout.input).await, b"");
    assert_eq!(status(&mut client.error).await.exit_code(), Some(42));

    let mut socket = websocket(&exec(&endpoint, "fail", false), "v4.channel.k8s.io").await;
    let channels = hear(&mut socket).await;
    assert_eq!(
        (&channels[1][..], &channels[2][..]),
        (&b""[..], &b"it failed\n"[..])
    );
    let status: Status = serde_json::from_slice(&channels[3]).unwrap();
    assert_eq!(status.exit_code(), Some(42));
}

#[tokio::test]
async fn what_cannot_be_run_is_told() {
    let (endpoint, _) = serve().await;
    let mut one = client(&exec(&endpoint, "nothing", false)).await;
    let status = status(&mut one.error).await;
    assert_eq!(status.exit_code(), None);
    assert!(status.message.contains("there is no nothing"), "{status:?}");
    // Before version 4, in plain text.
    let url = exec(&endpoint, "nothing", false);
    let (connection, protocol) = dial(&url, &["v9.channel.k8s.io", "v2.channel.k8s.io"])
        .await
        .unwrap();
    assert_eq!(protocol, "v2.channel.k8s.io");
    let mut error = open(&connection, &[("streamtype", "error")]).await;
    for kind in ["stdin", "stdout", "stderr"] {
        let stream = open(&connection, &[("streamtype", kind)]).await;
        stream.output.finish().await;
    }
    let text = String::from_utf8(all(&mut error.input).await).unwrap();
    assert!(
        text.starts_with("Internal error occurred: error executing"),
        "{text}"
    );
}

#[tokio::test]
async fn a_terminal_is_resized() {
    let (endpoint, _) = serve().await;
    let (connection, _) = dial(&exec(&endpoint, "sizes", true), V4).await.unwrap();
    let mut error = open(&connection, &[("streamtype", "error")]).await;
    let _stdin = open(&connection, &[("streamtype", "stdin")]).await;
    let mut stdout = open(&connection, &[("streamtype", "stdout")]).await;
    let resize = open(&connection, &[("streamtype", "resize")]).await;
    for part in [
        "{\"Width\":80,",
        "\"Height\":24}\n{\"Width\":132",
        ",\"Height\":50}\n",
    ] {
        resize.output.write(Bytes::from(part)).await.unwrap();
    }
    assert_eq!(all(&mut stdout.input).await, b"80x24 132x50 ");
    assert_eq!(status(&mut error).await.exit_code(), Some(0));

    let mut socket = websocket(&exec(&endpoint, "sizes", true), "v5.channel.k8s.io").await;
    say(&mut socket, 4, b"{\"Width\":1,\"Height\":2}").await;
    say(&mut socket, 4, b"{\"Width\":3,\"Height\":4}").await;
    assert_eq!(hear(&mut socket).await[1], b"1x2 3x4 ");
}

#[tokio::test]
async fn a_url_works_once_and_for_its_own_purpose() {
    let (endpoint, _) = serve().await;
    let refused = |url: String| async move {
        match dial(&url, V4).await.map(drop) {
            Err(DialError::Refused { status, message }) => (status, message),
            other => panic!("{other:?}"),
        }
    };
    let url = exec(&endpoint, "fail", false);
    client(&url).await;
    assert_eq!(refused(url).await.0, 404);
    let url = exec(&endpoint, "fail", false);
    assert_eq!(refused(url.replace("/exec/", "/attach/")).await.0, 404);
    assert_eq!(
        refused(url.clone()).await.0,
        404,
        "used up by the wrong path"
    );
    assert_eq!(
        refused(format!("http://{}/", endpoint.address())).await.0,
        404
    );
    // A protocol that is not served.
    let url = forward(&endpoint, &[]);
    let (status, message) = refused(url).await;
    assert!(
        status == 403 && message.contains("portforward.k8s.io"),
        "{message}"
    );

    // Plain HTTP.
    for (url, status) in [
        (exec(&endpoint, "cat", false), "400"),
        (String::from("/exec/x"), "404"),
    ] {
        let mut stream = TcpStream::connect(endpoint.address()).await.unwrap();
        let path = url.replace(&format!("http://{}", endpoint.address()), "");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
        assert!(answer.contains("Upgrade") || status == "404", "{answer}");
    }
    let mut stream = TcpStream::connect(endpoint.address()).await.unwrap();
    stream
        .write_all(b"DELETE /exec/x HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 405") && answer.contains("GET, POST"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_client_that_goes_away_is_noticed() {
    let (endpoint, machine) = serve().await;
    let one = client(&exec(&endpoint, "hold", false)).await;
    drop(one);
    let gone = async {
        while !machine.left.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone)
        .await
        .unwrap();
    machine.left.store(false, Ordering::Relaxed);
    drop(websocket(&exec(&endpoint, "hold", false), "v5.channel.k8s.io").await);
    let gone = async {
        while !machine.left.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone)
        .await
        .unwrap();
}

#[tokio::test]
async fn an_idle_client_is_cut_off_and_what_it_ran_is_told() {
    let (endpoint, machine) = serve_idle(Duration::from_millis(300)).await;
    for websockets in [false, true] {
        machine.left.store(false, Ordering::Relaxed);
        let url = exec(&endpoint, "hold", false);
        let (mut spdy, mut socket) = (None, None);
        if websockets {
            socket = Some(websocket(&url, "v5.channel.k8s.io").await);
        } else {
            spdy = Some(client(&url).await);
        }
        let cut = async {
            while !machine.left.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), cut)
            .await
            .unwrap();
        drop((spdy.take(), socket.take()));
    }
}

// must-test: a slow reader
#[tokio::test]
async fn a_client_that_does_not_read_holds_back_the_process() {
    let (endpoint, machine) = serve().await;
    for websockets in [false, true] {
        machine.flooded.store(0, Ordering::Relaxed);
        let url = exec(&endpoint, "flood", false);
        let (mut spdy, mut socket) = (None, None);
        if websockets {
            socket = Some(websocket(&url, "v5.channel.k8s.io").await);
        } else {
            spdy = Some(client(&url).await);
        }
        let mut before = 0;
        let most = loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = machine.flooded.load(Ordering::Relaxed);
            if now == before && now > 0 {
                break now;
            }
            before = now;
        };
        // Queues of this process, and the two buffers that the kernel has for a connection.
        assert!(most < 24 << 20, "{most}");
        drop((spdy.take(), socket.take()));
    }
}

// The other direction: what a process does not read stays with the client.
#[tokio::test]
async fn a_process_that_does_not_read_holds_back_the_client() {
    let (endpoint, _) = serve().await;
    let client = client(&exec(&endpoint, "hold", false)).await;
    let chunk = Bytes::from(vec![1; 32 << 10]);
    let mut sent = 0;
    let quiet = Duration::from_millis(500);
    while let Ok(written) =
        tokio::time::timeout(quiet, client.stdin.output.write(chunk.clone())).await
    {
        written.unwrap();
        sent += chunk.len();
        assert!(sent < 24 << 20);
    }
}

#[tokio::test]
async fn attach_moves_bytes_and_ends_with_success() {
    let (endpoint, _) = serve().await;
    let request = Request::Attach {
        container: "c".into(),
        wants: Wants {
            stdin: true,
            stdout: true,
            ..Wants::default()
        },
    };
    let (connection, _) = dial(&endpoint.issue(request).unwrap(), &["v5.channel.k8s.io"])
        .await
        .unwrap();
    let mut error = open(&connection, &[("streamtype", "error")]).await;
    let stdin = open(&connection, &[("streamtype", "stdin")]).await;
    let mut stdout = open(&connection, &[("streamtype", "stdout")]).await;
    stdin
        .output
        .write(Bytes::from_static(b"hello"))
        .await
        .unwrap();
    stdin.output.finish().await;
    assert_eq!(all(&mut stdout.input).await, b"hello");
    assert_eq!(status(&mut error).await.status, "Success");
}
