//! One SPDY connection: a task that reads and hands on, a task that writes, and the table of streams between them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf,
    WriteHalf,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::frame::{Control, HEAD, Head, MAX_ID, ResetStatus, data_head};
use super::headers::{Deflater, Headers, Inflater};
use super::{OpenError, ProtocolError};
use crate::stream::{self, Budget, CHUNK, Closed, Feeder, Gone, Input, Output, QUEUE};

/// The most streams at the same time.
const MAX_STREAMS: usize = 1024;
/// How many streams may wait to be accepted.
const BACKLOG: usize = 16;
/// How long the peer may take to read what was sent before a connection is closed, and to close its side.
const LINGER: Duration = Duration::from_secs(10);

/// Which side of the connection this is. Clients have odd stream IDs, servers even ones.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// It asked for the connection.
    Client,
    /// It was asked.
    Server,
}

/// A stream that is open in both directions.
pub struct Stream {
    /// Its ID on this connection.
    pub id: u32,
    /// What it was opened with.
    pub headers: Headers,
    /// What the peer sends.
    pub input: Input,
    /// What the peer gets.
    pub output: Output,
}

/// A connection. Dropped, it closes at once; see [`Connection::close`].
pub struct Connection {
    shared: Arc<Shared>,
    accepted: mpsc::Receiver<Stream>,
    closed: Closed,
    tasks: [JoinHandle<()>; 2],
    next_id: tokio::sync::Mutex<u32>,
}

/// What the writer is told.
enum Out {
    Control(Control),
    Data(u32, Bytes, bool),
    /// Say goodbye and half-close the transport.
    Close,
}

/// One stream's place in the table. It is free when both directions have ended.
struct Entry {
    /// `None` when the peer has ended its direction.
    feeder: Option<Feeder>,
    /// `None` when the peer has answered.
    opener: Option<oneshot::Sender<()>>,
    /// This side has ended its direction.
    finished: bool,
}

struct Shared {
    streams: Mutex<HashMap<u32, Entry>>,
    out: mpsc::Sender<Out>,
    /// Streams that were dropped, at most one message each.
    resets: mpsc::UnboundedSender<u32>,
    budget: Budget,
}

impl Shared {
    /// The table. It is locked for moments only; a panic elsewhere leaves it whole.
    fn streams(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, out: Out) -> Result<(), Gone> {
        self.out.send(out).await.map_err(|_| Gone)
    }

    async fn reset(&self, id: u32, status: ResetStatus) -> Result<(), Gone> {
        let status = status as u32;
        self.send(Out::Control(Control::Reset { id, status })).await
    }

    /// A new stream in the table, and its ends for this side; `None` when there are too many.
    fn add(
        self: &Arc<Self>,
        id: u32,
        headers: Headers,
        opener: Option<oneshot::Sender<()>>,
    ) -> Option<Stream> {
        let (feeder, input) = stream::input();
        let mut streams = self.streams();
        if streams.len() >= MAX_STREAMS {
            return None;
        }
        let entry = Entry {
            feeder: Some(feeder),
            opener,
            finished: false,
        };
        streams.insert(id, entry);
        let output = Output::spdy(Sender {
            shared: self.clone(),
            id,
        });
        Some(Stream {
            id,
            headers,
            input,
            output,
        })
    }

    /// The peer has ended its direction.
    fn ended(&self, id: u32) {
        let mut streams = self.streams();
        if let Some(entry) = streams.get_mut(&id) {
            if let Some(feeder) = entry.feeder.take() {
                feeder.end();
            }
            if entry.finished {
                streams.remove(&id);
            }
        }
    }

    /// This side has ended its direction; false if there is no such stream (any more).
    fn finish(&self, id: u32) -> bool {
        let mut streams = self.streams();
        let Some(entry) = streams.get_mut(&id) else {
            return false;
        };
        entry.finished = true;
        if entry.feeder.is_none() {
            streams.remove(&id);
        }
        true
    }
}

/// This side's direction of a stream.
pub(crate) struct Sender {
    shared: Arc<Shared>,
    id: u32,
}

impl Sender {
    pub(crate) async fn data(&self, bytes: Bytes) -> Result<(), Gone> {
        if !self.shared.streams().contains_key(&self.id) {
            return Err(Gone); // reset by the peer
        }
        self.shared.send(Out::Data(self.id, bytes, false)).await
    }

    pub(crate) async fn finish(&self) {
        if self.shared.finish(self.id) {
            let end = Out::Data(self.id, Bytes::new(), true);
            let _ = self.shared.send(end).await;
        }
    }

    pub(crate) fn reset(&self) {
        if self.shared.streams().remove(&self.id).is_some() {
            let _ = self.shared.resets.send(self.id);
        }
    }
}

impl Connection {
    /// Speaks SPDY on a transport from now on.
    ///
    /// # Errors
    /// The compression library fails.
    pub fn new<S>(transport: S, role: Role) -> Result<Self, ProtocolError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let deflater = Deflater::new()?;
        let (out, outgoing) = mpsc::channel(QUEUE);
        let (resets, dropped) = mpsc::unbounded_channel();
        let (accept, accepted) = mpsc::channel(BACKLOG);
        let (ended, closed) = Closed::new();
        let shared = Arc::new(Shared {
            streams: Mutex::default(),
            out,
            resets,
            budget: Budget::new(),
        });
        let (reader, writer) = tokio::io::split(transport);
        let reading = Reader {
            transport: BufReader::with_capacity(CHUNK / 2, reader),
            shared: shared.clone(),
            inflater: Inflater::default(),
            role,
            accept,
            last: 0,
        };
        let tasks = [
            tokio::spawn(reading.run(ended)),
            tokio::spawn(write(writer, deflater, outgoing, dropped)),
        ];
        let first = match role {
            Role::Client => 1,
            Role::Server => 2,
        };
        Ok(Self {
            shared,
            accepted,
            closed,
            tasks,
            next_id: tokio::sync::Mutex::new(first),
        })
    }

    /// The next stream that the peer opens; `None` when the connection has ended.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.accepted.recv().await
    }

    /// Refuses every stream that the peer opens from now on.
    pub fn refuse(&mut self) {
        self.accepted.close();
    }

    /// Opens a stream and waits until the peer has accepted it.
    ///
    /// # Errors
    /// The peer refuses it, or the connection ends.
    pub async fn open(&self, headers: Headers) -> Result<Stream, OpenError> {
        let (opener, answer) = oneshot::channel();
        let stream = {
            // IDs must grow on the wire.
            let mut next = self.next_id.lock().await;
            let id = *next;
            if id > MAX_ID {
                return Err(OpenError::Closed);
            }
            *next += 2;
            let stream = self.shared.add(id, headers.clone(), Some(opener));
            let stream = stream.ok_or(OpenError::Refused)?;
            let syn = Control::SynStream {
                id,
                fin: false,
                unidirectional: false,
                headers,
            };
            let sent = self.shared.send(Out::Control(syn)).await;
            sent.map_err(|_| OpenError::Closed)?;
            stream
        };
        let mut closed = self.closed.clone();
        tokio::select! {
            biased;
            answer = answer => answer.map(|()| stream).map_err(|_| OpenError::Refused),
            () = closed.wait() => Err(OpenError::Closed),
        }
    }

    /// Tells when the connection has ended.
    pub fn closed(&self) -> Closed {
        self.closed.clone()
    }

    /// Ends the connection in order: what was sent is delivered, and the peer gets the time to close its side first, so
    /// that nothing it has not read yet is lost.
    pub async fn close(mut self) {
        self.refuse();
        let last = async {
            if self.shared.send(Out::Close).await.is_ok() {
                self.closed.wait().await;
            }
        };
        let _ = tokio::time::timeout(LINGER, last).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|task| task.abort());
        // Whoever still reads a stream learns that the connection has gone.
        self.shared.streams().clear();
    }
}

struct Reader<S> {
    transport: BufReader<ReadHalf<S>>,
    shared: Arc<Shared>,
    inflater: Inflater,
    role: Role,
    accept: mpsc::Sender<Stream>,
    /// The last stream that the peer opened.
    last: u32,
}

impl<S: AsyncRead + AsyncWrite> Reader<S> {
    async fn run(mut self, ended: watch::Sender<bool>) {
        if let Err(error) = self.frames().await {
            tracing::debug!(%error, "a SPDY connection ends");
            if !matches!(error, ProtocolError::Io(_)) {
                let last = self.last;
                let bye = Control::GoAway { last, status: 1 };
                let _ = self.shared.send(Out::Control(bye)).await;
                let _ = self.shared.send(Out::Close).await;
            }
        }
        // Every input reads that the client has gone, every opener that it is refused.
        self.shared.streams().clear();
        let _ = ended.send(true);
    }

    async fn frames(&mut self) -> Result<(), ProtocolError> {
        loop {
            if self.transport.fill_buf().await?.is_empty() {
                return Ok(());
            }
            let mut head = [0; HEAD];
            self.transport.read_exact(&mut head).await?;
            match Head::parse(head)? {
                Head::Data { id, fin, length } => self.data(id, fin, length).await?,
                Head::Control {
                    kind,
                    flags,
                    length,
                } => {
                    let mut payload = vec![0; length];
                    self.transport.read_exact(&mut payload).await?;
                    let control = Control::parse(kind, flags, &payload, &mut self.inflater)?;
                    if self.control(control).await.is_err() {
                        return Ok(()); // the writer has ended, and with it the connection
                    }
                }
            }
        }
    }

    /// Hands a stream's bytes on in chunks; those of a stream that is not read are dropped.
    async fn data(&mut self, id: u32, fin: bool, length: usize) -> Result<(), ProtocolError> {
        let mut left = length;
        while left > 0 {
            let part = left.min(CHUNK);
            left -= part;
            let feeder = self.feeder(id);
            let held = match &feeder {
                Some(_) => self.shared.budget.take(part).await,
                None => None,
            };
            let mut bytes = BytesMut::zeroed(part);
            self.transport.read_exact(&mut bytes).await?;
            if let (Some(feeder), Some(held)) = (feeder, held) {
                feeder.chunk(bytes.freeze(), held);
            }
        }
        if fin {
            self.shared.ended(id);
        }
        Ok(())
    }

    fn feeder(&self, id: u32) -> Option<Feeder> {
        let streams = self.shared.streams();
        let feeder = streams.get(&id)?.feeder.as_ref()?;
        feeder.is_read().then(|| feeder.clone())
    }

    async fn control(&mut self, control: Control) -> Result<(), Gone> {
        match control {
            Control::SynStream {
                id, fin, headers, ..
            } => return self.opened(id, fin, headers).await,
            Control::SynReply { id, fin, .. } => {
                let opener = self
                    .shared
                    .streams()
                    .get_mut(&id)
                    .and_then(|e| e.opener.take());
                if let Some(opener) = opener {
                    let _ = opener.send(());
                }
                if fin {
                    self.shared.ended(id);
                }
            }
            Control::Reset { id, .. } => {
                self.shared.streams().remove(&id);
            }
            // An echo has the asker's parity.
            Control::Ping(id) if (id % 2 == 1) == (self.role == Role::Server) => {
                return self.shared.send(Out::Control(Control::Ping(id))).await;
            }
            Control::Headers { id, fin: true, .. } => self.shared.ended(id),
            Control::GoAway { .. } => self.accept = mpsc::channel(1).0,
            Control::Ping(_)
            | Control::Headers { .. }
            | Control::Settings
            | Control::WindowUpdate { .. }
            | Control::Unknown(_) => {}
        }
        Ok(())
    }

    async fn opened(&mut self, id: u32, fin: bool, headers: Headers) -> Result<(), Gone> {
        if (id % 2 == 1) != (self.role == Role::Server) || id <= self.last {
            return self.shared.reset(id, ResetStatus::ProtocolError).await;
        }
        self.last = id;
        let stream = match self.shared.add(id, headers, None) {
            Some(stream) if !self.accept.is_closed() => stream,
            _ => {
                self.shared.streams().remove(&id);
                return self.shared.reset(id, ResetStatus::RefusedStream).await;
            }
        };
        if fin {
            self.shared.ended(id);
        }
        let reply = Control::SynReply {
            id,
            fin: false,
            headers: Headers::default(),
        };
        self.shared.send(Out::Control(reply)).await?;
        // Nobody may want it any more: dropped, it is reset.
        let _ = self.accept.send(stream).await;
        Ok(())
    }
}

/// Writes frames in the order in which they were given, until it is told to close or the transport breaks.
async fn write<S: AsyncRead + AsyncWrite>(
    mut transport: WriteHalf<S>,
    mut deflater: Deflater,
    mut outgoing: mpsc::Receiver<Out>,
    mut dropped: mpsc::UnboundedReceiver<u32>,
) {
    loop {
        // The data of a stream comes before its reset.
        let out = tokio::select! {
            biased;
            out = outgoing.recv() => out,
            id = dropped.recv() => id.map(|id| {
                let status = ResetStatus::Cancel as u32;
                Out::Control(Control::Reset { id, status })
            }),
        };
        let written = match out {
            Some(Out::Control(control)) => match control.encode(&mut deflater) {
                Ok(frame) => transport.write_all(&frame).await,
                Err(error) => Err(std::io::Error::other(error)),
            },
            Some(Out::Data(id, bytes, fin)) => {
                let head = data_head(id, fin, bytes.len());
                transport
                    .write_all_buf(&mut Buf::chain(&head[..], bytes))
                    .await
            }
            Some(Out::Close) | None => break,
        };
        let flushed = match written {
            Ok(()) if outgoing.is_empty() => transport.flush().await,
            other => other,
        };
        if let Err(error) = flushed {
            tracing::debug!(%error, "a SPDY connection takes no more");
            return;
        }
    }
    if let Ok(bye) = (Control::GoAway { last: 0, status: 0 }).encode(&mut deflater) {
        let _ = transport.write_all(&bye).await;
    }
    let _ = transport.flush().await;
    let _ = transport.shutdown().await;
}
