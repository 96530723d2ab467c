//! Exec and attach: the streams of one process, over SPDY (versions 2 to 5) and over WebSocket channels (4 and 5).
//!
//! Version 3 brought the resize stream, 4 the structured status, 5 the half-close of WebSocket channels.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;

use crate::spdy::{self, Connection, Role};
use crate::status::Status;
use crate::stream::{Closed, Input, Output};
use crate::tokens::{Request, Wants};
use crate::websocket::Channels;
use crate::{Backend, BackendError};

/// What is served over SPDY.
pub const SPDY_PROTOCOLS: &[&str] = &[
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
];
/// What is served over WebSocket.
pub const WEBSOCKET_PROTOCOLS: &[&str] = &["v5.channel.k8s.io", "v4.channel.k8s.io"];

/// How long a client may take to open its streams.
const CREATION_TIME: Duration = Duration::from_secs(30);
/// The most bytes of one size of a terminal.
const MAX_SIZE_MESSAGE: usize = 1024;

// The channels of a WebSocket.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// The streams between a client and a process.
pub struct Streams {
    /// Standard input, or what is typed.
    pub stdin: Option<Input>,
    /// Standard output, or a terminal's.
    pub stdout: Option<Output>,
    /// Standard error.
    pub stderr: Option<Output>,
    /// Sizes of the client's terminal.
    pub resize: Option<Resizes>,
    /// Tells when the client has gone.
    pub closed: Closed,
    /// The directions of SPDY streams in which nothing is sent. Clients take their end for the end of the process.
    unused: Vec<Output>,
}

/// The size of a terminal.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
pub struct TerminalSize {
    /// Columns.
    #[serde(rename = "Width", alias = "width")]
    pub columns: u16,
    /// Rows.
    #[serde(rename = "Height", alias = "height")]
    pub rows: u16,
}

/// The sizes that a client sends: JSON objects, one behind the other.
pub struct Resizes {
    input: Input,
    read: Vec<u8>,
}

impl Resizes {
    fn new(input: Input) -> Self {
        Self {
            input,
            read: Vec::new(),
        }
    }

    /// The next size; `None` when there will be no more. Can be dropped without losing one.
    pub async fn next(&mut self) -> Option<TerminalSize> {
        loop {
            let mut sizes = serde_json::Deserializer::from_slice(&self.read).into_iter();
            match sizes.next() {
                Some(Ok(size)) => {
                    let used = sizes.byte_offset();
                    self.read.drain(..used);
                    return Some(size);
                }
                Some(Err(error)) if !error.is_eof() || self.read.len() > MAX_SIZE_MESSAGE => {
                    tracing::debug!(%error, "a client sent no size of a terminal");
                    return None;
                }
                Some(Err(_)) | None => {}
            }
            let chunk = self.input.next().await.ok()??;
            self.read.extend_from_slice(&chunk.bytes);
        }
    }
}

/// Serves exec or attach over SPDY.
pub async fn serve_spdy<B: Backend, S>(transport: S, request: Request, protocol: &str, backend: &B)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let mut connection = match Connection::new(transport, Role::Server) {
        Ok(connection) => connection,
        Err(error) => {
            tracing::warn!(%error, "a streaming client cannot be served");
            return;
        }
    };
    let wants = wants(&request);
    let resizes = protocol != "v2.channel.k8s.io";
    let opened = opened(&mut connection, wants, resizes);
    match tokio::time::timeout(CREATION_TIME, opened).await {
        Ok(Some((mut streams, error))) => {
            connection.refuse();
            let structured = !matches!(protocol, "v2.channel.k8s.io" | "v3.channel.k8s.io");
            run(backend, request, &mut streams, &error, structured).await;
        }
        Ok(None) => {}
        Err(_) => tracing::debug!("a streaming client did not open its streams in time"),
    }
    connection.close().await;
}

/// Waits until the client has opened each stream that its request names, and the error stream.
async fn opened(
    connection: &mut Connection,
    wants: Wants,
    resizes: bool,
) -> Option<(Streams, Output)> {
    let mut streams = Streams {
        stdin: None,
        stdout: None,
        stderr: None,
        resize: None,
        closed: connection.closed(),
        unused: Vec::new(),
    };
    let mut error = None;
    loop {
        let complete = error.is_some()
            && wants.stdin == streams.stdin.is_some()
            && wants.stdout == streams.stdout.is_some()
            && wants.stderr == streams.stderr.is_some()
            && (wants.tty && resizes) == streams.resize.is_some();
        if complete {
            return Some((streams, error?));
        }
        let spdy::Stream {
            headers,
            input,
            output,
            ..
        } = connection.accept().await?;
        match headers.get("streamtype") {
            "error" if error.is_none() => error = Some(output),
            "stdin" if wants.stdin && streams.stdin.is_none() => {
                streams.stdin = Some(input);
                streams.unused.push(output);
            }
            "stdout" if wants.stdout && streams.stdout.is_none() => streams.stdout = Some(output),
            "stderr" if wants.stderr && streams.stderr.is_none() => streams.stderr = Some(output),
            "resize" if wants.tty && resizes && streams.resize.is_none() => {
                streams.resize = Some(Resizes::new(input));
                streams.unused.push(output);
            }
            // Dropped, it is reset.
            other => tracing::debug!("a client opened a stream that it did not ask for: {other:?}"),
        }
    }
}

/// Serves exec or attach over WebSocket channels.
pub async fn serve_websocket<B: Backend, S>(
    socket: WebSocketStream<S>,
    request: Request,
    protocol: &str,
    backend: &B,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let wants = wants(&request);
    let half_close = protocol == "v5.channel.k8s.io";
    let mut channels = Channels::new(socket, &[STDIN, RESIZE], half_close);
    let mut streams = Streams {
        stdin: channels.input(STDIN).filter(|_| wants.stdin),
        stdout: wants.stdout.then(|| channels.output(STDOUT)),
        stderr: wants.stderr.then(|| channels.output(STDERR)),
        resize: channels
            .input(RESIZE)
            .filter(|_| wants.tty)
            .map(Resizes::new),
        closed: channels.closed(),
        unused: Vec::new(),
    };
    let lowest = match wants {
        Wants { stdout: true, .. } => STDOUT,
        Wants { stderr: true, .. } => STDERR,
        _ => ERROR,
    };
    if channels.greet(lowest).await.is_ok() {
        let error = channels.output(ERROR);
        run(backend, request, &mut streams, &error, true).await;
    }
    channels.close().await;
}

fn wants(request: &Request) -> Wants {
    match request {
        Request::Exec { wants, .. } | Request::Attach { wants, .. } => *wants,
        Request::PortForward { .. } => Wants::default(),
    }
}

/// Does what is asked, ends the outputs and tells how it went.
async fn run<B: Backend>(
    backend: &B,
    request: Request,
    streams: &mut Streams,
    error: &Output,
    structured: bool,
) {
    let (result, what) = match request {
        Request::Exec {
            container,
            command,
            wants,
        } => {
            let result = backend.exec(&container, command, wants.tty, streams).await;
            (result, "executing command in container")
        }
        Request::Attach { container, .. } => {
            let result = backend.attach(&container, streams).await;
            (result.map(|()| 0), "attaching to container")
        }
        Request::PortForward { .. } => {
            let cause = BackendError("the request is not one of exec or attach".into());
            (Err(cause), "serving")
        }
    };
    if let Err(cause) = &result {
        tracing::debug!("a streaming request failed: {cause}");
    }
    // Input that still comes is not wanted any more.
    (streams.stdin, streams.resize) = (None, None);
    let status = Status::of(&result, what).encode(structured);
    let _ = error.write(Bytes::from(status)).await;
    let outputs = [&streams.stdout, &streams.stderr].into_iter().flatten();
    for output in outputs.chain(&streams.unused).chain([error]) {
        output.finish().await;
    }
}
