//! The two directions of a session: what a client sends, and what a process says.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::task::JoinSet;

use super::{End, Event, Process, Sink, Source, Which};
use crate::cri::CriError;

/// What is sent at once.
const CHUNK: usize = 32 << 10;
/// How long output may be silent after the process has ended, while something holds it open.
const SILENCE: Duration = Duration::from_secs(2);

/// What a process says, and which output it is.
pub type Outputs = Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)>;

/// Where a client's input goes: a connection of its own, or one direction of a terminal's.
pub enum Input {
    /// A connection.
    Whole(UnixStream),
    /// A terminal's.
    Half(OwnedWriteHalf),
}

impl Input {
    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Whole(stream) => stream.write_all(bytes).await,
            Self::Half(half) => half.write_all(bytes).await,
        }
    }

    /// Half-close: the process reads the end of its input. A terminal's end is typed (Ctrl-D), not closed.
    async fn close(self) -> std::io::Result<()> {
        match self {
            Self::Whole(mut stream) => {
                stream.shutdown().await?;
                // The other side hangs up when it has read all; until then the connection must live.
                let mut rest = [0; 64];
                while stream.read(&mut rest).await? > 0 {}
                Ok(())
            }
            Self::Half(half) => {
                half.forget();
                Ok(())
            }
        }
    }
}

/// Moves what the client sends to where it belongs, until the client sends no more. True if it is to be detached then.
pub async fn feed(
    mut source: impl Source,
    mut input: Option<Input>,
    process: &Process,
    detach: bool,
) -> bool {
    let mut closing = JoinSet::new();
    while let Some(event) = source.next().await {
        match event {
            Event::Stdin(bytes) => {
                if let Some(open) = input.as_mut()
                    && open.write(&bytes).await.is_err()
                {
                    input = None; // the process has closed it
                }
            }
            Event::StdinClosed => {
                if let Some(open) = input.take() {
                    closing.spawn(open.close());
                }
                if detach {
                    // What was typed is delivered first.
                    while closing.join_next().await.is_some() {}
                    return true;
                }
            }
            Event::Resize(size) => {
                if let Err(error) = process.resize(size).await {
                    tracing::debug!(%error, "a terminal was not resized");
                }
            }
        }
    }
    // A client that only has no more to say may still listen: its input ends.
    if let Some(open) = input.take() {
        closing.spawn(open.close());
    }
    while closing.join_next().await.is_some() {}
    false
}

/// How far the outputs are.
#[derive(Default)]
struct Progress {
    /// Bytes that the client has taken.
    taken: AtomicU64,
    /// Outputs that wait for the client.
    waiting: AtomicUsize,
}

/// Sends the outputs to their end and then tells how the process ended.
pub async fn pump(
    sink: &impl Sink,
    outputs: Outputs,
    end: impl Future<Output = Result<End, CriError>>,
) -> Result<End, CriError> {
    let progress = Progress::default();
    let all = futures::future::join_all(
        outputs
            .into_iter()
            .map(|(output, which)| forward(sink, output, which, &progress)),
    );
    tokio::pin!(all, end);
    let mut complete = false;
    let result = loop {
        tokio::select! {
            result = &mut end => break result,
            _ = &mut all, if !complete => complete = true,
        }
    };
    // must-test: exec and logs that lose the tail of the output when the process ends quickly
    while !complete {
        let before = progress.taken.load(Ordering::Relaxed);
        if tokio::time::timeout(SILENCE, &mut all).await.is_ok() {
            complete = true;
        } else if progress.taken.load(Ordering::Relaxed) == before
            && progress.waiting.load(Ordering::Relaxed) == 0
        {
            break;
        }
    }
    result
}

/// Sends one output to its end. A client that does not read holds back this process and nobody else.
async fn forward(
    sink: &impl Sink,
    mut output: impl AsyncRead + Unpin,
    which: Which,
    progress: &Progress,
) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        let Ok(n @ 1..) = (&mut output).take(CHUNK as u64).read_buf(&mut buffer).await else {
            return;
        };
        progress.waiting.fetch_add(1, Ordering::Relaxed);
        let sent = sink.send(which, buffer.split().freeze()).await;
        progress.waiting.fetch_sub(1, Ordering::Relaxed);
        if !sent {
            return;
        }
        progress.taken.fetch_add(n as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use bytes::Bytes;

    use super::super::pipe;
    use super::*;

    #[derive(Default)]
    struct Taken(Mutex<Vec<u8>>);

    impl Sink for &Taken {
        async fn send(&self, _: Which, bytes: Bytes) -> bool {
            tokio::task::yield_now().await; // a client that is slower than the pipe
            self.0.lock().unwrap().extend_from_slice(&bytes);
            true
        }
    }

    const ENDED: End = End::Exited {
        code: 7,
        oom_killed: false,
    };

    // must-test: exec and logs that lose the tail of the output when the process ends quickly
    #[tokio::test]
    async fn all_output_comes_before_the_end() {
        let taken = Taken::default();
        let (reader, writer) = pipe().unwrap();
        let bytes = vec![b'x'; 1 << 20];
        let copy = bytes.clone();
        let write = std::thread::spawn(move || {
            use std::io::Write as _;
            std::fs::File::from(writer).write_all(&copy).unwrap();
        });
        let outputs: Outputs = vec![(Box::new(reader), Which::Stdout)];
        let end = pump(&&taken, outputs, async { Ok(ENDED) }).await.unwrap();
        assert_eq!(end, ENDED);
        assert_eq!(taken.0.lock().unwrap().len(), bytes.len());
        write.join().unwrap();
    }

    #[tokio::test]
    async fn an_output_held_open_by_something_left_behind_does_not_hold_the_end() {
        let (reader, _kept_open) = pipe().unwrap();
        let outputs: Outputs = vec![(Box::new(reader), Which::Stdout)];
        let taken = Taken::default();
        let end = pump(&&taken, outputs, async { Ok(ENDED) }).await.unwrap();
        assert_eq!(end, ENDED);
    }

    // must-test: a slow reader
    #[tokio::test]
    async fn a_client_that_takes_its_time_loses_nothing() {
        struct Slow(Mutex<usize>);
        impl Sink for &Slow {
            async fn send(&self, _: Which, bytes: Bytes) -> bool {
                // Longer than the silence after which an output is given up.
                tokio::time::sleep(SILENCE + Duration::from_secs(1)).await;
                *self.0.lock().unwrap() += bytes.len();
                true
            }
        }
        let slow = Slow(Mutex::new(0));
        let (reader, writer) = pipe().unwrap();
        {
            use std::io::Write as _;
            let mut file = std::fs::File::from(writer);
            file.write_all(&[b'x'; 40 << 10]).unwrap();
        }
        let outputs: Outputs = vec![(Box::new(reader), Which::Stdout)];
        pump(&&slow, outputs, async { Ok(ENDED) }).await.unwrap();
        assert_eq!(*slow.0.lock().unwrap(), 40 << 10);
    }
}
