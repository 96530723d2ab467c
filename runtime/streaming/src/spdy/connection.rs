//! One SPDY connection: a task that reads and hands on, a task that writes, and the table of streams between them.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::frame::{Control, MAX_ID};
use super::headers::{Deflater, Headers};
use super::table::{Out, Shared};
use super::tasks::{Reader, write};
use super::{OpenError, ProtocolError};
use crate::stream::{Closed, Input, Output, QUEUE};

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
        let shared = Shared::new(out, resets);
        let (reader, writer) = tokio::io::split(transport);
        let reading = Reader::new(reader, shared.clone(), role, accept);
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
