//! Streams between a client and a process, whatever carries them: [`Input`] from the client, [`Output`] to it.
//!
//! Memory is bounded by construction. What a connection has received and nobody has taken yet holds a part of the
//! connection's [`Budget`]; when that is used up, the connection is not read, and the client waits by TCP. What is
//! sent waits in a queue of a few chunks for the connection's one writer. Neither SPDY's peers in Kubernetes nor
//! WebSocket have flow control of a single stream, so a stream that is not read can hold back its connection's others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::{spdy, websocket};

/// The most bytes of a chunk, and of a frame that is sent.
pub const CHUNK: usize = 32 << 10;
/// What a connection may hold that was received and not taken yet.
const BUDGET: usize = 1 << 20;
/// What a chunk costs beside its bytes, so that many small ones are bounded as well.
const OVERHEAD: usize = 128;
/// How many chunks may wait to be sent.
pub(crate) const QUEUE: usize = 16;

/// The connection is closed, or the client has reset the stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the client has gone")]
pub struct Gone;

/// The memory of one connection.
#[derive(Clone)]
pub(crate) struct Budget(Arc<Semaphore>);

impl Budget {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(BUDGET)))
    }

    /// Waits until a chunk of `length` bytes may be held.
    pub(crate) async fn take(&self, length: usize) -> Option<OwnedSemaphorePermit> {
        let cost = (length + OVERHEAD).min(BUDGET);
        // At most BUDGET. The semaphore is never closed.
        self.0.clone().acquire_many_owned(cost as u32).await.ok()
    }
}

/// Bytes of a stream. They count against the connection's memory until they are dropped.
#[derive(Debug)]
pub struct Chunk {
    /// The bytes.
    pub bytes: Bytes,
    _held: OwnedSemaphorePermit,
}

/// What comes of a stream.
pub(crate) enum Item {
    Chunk(Chunk),
    End,
}

/// The connection's end of an [`Input`].
pub(crate) struct Feeder(mpsc::UnboundedSender<Item>);

impl Feeder {
    /// Hands bytes on; for a reader that has gone they are dropped. `held` bounds what is in the queue.
    pub(crate) fn chunk(&self, bytes: Bytes, held: OwnedSemaphorePermit) {
        let _ = self.0.send(Item::Chunk(Chunk { bytes, _held: held }));
    }

    /// The client has half-closed the stream. Dropping the feeder without it means that it was reset.
    pub(crate) fn end(self) {
        let _ = self.0.send(Item::End);
    }

    /// Whether anybody still reads.
    pub(crate) fn is_read(&self) -> bool {
        !self.0.is_closed()
    }
}

impl Clone for Feeder {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// The bytes that a client sends on one stream.
pub struct Input {
    items: mpsc::UnboundedReceiver<Item>,
    ended: bool,
}

/// An input and the end that feeds it.
pub(crate) fn input() -> (Feeder, Input) {
    let (sender, items) = mpsc::unbounded_channel();
    (
        Feeder(sender),
        Input {
            items,
            ended: false,
        },
    )
}

impl Input {
    /// The next bytes; `None` after the client has half-closed the stream. Can be dropped without losing bytes.
    ///
    /// # Errors
    /// [`Gone`] when the stream was reset or its connection closed.
    pub async fn next(&mut self) -> Result<Option<Chunk>, Gone> {
        if self.ended {
            return Ok(None);
        }
        match self.items.recv().await {
            Some(Item::Chunk(chunk)) => Ok(Some(chunk)),
            Some(Item::End) => {
                self.ended = true;
                Ok(None)
            }
            None => Err(Gone),
        }
    }
}

enum To {
    Spdy(spdy::Sender),
    Channel(websocket::Sender),
}

/// The bytes that a client gets on one stream. Dropped before [`Output::finish`], it resets the stream where the
/// transport can say that.
pub struct Output {
    to: To,
    finished: AtomicBool,
}

impl Output {
    pub(crate) fn spdy(sender: spdy::Sender) -> Self {
        Self::new(To::Spdy(sender))
    }

    pub(crate) fn channel(sender: websocket::Sender) -> Self {
        Self::new(To::Channel(sender))
    }

    fn new(to: To) -> Self {
        Self {
            to,
            finished: AtomicBool::new(false),
        }
    }

    /// Sends bytes; waits while a slow client has not taken what was sent before.
    ///
    /// # Errors
    /// [`Gone`] when the stream was reset, finished, or its connection closed.
    pub async fn write(&self, mut bytes: Bytes) -> Result<(), Gone> {
        while !bytes.is_empty() {
            if self.finished.load(Ordering::Relaxed) {
                return Err(Gone);
            }
            let part = bytes.split_to(bytes.len().min(CHUNK));
            match &self.to {
                To::Spdy(sender) => sender.data(part).await?,
                To::Channel(sender) => sender.data(part).await?,
            }
        }
        Ok(())
    }

    /// Half-closes the stream: the client reads its end. A second call does nothing.
    pub async fn finish(&self) {
        if !self.finished.swap(true, Ordering::Relaxed) {
            match &self.to {
                To::Spdy(sender) => sender.finish().await,
                // Servers have no way to end one channel; the connection's end is the end of all.
                To::Channel(_) => {}
            }
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.finished.load(Ordering::Relaxed)
            && let To::Spdy(sender) = &self.to
        {
            sender.reset();
        }
    }
}

/// Tells when a connection has ended.
#[derive(Clone, Debug)]
pub struct Closed(watch::Receiver<bool>);

impl Closed {
    pub(crate) fn new() -> (watch::Sender<bool>, Self) {
        let (sender, receiver) = watch::channel(false);
        (sender, Self(receiver))
    }

    /// Waits for the end.
    pub async fn wait(&mut self) {
        // A sender that is gone has ended as well.
        let _ = self.0.wait_for(|closed| *closed).await;
    }
}
