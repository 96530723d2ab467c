//! Connections to the agent: through the pod's vsock socket, by the `CONNECT <port>` convention.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_proto::agent::agent_client::AgentClient;
use caisson_vmm_protocol::AGENT_PORT;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// How long the guest may take to accept a connection or to answer a header line.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer line, in bytes.
const MAX_LINE: usize = 512;
/// The most bytes of one answer of the agent.
const MAX_ANSWER: usize = 4 << 20;

/// A client that connects when it is first used and again when the connection breaks.
pub fn client(vsock: PathBuf) -> AgentClient<Channel> {
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let vsock = vsock.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(connect(&vsock, AGENT_PORT).await?)) }
    });
    // The address is never dialled: the connector above is.
    let channel = Endpoint::from_static("http://agent").connect_with_connector_lazy(connector);
    AgentClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

/// Connects to a port of the guest.
async fn connect(vsock: &Path, port: u32) -> io::Result<UnixStream> {
    bounded(async {
        let mut stream = UnixStream::connect(vsock).await?;
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await?;
        let answer = read_line(&mut stream).await?;
        if !answer.starts_with("OK ") {
            return Err(io::Error::other(format!(
                "guest port {port} is answered with {answer:?}"
            )));
        }
        Ok(stream)
    })
    .await
}

/// Opens a raw stream: connects, sends the header line and takes its answer.
pub async fn stream(vsock: &Path, port: u32, header: &str) -> io::Result<UnixStream> {
    let mut stream = connect(vsock, port).await?;
    bounded(async {
        stream.write_all(header.as_bytes()).await?;
        match read_line(&mut stream).await?.as_str() {
            "OK" => Ok(stream),
            answer => Err(io::Error::other(
                answer.strip_prefix("ERR ").unwrap_or(answer).to_owned(),
            )),
        }
    })
    .await
}

async fn bounded<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(CONNECT_TIMEOUT, work)
        .await
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!(
                    "the guest did not answer within {} s",
                    CONNECT_TIMEOUT.as_secs()
                ),
            )
        })?
}

/// Reads a line byte by byte: what follows it belongs to the stream.
async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    while line.len() < MAX_LINE {
        match stream.read_u8().await {
            Ok(b'\n') => return Ok(String::from_utf8_lossy(&line).into_owned()),
            Ok(byte) => line.push(byte),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "the guest refused the connection",
                ));
            }
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other(format!(
        "the guest's answer is longer than {MAX_LINE} bytes"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn answer(answers: &'static [&'static str]) -> io::Result<UnixStream> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for answer in answers {
                read_line(&mut stream).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let result = stream(&path, 1025, "STREAM c - stdout\n").await;
        server.await.unwrap();
        result
    }

    #[tokio::test]
    async fn bytes_behind_the_answer_belong_to_the_stream() {
        let mut stream = answer(&["OK 5\n", "OK\nfirst"]).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "first");
    }

    #[tokio::test]
    async fn refusals_are_told() {
        let say = |r: io::Result<UnixStream>| r.unwrap_err().to_string();
        assert!(say(answer(&["OK 5\n", "ERR no such container\n"]).await).contains("no such"));
        assert!(say(answer(&["NO\n"]).await).contains("port 1025"));
        assert!(say(answer(&[""]).await).contains("refused"));
    }
}
