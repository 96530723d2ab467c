//! Both ends over loopback.

mod forward;
mod hostile;
mod remote;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::spdy::{Connection, Headers, Stream};
use crate::{Backend, BackendError, Endpoint, Input, Listener, Output, Request, Streams, Wants};

/// A backend whose commands are what the tests need of a container.
#[derive(Default)]
struct Machine {
    /// Bytes that "flood" could send.
    flooded: AtomicUsize,
    /// "hold" was told that its client has gone.
    left: AtomicBool,
}

impl Machine {
    async fn cat(streams: &mut Streams) -> Result<i32, BackendError> {
        let (Some(stdin), Some(stdout)) = (&mut streams.stdin, &streams.stdout) else {
            return Err(BackendError("no streams".into()));
        };
        while let Ok(Some(chunk)) = stdin.next().await {
            if stdout.write(chunk.bytes.clone()).await.is_err() {
                return Ok(141);
            }
        }
        Ok(0)
    }
}

impl Backend for Machine {
    async fn exec(
        &self,
        _: &str,
        command: Vec<String>,
        _: bool,
        streams: &mut Streams,
    ) -> Result<i32, BackendError> {
        match command[0].as_str() {
            "cat" => Self::cat(streams).await,
            "fail" => {
                if let Some(stderr) = &streams.stderr {
                    let _ = stderr.write(Bytes::from_static(b"it failed\n")).await;
                }
                Ok(42)
            }
            "sizes" => {
                let (Some(resize), Some(stdout)) = (&mut streams.resize, &streams.stdout) else {
                    return Err(BackendError("no terminal".into()));
                };
                for _ in 0..2 {
                    let size = resize.next().await.unwrap();
                    let text = format!("{}x{} ", size.columns, size.rows);
                    stdout.write(Bytes::from(text)).await.unwrap();
                }
                Ok(0)
            }
            "flood" => {
                let chunk = Bytes::from(vec![7; 32 << 10]);
                let stdout = streams.stdout.as_ref().unwrap();
                while stdout.write(chunk.clone()).await.is_ok() {
                    self.flooded.fetch_add(chunk.len(), Ordering::Relaxed);
                }
                Ok(141)
            }
            "hold" => {
                streams.closed.wait().await;
                self.left.store(true, Ordering::Relaxed);
                Ok(137)
            }
            other => Err(BackendError(format!("there is no {other}"))),
        }
    }

    async fn attach(&self, _: &str, streams: &mut Streams) -> Result<(), BackendError> {
        Self::cat(streams).await.map(drop)
    }

    async fn port_forward(
        &self,
        pod: &str,
        port: u16,
        input: &mut Input,
        output: &Output,
    ) -> Result<(), BackendError> {
        assert_eq!(pod, "p");
        let stream = TcpStream::connect(("127.0.0.1", port)).await;
        let stream = stream.map_err(|error| BackendError(error.to_string()))?;
        let (mut reader, mut writer) = stream.into_split();
        let up = async {
            while let Some(chunk) = input.next().await.ok()? {
                writer.write_all(&chunk.bytes).await.ok()?;
            }
            writer.shutdown().await.ok()
        };
        let down = async {
            let mut buffer = vec![0; 32 << 10];
            while let Ok(n @ 1..) = reader.read(&mut buffer).await {
                output
                    .write(Bytes::copy_from_slice(&buffer[..n]))
                    .await
                    .ok()?;
            }
            output.finish().await;
            Some(())
        };
        match tokio::join!(up, down) {
            (Some(()), Some(())) => Ok(()),
            _ => Err(BackendError("the connection broke".into())),
        }
    }
}

async fn serve() -> (Endpoint, Arc<Machine>) {
    serve_idle(Duration::from_secs(3600)).await
}

async fn serve_idle(idle_timeout: Duration) -> (Endpoint, Arc<Machine>) {
    let address = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(address, idle_timeout).await.unwrap();
    let endpoint = listener.endpoint();
    let machine = Arc::new(Machine::default());
    tokio::spawn(listener.serve(machine.clone()));
    (endpoint, machine)
}

fn exec(endpoint: &Endpoint, command: &str, tty: bool) -> String {
    let request = Request::Exec {
        container: "c".into(),
        command: vec![command.into()],
        wants: Wants {
            stdin: true,
            stdout: true,
            stderr: !tty,
            tty,
        },
    };
    endpoint.issue(request).unwrap()
}

fn forward(endpoint: &Endpoint, ports: &[u16]) -> String {
    let request = Request::PortForward {
        pod: "p".into(),
        ports: ports.to_vec(),
    };
    endpoint.issue(request).unwrap()
}

async fn open(connection: &Connection, headers: &[(&str, &str)]) -> Stream {
    let headers = Headers::new(headers.iter().map(|(name, value)| (*name, *value)));
    connection.open(headers).await.unwrap()
}

/// Everything that comes of a stream.
async fn all(input: &mut Input) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(chunk) = input.next().await.unwrap() {
        bytes.extend_from_slice(&chunk.bytes);
    }
    bytes
}

async fn websocket(url: &str, protocols: &str) -> WebSocketStream<TcpStream> {
    let mut request = url
        .replace("http://", "ws://")
        .into_client_request()
        .unwrap();
    let header = request.headers_mut();
    header.insert("sec-websocket-protocol", protocols.parse().unwrap());
    let address = request.uri().authority().unwrap().to_string();
    let stream = TcpStream::connect(address).await.unwrap();
    client_async(request, stream).await.unwrap().0
}

/// Sends a message on a channel.
async fn say(socket: &mut WebSocketStream<TcpStream>, channel: u8, bytes: &[u8]) {
    let message = [&[channel], bytes].concat();
    socket.send(Message::Binary(message.into())).await.unwrap();
}

/// What comes of each channel until the server closes.
async fn hear(socket: &mut WebSocketStream<TcpStream>) -> Vec<Vec<u8>> {
    let mut channels = vec![Vec::new(); 8];
    while let Some(message) = socket.next().await {
        match message.unwrap() {
            Message::Binary(bytes) => channels[bytes[0] as usize].extend_from_slice(&bytes[1..]),
            Message::Close(frame) => assert_eq!(u16::from(frame.unwrap().code), 1000),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
    channels
}

/// Bytes that are not all alike.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let byte = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8;
    (0..length as u32).map(byte).collect()
}
