//! Interactive streams: a further process in a container, or the container's own.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use caisson_proto::cli;
use cli::stream_request::Message as Request;
use cli::stream_response::Message as Response;
use nix::fcntl::OFlag;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::cri::containers::exec::{Exec, Plan, resize};
use crate::cri::containers::{self, Copies, exits};
use crate::cri::registry::Container;
use crate::cri::{Context, CriError};
use crate::sandbox::StreamKind;
use crate::store::ContainerState;

type Sender = mpsc::Sender<Result<cli::StreamResponse, Status>>;

/// What is sent at once.
const CHUNK: usize = 32 << 10;
/// How long output may be silent after the process has ended, while something holds it open.
const SILENCE: Duration = Duration::from_secs(2);

/// Runs a process in a container and moves its streams until it has ended. A client that goes away ends it.
///
/// # Errors
/// See [`Exec::begin`].
pub async fn exec(
    container: &Arc<Container>,
    start: cli::StreamStart,
    requests: Streaming<cli::StreamRequest>,
    sender: Sender,
) -> Result<(), CriError> {
    let plan = Plan {
        command: start.command,
        tty: start.tty,
        stdin: start.stdin,
        env: start.env,
        working_dir: start.working_dir,
        user: start.user,
    };
    let exec = match Exec::begin(container, &plan).await {
        Ok(exec) => Arc::new(exec),
        Err(error) => return not_executed(error, sender),
    };
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
        if let Some(size) = start.size.filter(|_| plan.tty) {
            exec.resize(size.columns, size.rows).await?;
        }
        Ok::<_, CriError>((outputs, input))
    };
    let (outputs, input) = match connected.await {
        Ok(connected) => connected,
        Err(error) => {
            exec.kill().await;
            return Err(error);
        }
    };
    tokio::spawn(async move {
        send(&sender, Response::Started(cli::Started {})).await;
        let resizing = exec.clone();
        let resize = move |size: cli::WindowSize| {
            let exec = resizing.clone();
            async move { exec.resize(size.columns, size.rows).await }
        };
        let typing = tokio::spawn(feed(requests, input, resize));
        let end = async {
            exec.wait()
                .await
                .map(|status| (status.code, status.oom_killed))
        };
        let gone = sender.clone();
        tokio::select! {
            () = pump(&sender, outputs, end) => {}
            () = gone.closed() => exec.kill().await,
        }
        typing.abort();
    });
    Ok(())
}

/// Moves the streams of a container's own process until it has ended; starts it first if that is asked. A client that
/// goes away leaves it as it is.
///
/// # Errors
/// FAILED_PRECONDITION for a container that does not run (or, with `start_container`, was started before).
pub async fn attach(
    context: &Arc<Context>,
    container: &Arc<Container>,
    start: cli::StreamStart,
    requests: Streaming<cli::StreamRequest>,
    sender: Sender,
) -> Result<(), CriError> {
    let record = container.record();
    let config = &record.config.0;
    if start.stdin && !config.stdin && !config.tty {
        return Err(CriError::precondition(format!(
            "container {} was made without a standard input",
            container.id
        )));
    }
    let wanted = if start.start_container {
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
    let (stdout, stdout_copy) = pipe()?;
    let mut outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)> =
        vec![(Box::new(stdout), Which::Stdout)];
    let mut stderr_copy = None;
    if !config.tty {
        let (stderr, copy) = pipe()?;
        outputs.push((Box::new(stderr), Which::Stderr));
        stderr_copy = Some(copy);
    }
    let input = if start.stdin {
        let stream = sandbox.stream(&container.id, "", StreamKind::Stdin).await?;
        Some(Input::Whole(stream))
    } else {
        None
    };
    if let Some(size) = start.size.filter(|_| config.tty) {
        resize(sandbox.as_ref(), &container.id, "", size.columns, size.rows).await?;
    }
    if start.start_container {
        let copies = Copies {
            stdout: Some(stdout_copy),
            stderr: stderr_copy,
        };
        let (context, container) = (context.clone(), container.clone());
        let started =
            crate::cri::detached(
                async move { containers::start(&context, &container, copies).await },
            );
        if let Err(error) = started.await {
            return not_executed(error, sender);
        }
    } else {
        sandbox
            .attach(&container.id, Some(stdout_copy), stderr_copy)
            .await?;
    }

    let container = container.clone();
    tokio::spawn(async move {
        send(&sender, Response::Started(cli::Started {})).await;
        let resizing = (sandbox, container.id.clone());
        let resize = move |size: cli::WindowSize| {
            let (sandbox, id) = resizing.clone();
            async move { resize(sandbox.as_ref(), &id, "", size.columns, size.rows).await }
        };
        let typing = tokio::spawn(feed(requests, input, resize));
        let end = async {
            exits::noted(&container).await;
            let record = container.record();
            Ok((record.exit_code, record.reason == "OOMKilled"))
        };
        let gone = sender.clone();
        tokio::select! {
            () = pump(&sender, outputs, end) => {}
            () = gone.closed() => {}
        }
        typing.abort();
    });
    Ok(())
}

/// A program that cannot be run is told as a shell tells it: on standard error, and by the exit status.
fn not_executed(error: CriError, sender: Sender) -> Result<(), CriError> {
    let Some(code) = error.not_executed().map(i32::from) else {
        return Err(error);
    };
    tokio::spawn(async move {
        let said = format!("caisson: {error}\n");
        send(&sender, Response::Started(cli::Started {})).await;
        send(&sender, Response::Stderr(said.into_bytes())).await;
        let exited = cli::Exited {
            code,
            oom_killed: false,
        };
        send(&sender, Response::Exited(exited)).await;
    });
    Ok(())
}

#[derive(Clone, Copy)]
enum Which {
    Stdout,
    Stderr,
}

/// Where a client's input goes: a connection of its own, or one direction of a terminal's.
enum Input {
    Whole(UnixStream),
    Half(tokio::net::unix::OwnedWriteHalf),
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

/// Moves what the client sends to where it belongs, until the client sends no more.
async fn feed<F: Future<Output = Result<(), CriError>>>(
    mut requests: Streaming<cli::StreamRequest>,
    mut input: Option<Input>,
    resize: impl Fn(cli::WindowSize) -> F,
) {
    let mut closing = tokio::task::JoinSet::new();
    while let Ok(Some(request)) = requests.message().await {
        match request.message {
            Some(Request::Stdin(bytes)) => {
                if let Some(open) = input.as_mut()
                    && open.write(&bytes).await.is_err()
                {
                    input = None; // the process has closed it
                }
            }
            Some(Request::StdinClosed(true)) => {
                if let Some(open) = input.take() {
                    closing.spawn(open.close());
                }
            }
            Some(Request::Resize(size)) => {
                if let Err(error) = resize(size).await {
                    tracing::debug!(%error, "a terminal was not resized");
                }
            }
            Some(Request::Start(_) | Request::StdinClosed(false)) | None => {}
        }
    }
    // A client that only has no more to say may still listen: its input ends.
    if let Some(open) = input.take() {
        closing.spawn(open.close());
    }
    while closing.join_next().await.is_some() {}
}

/// Sends the outputs to their end and then how the process ended.
async fn pump(
    sender: &Sender,
    outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)>,
    end: impl Future<Output = Result<(i32, bool), CriError>>,
) {
    let progress = AtomicU64::new(0);
    let all = futures::future::join_all(
        outputs
            .into_iter()
            .map(|(output, which)| forward(sender, output, which, &progress)),
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
        let before = progress.load(Ordering::Relaxed);
        if tokio::time::timeout(SILENCE, &mut all).await.is_ok() {
            complete = true;
        } else if progress.load(Ordering::Relaxed) == before && sender.capacity() > 0 {
            break;
        }
    }
    match result {
        Ok((code, oom_killed)) => {
            send(sender, Response::Exited(cli::Exited { code, oom_killed })).await;
        }
        Err(error) => {
            let _ = sender.send(Err(error.into())).await;
        }
    }
}

/// Sends one output to its end. A client that does not read holds back this process and nobody else.
async fn forward(
    sender: &Sender,
    mut output: impl AsyncRead + Unpin,
    which: Which,
    progress: &AtomicU64,
) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(n @ 1..) = output.read(&mut buffer).await {
        let bytes = buffer[..n].to_vec();
        let message = match which {
            Which::Stdout => Response::Stdout(bytes),
            Which::Stderr => Response::Stderr(bytes),
        };
        if !send(sender, message).await {
            return;
        }
        progress.fetch_add(n as u64, Ordering::Relaxed);
    }
}

async fn send(sender: &Sender, message: Response) -> bool {
    let response = cli::StreamResponse {
        message: Some(message),
    };
    sender.send(Ok(response)).await.is_ok()
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

    // must-test: exec and logs that lose the tail of the output when the process ends quickly
    #[tokio::test]
    async fn all_output_comes_before_the_end() {
        let (sender, mut receiver) = mpsc::channel(4);
        let (reader, writer) = pipe().unwrap();
        let bytes = vec![b'x'; 1 << 20];
        let copy = bytes.clone();
        let write = std::thread::spawn(move || {
            use std::io::Write as _;
            std::fs::File::from(writer).write_all(&copy).unwrap();
        });
        let outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)> =
            vec![(Box::new(reader), Which::Stdout)];
        tokio::spawn(async move { pump(&sender, outputs, async { Ok((7, false)) }).await });
        let mut received = 0;
        let mut exited = None;
        while let Some(message) = receiver.recv().await {
            assert!(exited.is_none(), "nothing comes after the end");
            match message.unwrap().message.unwrap() {
                Response::Stdout(bytes) => received += bytes.len(),
                Response::Exited(end) => exited = Some(end.code),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((received, exited), (bytes.len(), Some(7)));
        write.join().unwrap();
    }

    #[tokio::test]
    async fn an_output_held_open_by_something_left_behind_does_not_hold_the_end() {
        let (sender, mut receiver) = mpsc::channel(4);
        let (reader, _kept_open) = pipe().unwrap();
        let outputs: Vec<(Box<dyn AsyncRead + Send + Unpin>, Which)> =
            vec![(Box::new(reader), Which::Stdout)];
        pump(&sender, outputs, async { Ok((0, false)) }).await;
        let last = receiver.recv().await.unwrap().unwrap();
        assert!(matches!(last.message, Some(Response::Exited(_))));
    }
}
