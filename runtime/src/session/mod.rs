//! A client's session with a process: a further one in a container, or the container's own. What the client sends goes
//! to the process, what the process says to the client, until one of them has ended.
//!
//! The command line's service and the streaming server are two kinds of client; each brings a [`Source`] and a
//! [`Sink`].

mod pump;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use nix::fcntl::OFlag;
use tokio::net::unix::pipe::Receiver;

use crate::cri::containers::exec::{Exec, Plan, resize};
use crate::cri::containers::{self, Copies, exits};
use crate::cri::registry::Container;
use crate::cri::{Context, CriError};
use crate::sandbox::{Sandbox, StreamKind};
use crate::store::ContainerState;
use pump::{Input, Outputs, feed, pump};

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
    outputs: Outputs,
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
            let mut outputs: Outputs = Vec::new();
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
        let mut outputs: Outputs = Vec::new();
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

/// A pipe: this side reads, the pod process writes.
fn pipe() -> Result<(Receiver, OwnedFd), CriError> {
    let fail =
        |error: &dyn std::fmt::Display| CriError::internal(format!("cannot make a pipe: {error}"));
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| fail(&e))?;
    let reader = Receiver::from_owned_fd(reader).map_err(|e| fail(&e))?;
    Ok((reader, writer))
}
