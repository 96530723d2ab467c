//! What a streaming URL does: sessions with processes, and connections to ports through the agent.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use caisson_streaming::{BackendError, Gone, Input, Output, Resizes, Streams};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::cri::containers::exec::Plan;
use crate::cri::{Context, CriError};
use crate::session::{Attach, End, Event, Session, Sink, Size, Source, Which};

/// What moves between a port and its client at once.
const CHUNK: usize = 32 << 10;
/// How long a client may take to end its direction after the application has ended its own.
const LINGER: Duration = Duration::from_secs(10);

/// The containers and pods behind the URLs.
pub struct Backend {
    context: Arc<Context>,
}

impl Backend {
    /// The backend on this context.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context }
    }
}

impl caisson_streaming::Backend for Backend {
    async fn exec(
        &self,
        container: &str,
        command: Vec<String>,
        tty: bool,
        streams: &mut Streams,
    ) -> Result<i32, BackendError> {
        let container = self.context.registry.container(container).map_err(told)?;
        let plan = Plan {
            command,
            tty,
            stdin: streams.stdin.is_some(),
            ..Plan::default()
        };
        let session = Session::exec(&container, &plan, None).await.map_err(told)?;
        match run(session, streams).await? {
            End::Exited { code, .. } => Ok(code),
            End::Detached => Ok(0),
        }
    }

    async fn attach(&self, container: &str, streams: &mut Streams) -> Result<(), BackendError> {
        let container = self.context.registry.container(container).map_err(told)?;
        let record = container.record();
        let config = &record.config.0;
        let attach = Attach {
            stdin: streams.stdin.is_some(),
            stdout: streams.stdout.is_some(),
            stderr: streams.stderr.is_some(),
            // The first client's input is the container's, if it was made so; a terminal's has no end.
            detach: !config.stdin_once || config.tty,
            ..Attach::default()
        };
        let session = Session::attach(&self.context, &container, attach).await;
        run(session.map_err(told)?, streams).await.map(drop)
    }

    async fn port_forward(
        &self,
        pod: &str,
        port: u16,
        input: &mut Input,
        output: &Output,
    ) -> Result<(), BackendError> {
        let pod = self.context.registry.pod(pod).map_err(told)?;
        let sandbox = pod.ready().map_err(told)?;
        let stream = sandbox.dial(port).await;
        let stream = stream.map_err(|error| told(error.into()))?;
        // A client that goes away, or resets its stream, ends the connection; there is nobody to tell.
        let _ = connect(stream, input, output).await;
        Ok(())
    }
}

/// An error's sentence for a client. Parts of it may come from a guest.
fn told(error: CriError) -> BackendError {
    let message = error.message.chars().filter(|c| !c.is_control());
    BackendError(message.collect())
}

async fn run(session: Session, streams: &mut Streams) -> Result<End, BackendError> {
    let Streams {
        stdin,
        stdout,
        stderr,
        resize,
        closed,
        ..
    } = streams;
    let sent = Sent {
        stdin: stdin.as_mut(),
        resize: resize.as_mut(),
    };
    let outputs = Outputs {
        stdout: stdout.as_ref(),
        stderr: stderr.as_ref(),
    };
    match session.run(sent, outputs, closed.wait()).await {
        Some(result) => result.map_err(told),
        None => Err(BackendError("the client has gone".into())),
    }
}

/// What a client sends.
struct Sent<'a> {
    stdin: Option<&'a mut Input>,
    resize: Option<&'a mut Resizes>,
}

impl Source for Sent<'_> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if self.stdin.is_none() && self.resize.is_none() {
                return None;
            }
            let typed = async {
                match &mut self.stdin {
                    Some(stdin) => stdin.next().await,
                    None => std::future::pending().await,
                }
            };
            let resized = async {
                match &mut self.resize {
                    Some(resize) => resize.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                typed = typed => {
                    let Ok(Some(chunk)) = typed else {
                        self.stdin = None;
                        return Some(Event::StdinClosed);
                    };
                    return Some(Event::Stdin(chunk.bytes));
                }
                resized = resized => {
                    let Some(size) = resized else {
                        self.resize = None;
                        continue;
                    };
                    return Some(Event::Resize(Size {
                        columns: size.columns.into(),
                        rows: size.rows.into(),
                    }));
                }
            }
        }
    }
}

/// What a client gets. An output that it did not ask for is dropped.
struct Outputs<'a> {
    stdout: Option<&'a Output>,
    stderr: Option<&'a Output>,
}

impl Sink for Outputs<'_> {
    async fn send(&self, which: Which, bytes: Bytes) -> bool {
        let output = match which {
            Which::Stdout => self.stdout,
            Which::Stderr => self.stderr,
        };
        match output {
            Some(output) => output.write(bytes).await.is_ok(),
            None => true,
        }
    }
}

/// Moves bytes between an application and a client until both have ended, or one has gone.
async fn connect(
    application: tokio::net::UnixStream,
    input: &mut Input,
    output: &Output,
) -> Result<(), Gone> {
    let (mut reader, mut writer) = application.into_split();
    let up = async {
        let mut open = true;
        while let Some(chunk) = input.next().await? {
            // What the application does not take any more is dropped, so that it holds back no other connection.
            open = open && writer.write_all(&chunk.bytes).await.is_ok();
        }
        let _ = writer.shutdown().await;
        Ok(())
    };
    let down = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            match (&mut reader).take(CHUNK as u64).read_buf(&mut buffer).await {
                Ok(1..) => output.write(buffer.split().freeze()).await?,
                Ok(0) | Err(_) => break,
            }
        }
        output.finish().await;
        Ok(())
    };
    tokio::pin!(up, down);
    tokio::select! {
        ended = &mut up => {
            ended?;
            down.await
        }
        ended = &mut down => {
            ended?;
            tokio::time::timeout(LINGER, up).await.unwrap_or(Ok(()))
        }
    }
}
