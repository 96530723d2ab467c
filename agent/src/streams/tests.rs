//! Streams over socket pairs in place of vsock.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;

struct One {
    endpoint: Arc<Endpoint>,
    shut_down: AtomicBool,
}

impl Processes for One {
    fn endpoint(
        &self,
        container: &str,
        _: Option<&str>,
        kind: Kind,
    ) -> Result<Arc<Endpoint>, String> {
        if container == "c" && kind == self.endpoint.kind() {
            return Ok(self.endpoint.clone());
        }
        Err("no such\nstream".into())
    }

    fn shutdown(&self) {
        self.shut_down.store(true, Ordering::Relaxed);
    }
}

fn one(kind: Kind, fd: OwnedFd) -> Arc<One> {
    Arc::new(One {
        endpoint: Endpoint::new(kind, fd).unwrap(),
        shut_down: AtomicBool::new(false),
    })
}

fn pipe() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_CLOEXEC).unwrap()
}

/// Connects, sends the request, and reads the answer line.
async fn connect(processes: &Arc<One>, request: &str) -> (UnixStream, String) {
    let (mut client, server) = UnixStream::pair().unwrap();
    let processes = processes.clone();
    tokio::spawn(async move { serve(server, &*processes).await });
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    loop {
        let byte = client.read_u8().await.unwrap();
        if byte == b'\n' {
            return (client, String::from_utf8(answer).unwrap());
        }
        answer.push(byte);
    }
}

#[tokio::test]
async fn what_a_finished_process_wrote_is_read_to_its_end() {
    // must-test: exec and logs that lose the tail of the output when the process ends quickly
    let (reader, writer) = pipe();
    File::from(writer).write_all(b"the tail").unwrap();
    let processes = one(Kind::Stdout, reader);
    let (mut client, answer) = connect(&processes, "STREAM c - stdout\n").await;
    assert_eq!(answer, "OK");
    let mut output = String::new();
    client.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "the tail");
    drop(client);
    // Read to its end: the next client gets the end again, and the pipe is closed.
    let (mut client, answer) = connect(&processes, "STREAM c - stdout\n").await;
    assert_eq!(answer, "OK");
    assert_eq!(client.read_to_string(&mut output).await.unwrap(), 0);
    assert!(processes.endpoint.fd().is_none());
}

#[tokio::test]
async fn each_question_is_answered_with_itself() {
    let processes = one(Kind::Stdout, pipe().0);
    let (mut client, answer) = connect(&processes, "HEALTH\nfirst").await;
    assert_eq!(answer, "OK");
    let mut first = [0; 5];
    client.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"first");
    for question in 0..=u8::MAX {
        client.write_u8(question).await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), question);
    }
    client.shutdown().await.unwrap();
    assert_eq!(
        client.read(&mut first).await.unwrap(),
        0,
        "it ends with the client"
    );
}

#[tokio::test]
async fn large_output_arrives_byte_for_byte_with_a_slow_reader() {
    // must-test: half-close, large streams both ways, a slow reader
    let (reader, writer) = pipe();
    let data: Vec<u8> = (0..8 << 20)
        .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let sent = data.clone();
    let producer = std::thread::spawn(move || File::from(writer).write_all(&sent).unwrap());
    let processes = one(Kind::Stdout, reader);
    let (mut client, _) = connect(&processes, "STREAM c - stdout\n").await;
    let mut got = Vec::new();
    let mut buffer = vec![0; 300_000];
    loop {
        let count = client.read(&mut buffer).await.unwrap();
        if count == 0 {
            break;
        }
        got.extend_from_slice(&buffer[..count]);
        if got.len() % 7 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    producer.join().unwrap();
    assert!(got == data);
}

#[tokio::test]
async fn half_close_of_standard_input_reaches_the_process() {
    // must-test: exec with standard input hangs
    let (reader, writer) = pipe();
    let processes = one(Kind::Stdin, writer);
    let consumer = tokio::task::spawn_blocking(move || {
        let mut got = Vec::new();
        File::from(reader).read_to_end(&mut got).unwrap();
        got
    });
    // The first bytes come in one write with the header.
    let (mut client, answer) = connect(&processes, "STREAM c - stdin\nfirst ").await;
    assert_eq!(answer, "OK");
    let data = vec![b'x'; 3 << 20];
    client.write_all(&data).await.unwrap();
    client.shutdown().await.unwrap();
    let got = consumer.await.unwrap();
    assert_eq!(&got[..6], b"first ");
    assert_eq!(got.len(), 6 + data.len());
    // The agent ends its side as well.
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_process_that_closes_standard_input_ends_the_connection() {
    let (reader, writer) = pipe();
    let processes = one(Kind::Stdin, writer);
    let (mut client, _) = connect(&processes, "STREAM c - stdin\n").await;
    drop(reader);
    let ended = tokio::time::timeout(Duration::from_secs(5), client.read(&mut [0; 1])).await;
    assert_eq!(ended.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn a_second_client_is_refused_and_a_broken_one_leaves_the_rest_for_the_next() {
    let (reader, writer) = pipe();
    let processes = one(Kind::Stderr, reader);
    let mut process = File::from(writer);
    let (mut first, _) = connect(&processes, "STREAM c - stderr\n").await;
    process.write_all(b"one").unwrap();
    let mut buffer = [0; 3];
    first.read_exact(&mut buffer).await.unwrap();
    let (_, answer) = connect(&processes, "STREAM c - stderr\n").await;
    assert_eq!(answer, "ERR the stream has a client already");

    // The client goes away without a word; the agent sees its closed side, and the next client takes over.
    drop(first);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (mut second, answer) = connect(&processes, "STREAM c - stderr\n").await;
    assert_eq!(answer, "OK");
    process.write_all(b"two").unwrap();
    drop(process);
    let mut output = String::new();
    second.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "two");
}

#[tokio::test]
async fn bytes_taken_from_the_pipe_but_not_delivered_stay_for_the_next_client() {
    let (reader, writer) = pipe();
    let processes = one(Kind::Stdout, reader);
    let data: Vec<u8> = (0..4 << 20).map(|i: u32| (i / 3) as u8).collect();
    let sent = data.clone();
    let producer = std::thread::spawn(move || File::from(writer).write_all(&sent).unwrap());
    // A client that reads nothing: the agent fills the socket and then holds a part of the pipe's bytes.
    let (mut client, _) = connect(&processes, "STREAM c - stdout\n").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    client.shutdown().await.unwrap(); // it may be replaced now
    tokio::time::sleep(Duration::from_millis(20)).await;
    let (mut second, answer) = connect(&processes, "STREAM c - stdout\n").await;
    assert_eq!(answer, "OK");
    let mut rest = Vec::new();
    second.read_to_end(&mut rest).await.unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).await.unwrap();
    got.extend_from_slice(&rest);
    producer.join().unwrap();
    assert!(!rest.is_empty() && got == data);
}

#[tokio::test]
async fn a_terminal_goes_both_ways_and_survives_the_clients_half_close() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let processes = one(Kind::Tty, pty.master);
    processes.endpoint.resize(132, 50).unwrap();
    let (mut client, _) = connect(&processes, "STREAM c - tty\n").await;
    let mut slave = File::from(pty.slave);
    client.write_all(b"in\n").await.unwrap();
    let slave = tokio::task::spawn_blocking(move || {
        let mut line = [0; 3];
        slave.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"in\n");
        slave
    });
    let mut slave = slave.await.unwrap();
    client.shutdown().await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    slave.write_all(b"out").unwrap();
    let mut echo_and_output = [0; 7];
    client.read_exact(&mut echo_and_output).await.unwrap();
    assert_eq!(&echo_and_output, b"in\r\nout");
    drop(slave);
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn refusals_and_shutdown() {
    let (reader, _writer) = pipe();
    let processes = one(Kind::Stdout, reader);
    let (_, answer) = connect(&processes, "STREAM d - stdout\n").await;
    assert_eq!(answer, "ERR no such stream");
    let (_, answer) = connect(&processes, "HELLO\n").await;
    assert!(answer.starts_with("ERR the header line is not"), "{answer}");
    let (_, answer) = connect(&processes, &"x".repeat(600)).await;
    assert!(
        answer.starts_with("ERR the header line is longer"),
        "{answer}"
    );
    let (_, answer) = connect(&processes, "SHUTDOWN\n").await;
    assert_eq!(answer, "OK");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(processes.shut_down.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_is_told_so() {
    let (reader, _writer) = pipe();
    let processes = one(Kind::Stdout, reader);
    let (_, answer) = connect(&processes, "STREAM c").await;
    assert_eq!(answer, "ERR no header line within 10 s");
}

#[tokio::test]
async fn a_standard_input_that_is_kept_outlives_its_client() {
    let (reader, writer) = pipe();
    let processes = one(Kind::Stdin, writer);
    let mut process = File::from(reader);
    for word in ["one", "two"] {
        let (mut client, answer) = connect(&processes, "STREAM c - stdin keep\n").await;
        assert_eq!(answer, "OK");
        client.write_all(word.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    }
    let (mut last, answer) = connect(&processes, "STREAM c - stdin\n").await;
    assert_eq!(answer, "OK");
    last.shutdown().await.unwrap();
    assert_eq!(last.read(&mut [0; 1]).await.unwrap(), 0);
    let mut all = String::new();
    process.read_to_string(&mut all).unwrap();
    assert_eq!(all, "onetwo");
}

#[tokio::test]
async fn a_port_is_dialled_and_half_closes_pass() {
    let (reader, _writer) = pipe();
    let processes = one(Kind::Stdout, reader);
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let application = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            all.make_ascii_uppercase();
            stream.write_all(&all).await.unwrap();
        });
        let (mut client, answer) = connect(&processes, &format!("DIAL {port}\nfirst ")).await;
        assert_eq!(answer, "OK", "{address}");
        let rest = vec![b'x'; 2 << 20];
        client.write_all(&rest).await.unwrap();
        client.shutdown().await.unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.unwrap();
        assert!(all.starts_with(b"FIRST XXX") && all.len() == 6 + rest.len());
        application.await.unwrap();
        // Nobody listens any more.
        let (_, answer) = connect(&processes, &format!("DIAL {port}\n")).await;
        assert!(
            answer.starts_with("ERR cannot connect to 127.0.0.1:") && answer.contains("refused"),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn a_held_stream_gives_up_its_client_and_nothing_else() {
    let (reader, writer) = pipe();
    let mut writer = File::from(writer);
    let processes = one(Kind::Stdout, reader);
    let (mut client, _) = connect(&processes, "STREAM c - stdout\n").await;
    writer.write_all(b"first").unwrap();
    let mut bytes = [0; 5];
    client.read_exact(&mut bytes).await.unwrap();
    assert!(processes.endpoint.has_client());
    processes.endpoint.hold(true);
    processes.endpoint.wait_until_free().await;
    // What comes now stays in the pipe, the process's end too.
    writer.write_all(b"second").unwrap();
    drop(writer);
    let mut rest = String::new();
    assert_eq!(client.read_to_string(&mut rest).await.unwrap(), 0);
    drop(client);
    processes.endpoint.hold(false);
    let (mut client, answer) = connect(&processes, "STREAM c - stdout\n").await;
    assert_eq!(answer, "OK");
    client.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "second");
}
