//! The streams of one connection, shared by its reader, its writer and everybody who holds a stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::Stream;
use super::frame::{Control, ResetStatus};
use super::headers::Headers;
use crate::stream::{self, Budget, Feeder, Gone, Output};

/// The most streams at the same time.
const MAX_STREAMS: usize = 1024;

/// What the writer is told.
pub enum Out {
    /// A control frame.
    Control(Control),
    /// Bytes of a stream, and whether they are its last.
    Data(u32, Bytes, bool),
    /// Say goodbye and half-close the transport.
    Close,
}

/// One stream's place in the table. It is free when both directions have ended.
pub struct Entry {
    /// `None` when the peer has ended its direction.
    pub feeder: Option<Feeder>,
    /// `None` when the peer has answered.
    pub opener: Option<oneshot::Sender<()>>,
    /// This side has ended its direction.
    finished: bool,
}

pub struct Shared {
    streams: Mutex<HashMap<u32, Entry>>,
    out: mpsc::Sender<Out>,
    /// Streams that were dropped, at most one message each.
    resets: mpsc::UnboundedSender<u32>,
    /// What may be held that was received.
    pub budget: Budget,
}

impl Shared {
    /// An empty table, for a writer that reads the other ends.
    pub fn new(out: mpsc::Sender<Out>, resets: mpsc::UnboundedSender<u32>) -> Arc<Self> {
        Arc::new(Self {
            streams: Mutex::default(),
            out,
            resets,
            budget: Budget::new(),
        })
    }

    /// The table. It is locked for moments only; a panic elsewhere leaves it whole.
    pub fn streams(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives something to the writer.
    pub async fn send(&self, out: Out) -> Result<(), Gone> {
        self.out.send(out).await.map_err(|_| Gone)
    }

    /// Resets a stream that is not in the table.
    pub async fn reset(&self, id: u32, status: ResetStatus) -> Result<(), Gone> {
        let status = status as u32;
        self.send(Out::Control(Control::Reset { id, status })).await
    }

    /// A new stream in the table, and its ends for this side; `None` when there are too many.
    pub fn add(
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
    pub fn ended(&self, id: u32) {
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
    pub fn finish(&self, id: u32) -> bool {
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
pub struct Sender {
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
