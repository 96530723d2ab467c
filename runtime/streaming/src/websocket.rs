//! WebSocket as Kubernetes uses it: numbered channels in one connection (`*.channel.k8s.io`), or a byte stream in
//! which SPDY is spoken (`SPDY/3.1+portforward.k8s.io`).
//!
//! Each binary message of the channel protocols begins with the channel's number. In version 5 a client half-closes a
//! channel with the message 255, number; before, it cannot.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{
    CloseFrame, WebSocketConfig, frame::coding::CloseCode,
};
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::stream::{self, Budget, CHUNK, Closed, Feeder, Gone, Input, Output, QUEUE};

/// The longest message that is taken.
const MAX_MESSAGE: usize = 1 << 20;
/// How long a client may take to answer the end of the connection.
const LINGER: Duration = Duration::from_secs(10);
/// The first byte of the message that half-closes a channel, from version 5 on.
const CLOSE_CHANNEL: u8 = 255;

/// Messages of a bounded size.
pub(crate) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
}

/// A connection with numbered channels. Dropped, it closes at once; see [`Channels::close`].
pub struct Channels {
    out: mpsc::Sender<Message>,
    inputs: HashMap<u8, Input>,
    closed: Closed,
    tasks: [JoinHandle<()>; 2],
}

/// One channel toward the client.
pub(crate) struct Sender {
    number: u8,
    out: mpsc::Sender<Message>,
}

impl Sender {
    pub(crate) async fn data(&self, bytes: Bytes) -> Result<(), Gone> {
        let mut message = BytesMut::with_capacity(bytes.len() + 1);
        message.put_u8(self.number);
        message.put(bytes);
        let message = Message::Binary(message.freeze());
        self.out.send(message).await.map_err(|_| Gone)
    }
}

impl Channels {
    /// Serves channels on a WebSocket. What the client sends on channels other than `inputs` is dropped;
    /// `half_close`: the client can close a channel (version 5).
    pub fn new<S>(socket: WebSocketStream<S>, inputs: &[u8], half_close: bool) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sink, source) = socket.split();
        let (out, outgoing) = mpsc::channel(QUEUE);
        let (ended, closed) = Closed::new();
        let (mut feeders, mut readers) = (HashMap::new(), HashMap::new());
        for &number in inputs {
            let (feeder, input) = stream::input();
            feeders.insert(number, feeder);
            readers.insert(number, input);
        }
        let tasks = [
            tokio::spawn(read(source, feeders, half_close, ended)),
            tokio::spawn(write(sink, outgoing)),
        ];
        Self {
            out,
            inputs: readers,
            closed,
            tasks,
        }
    }

    /// What the client sends on a channel. Each can be taken once.
    pub fn input(&mut self, number: u8) -> Option<Input> {
        self.inputs.remove(&number)
    }

    /// A channel toward the client.
    pub fn output(&self, number: u8) -> Output {
        Output::channel(Sender {
            number,
            out: self.out.clone(),
        })
    }

    /// Sends an empty message on a channel, by which clients learn that the connection serves.
    ///
    /// # Errors
    /// The connection has closed.
    pub async fn greet(&self, number: u8) -> Result<(), Gone> {
        let sender = Sender {
            number,
            out: self.out.clone(),
        };
        sender.data(Bytes::new()).await
    }

    /// Tells when the connection has ended.
    pub fn closed(&self) -> Closed {
        self.closed.clone()
    }

    /// Ends the connection in order, after everything that was sent.
    pub async fn close(mut self) {
        let end = CloseFrame {
            code: CloseCode::Normal,
            reason: "".into(),
        };
        let last = async {
            if self.out.send(Message::Close(Some(end))).await.is_ok() {
                self.closed.wait().await;
            }
        };
        let _ = tokio::time::timeout(LINGER, last).await;
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|task| task.abort());
    }
}

async fn read<S: AsyncRead + AsyncWrite + Unpin>(
    mut source: SplitStream<WebSocketStream<S>>,
    mut feeders: HashMap<u8, Feeder>,
    half_close: bool,
    ended: watch::Sender<bool>,
) {
    let budget = Budget::new();
    // Pings are answered while the next message is read. After the client's close there is no next message.
    while let Some(message) = source.next().await {
        let mut bytes = match message {
            Ok(Message::Binary(bytes)) => bytes,
            Ok(Message::Text(_)) => {
                tracing::debug!(
                    "a WebSocket client sent text where only binary messages are meant"
                );
                break;
            }
            Ok(_) => continue,
            Err(error) => {
                tracing::debug!(%error, "a WebSocket connection ends");
                break;
            }
        };
        match bytes[..] {
            [] => continue,
            [CLOSE_CHANNEL, number] if half_close => {
                if let Some(feeder) = feeders.remove(&number) {
                    feeder.end();
                }
                continue;
            }
            _ => {}
        }
        let number = bytes.get_u8();
        let Some(feeder) = feeders.get(&number).filter(|feeder| feeder.is_read()) else {
            continue;
        };
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(CHUNK));
            let Some(held) = budget.take(part.len()).await else {
                return;
            };
            feeder.chunk(part, held);
        }
    }
    let _ = ended.send(true);
}

async fn write<S: AsyncRead + AsyncWrite + Unpin>(
    mut sink: SplitSink<WebSocketStream<S>, Message>,
    mut outgoing: mpsc::Receiver<Message>,
) {
    while let Some(message) = outgoing.recv().await {
        let last = message.is_close();
        let mut sent = sink.feed(message).await;
        if sent.is_ok() && (last || outgoing.is_empty()) {
            sent = sink.flush().await;
        }
        if let Err(error) = sent {
            tracing::debug!(%error, "a WebSocket connection takes no more");
            return;
        }
        if last {
            return;
        }
    }
}

/// A WebSocket whose binary messages are pieces of one byte stream.
pub struct Tunnel<S> {
    socket: WebSocketStream<S>,
    read: Bytes,
}

impl<S> Tunnel<S> {
    /// A tunnel through a WebSocket.
    pub fn new(socket: WebSocketStream<S>) -> Self {
        Self {
            socket,
            read: Bytes::new(),
        }
    }
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::other(other),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.read.is_empty() {
            match futures::ready!(Pin::new(&mut this.socket).poll_next(context)) {
                None | Some(Ok(Message::Close(_))) => return Poll::Ready(Ok(())),
                Some(Ok(Message::Binary(bytes))) => this.read = bytes,
                Some(Ok(Message::Text(_))) => {
                    let text = "text in a tunnel of binary messages";
                    return Poll::Ready(Err(io::Error::other(text)));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
        let length = this.read.len().min(buffer.remaining());
        buffer.put_slice(&this.read.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Tunnel<S> {
    fn poll_message(&mut self, context: &mut Context<'_>, bytes: Bytes) -> Poll<io::Result<usize>> {
        let length = bytes.len();
        let mut socket = Pin::new(&mut self.socket);
        let sent = match futures::ready!(socket.as_mut().poll_ready(context)) {
            Ok(()) => socket.start_send(Message::Binary(bytes)),
            Err(error) => Err(error),
        };
        Poll::Ready(sent.map(|()| length).map_err(io_error))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    /// One message for a frame's head and its data.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut message = BytesMut::new();
        for slice in slices {
            let room = CHUNK.saturating_mul(2) - message.len();
            message.put_slice(&slice[..slice.len().min(room)]);
        }
        self.get_mut().poll_message(context, message.freeze())
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket)
            .poll_flush(context)
            .map_err(io_error)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket)
            .poll_close(context)
            .map_err(io_error)
    }
}
