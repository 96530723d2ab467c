//! A client's session with a process: a further one in a container, or the container's own. What the client sends goes
//! to the process, what the process says to the client, until one of them has ended.
//!
//! The command line's service and the streaming server are two kinds of client; each brings a [`Source`] and a
//! [`Sink`].

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nix::fcntl::OFlag;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::unix::pipe::Receiver;
use tokio::task::JoinSet;

use crate::cri::containers::exec::{Exec, Plan, resize};
use crate::cri::containers::{self, Copies, exits};
use crate::cri::registry::Container;
use crate::cri::{Context, CriError};
use crate::sandbox::{Sandbox, StreamKind};
use crate::store::ContainerState;

/// What is sent at once.
const CHUNK: usize = 32 << 10;
/// How long output may be silent after the process has ended, while something holds it open.
const SILENCE: Duration = Duration::from_secs(2);

/// Which output.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Which {
    /// Standard output, or a terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a client sends.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// Bytes for standard input.
    Stdin(Bytes),
    /// Standard input is complete.
    StdinClosed,
    /// The client's terminal has this size.
    Resize(Size),
}

/// The size of a terminal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Size {
    /// Columns.
    pub columns: u32,
    /// Rows.
    pub rows: u32,
}

/// Where a client's events come from.
pub trait Source: Send {
    /// The next one; `None` when there will be no more.
    fn next(&mut self) -> impl Future<Output = Option<Event>> + Send;
}

/// Where a client takes output.
pub trait Sink: Send + Sync {
    /// Hands bytes over, and waits while the client is slow; false when it takes no more.
    fn send(&self, which: Which, bytes: Bytes) -> impl Future<Output = bool> + Send;
}

/// How a session ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    /// The process has ended.
    Exited {
        /// 0 to 255.
        code: i32,
        /// The kernel killed it for lack of memory.
        oom_killed: bool,
    },
    /// The client said all it had to say; the process goes on.
    Detached,
}

/// How to attach to a container's own process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attach {
    /// With its standard input.
    pub stdin: bool,
    /// With its standard output, or its terminal's.
    pub stdout: bool,
    /// With its standard error, where it has no terminal.
    pub stderr: bool,
    /// The client's terminal.
    pub size: Option<Size>,
    /// Start the container, once everything is connected.
    pub start: bool,
    /// The end of the client's input detaches it and leaves the container's input open.
    pub detach: bool,
}

/// A process with its streams connected.
pub struct Session {
    process: Process,
    outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)>,
    input: Option<Input>,
    detach: bool,
}

enum Process {
    Exec(Exec),
    Own(Arc<dyn Sandbox>, Arc<Container>),
}

impl Process {
    async fn resize(&self, size: Size) -> Result<(), CriError> {
        match self {
            Self::Exec(exec) => exec.resize(size.columns, size.rows).await,
            Self::Own(sandbox, container) => {
                resize(sandbox.as_ref(), &container.id, "", size.columns, size.rows).await
            }
        }
    }

    async fn end(&self) -> Result<End, CriError> {
        match self {
            Self::Exec(exec) => exec.wait().await.map(|status| End::Exited {
                code: status.code,
                oom_killed: status.oom_killed,
            }),
            Self::Own(_, container) => {
                exits::noted(container).await;
                let record = container.record();
                Ok(End::Exited {
                    code: record.exit_code,
                    oom_killed: record.reason == "OOMKilled",
                })
            }
        }
    }

    /// The client has gone: that ends what runs for it alone.
    async fn abandon(&self) {
        if let Self::Exec(exec) = self {
            exec.kill().await;
        }
    }
}

/// Where a client's input goes: a connection of its own, or one direction of a terminal's.
enum Input {
    Whole(UnixStream),
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

impl Session {
    /// Starts a process in a container and connects its streams.
    ///
    /// # Errors
    /// See [`Exec::begin`].
    pub async fn exec(
        container: &Container,
        plan: &Plan,
        size: Option<Size>,
    ) -> Result<Self, CriError> {
        let exec = Exec::begin(container, plan).await?;
        let connected = async {
            let mut outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)> = Vec::new();
            let mut input = None;
            if plan.tty {
                let (reader, writer) = exec.stream(StreamKind::Tty).await?.into_split();
                outputs.push((Box::new(reader), Which::Stdout));
                input = Some(Input::Half(writer));
            } else {
                if plan.stdin {
                    input = Some(Input::Whole(exec.stream(StreamKind::Stdin).await?));
                }
                for (kind, which) in [
                    (StreamKind::Stdout, Which::Stdout),
                    (StreamKind::Stderr, Which::Stderr),
                ] {
                    outputs.push((Box::new(exec.stream(kind).await?), which));
                }
            }
            if let Some(size) = size.filter(|_| plan.tty) {
                exec.resize(size.columns, size.rows).await?;
            }
            Ok::<_, CriError>((outputs, input))
        };
        match connected.await {
            Ok((outputs, input)) => Ok(Self {
                process: Process::Exec(exec),
                outputs,
                input,
                detach: false,
            }),
            Err(error) => {
                exec.kill().await;
                Err(error)
            }
        }
    }

    /// Connects the streams of a container's own process.
    ///
    /// # Errors
    /// FAILED_PRECONDITION for a container that does not run (or, with `start`, was started before), or that was made
    /// without a standard input where that is asked for.
    pub async fn attach(
        context: &Arc<Context>,
        container: &Arc<Container>,
        attach: Attach,
    ) -> Result<Self, CriError> {
        let record = container.record();
        let config = &record.config.0;
        if attach.stdin && !config.stdin && !config.tty {
            return Err(CriError::precondition(format!(
                "container {} was made without a standard input",
                container.id
            )));
        }
        let wanted = if attach.start {
            ContainerState::Created
        } else {
            ContainerState::Running
        };
        if record.state != wanted {
            return Err(CriError::precondition(format!(
                "container {} cannot be attached to: it does not run (or was started before)",
                container.id
            )));
        }
        let sandbox = container.pod.ready()?;
        let mut outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)> = Vec::new();
        let mut copies = Copies::default();
        if attach.stdout {
            let (reader, copy) = pipe()?;
            outputs.push((Box::new(reader), Which::Stdout));
            copies.stdout = Some(copy);
        }
        if attach.stderr && !config.tty {
            let (reader, copy) = pipe()?;
            outputs.push((Box::new(reader), Which::Stderr));
            copies.stderr = Some(copy);
        }
        let input = if attach.stdin {
            let kind = match attach.detach {
                true => StreamKind::StdinKept,
                false => StreamKind::Stdin,
            };
            Some(Input::Whole(sandbox.stream(&container.id, "", kind).await?))
        } else {
            None
        };
        let process = Process::Own(sandbox.clone(), container.clone());
        if let Some(size) = attach.size.filter(|_| config.tty) {
            process.resize(size).await?;
        }
        if attach.start {
            let (context, container) = (context.clone(), container.clone());
            let starting = async move { containers::start(&context, &container, copies).await };
            crate::cri::detached(starting).await?;
        } else if !outputs.is_empty() {
            let Copies { stdout, stderr } = copies;
            sandbox.attach(&container.id, stdout, stderr).await?;
        }
        Ok(Self {
            process,
            outputs,
            input,
            detach: attach.detach,
        })
    }

    /// Moves everything until the process has ended and said all, or the client detaches. `None` when the client has
    /// gone before: that ends an exec and leaves a container's own process as it is.
    ///
    /// # Errors
    /// The sandbox has ended.
    pub async fn run(
        self,
        source: impl Source,
        sink: impl Sink,
        gone: impl Future<Output = ()>,
    ) -> Option<Result<End, CriError>> {
        let process = &self.process;
        let typing = async {
            if feed(source, self.input, process, self.detach).await {
                return End::Detached;
            }
            std::future::pending().await
        };
        tokio::select! {
            result = pump(&sink, self.outputs, process.end()) => Some(result),
            end = typing => Some(Ok(end)),
            () = gone => {
                process.abandon().await;
                None
            }
        }
    }
}

/// Moves what the client sends to where it belongs, until the client sends no more. True if it is to be detached then.
async fn feed(
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
async fn pump(
    sink: &impl Sink,
    outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)>,
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

/// A pipe: this side reads, the pod process writes.
fn pipe() -> Result<(Receiver, OwnedFd), CriError> {
    let fail =
        |error: &dyn std::fmt::Display| CriError::internal(format!("cannot make a pipe: {error}"));
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| fail(&e))?;
    let reader = Receiver::from_owned_fd(reader).map_err(|e| fail(&e))?;
    Ok((reader, writer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

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
        let outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)> =
            vec![(Box::new(reader), Which::Stdout)];
        let end = pump(&&taken, outputs, async { Ok(ENDED) }).await.unwrap();
        assert_eq!(end, ENDED);
        assert_eq!(taken.0.lock().unwrap().len(), bytes.len());
        write.join().unwrap();
    }

    #[tokio::test]
    async fn an_output_held_open_by_something_left_behind_does_not_hold_the_end() {
        let (reader, _kept_open) = pipe().unwrap();
        let outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)> =
            vec![(Box::new(reader), Which::Stdout)];
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
        let outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)> =
            vec![(Box::new(reader), Which::Stdout)];
        pump(&&slow, outputs, async { Ok(ENDED) }).await.unwrap();
        assert_eq!(*slow.0.lock().unwrap(), 40 << 10);
    }
}
