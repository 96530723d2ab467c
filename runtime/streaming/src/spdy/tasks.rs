//! The two tasks of a connection: one reads, one writes.

use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf,
    WriteHalf,
};
use tokio::sync::{mpsc, watch};

use super::frame::{Control, HEAD, Head, ResetStatus, data_head};
use super::headers::{Deflater, Headers, Inflater};
use super::table::{Out, Shared};
use super::{ProtocolError, Role, Stream};
use crate::stream::{CHUNK, Feeder, Gone};

/// Reads frames and hands on what they say.
pub struct Reader<S> {
    transport: BufReader<ReadHalf<S>>,
    shared: Arc<Shared>,
    inflater: Inflater,
    role: Role,
    accept: mpsc::Sender<Stream>,
    /// The last stream that the peer opened.
    last: u32,
}

impl<S: AsyncRead + AsyncWrite> Reader<S> {
    /// A reader at the beginning of a connection. What the peer opens goes to `accept`.
    pub fn new(
        transport: ReadHalf<S>,
        shared: Arc<Shared>,
        role: Role,
        accept: mpsc::Sender<Stream>,
    ) -> Self {
        Self {
            transport: BufReader::with_capacity(CHUNK / 2, transport),
            shared,
            inflater: Inflater::default(),
            role,
            accept,
            last: 0,
        }
    }

    /// Reads until the connection ends.
    pub async fn run(mut self, ended: watch::Sender<bool>) {
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
pub async fn write<S: AsyncRead + AsyncWrite>(
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
