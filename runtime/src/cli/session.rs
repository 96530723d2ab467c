//! An interactive session with a process: standard streams, window size, exit status.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use caisson_proto::cli::stream_request::Message as Request;
use caisson_proto::cli::stream_response::Message as Response;
use caisson_proto::cli::{StreamRequest, StreamResponse, StreamStart};
use caisson_proto::cri;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::client::{CliError, Client};
use super::terminal::{self, RawMode};

/// How many bytes of standard input go into one message.
const CHUNK: usize = 32 << 10;
/// How long a container that was asked to stop by Ctrl-C may take, in seconds.
const STOP_SECONDS: i64 = 10;

/// What to do with a process.
pub struct Session {
    /// The first message.
    pub start: StreamStart,
    /// Which container Ctrl-C stops; without a terminal only, where it is a character like others.
    pub stop: Option<(Client, String)>,
}

/// Attaches to a container's own process until it ends.
pub async fn attach(client: &Client, session: Session) -> Result<ExitCode, CliError> {
    let (requests, receiver, raw) = begin(&session)?;
    let responses = client
        .cli
        .clone()
        .attach(ReceiverStream::new(receiver))
        .await?
        .into_inner();
    converse(requests, responses, session, raw).await
}

/// Runs one more process in a container until it ends.
pub async fn exec(client: &Client, session: Session) -> Result<ExitCode, CliError> {
    let (requests, receiver, raw) = begin(&session)?;
    let responses = client
        .cli
        .clone()
        .exec(ReceiverStream::new(receiver))
        .await?
        .into_inner();
    converse(requests, responses, session, raw).await
}

type Requests = mpsc::Sender<StreamRequest>;
type Begun = (Requests, mpsc::Receiver<StreamRequest>, Option<RawMode>);

fn begin(session: &Session) -> Result<Begun, CliError> {
    let (requests, receiver) = mpsc::channel(8);
    let mut start = session.start.clone();
    if start.tty {
        start.size = terminal::size();
    }
    let raw = (start.tty && start.stdin && io::stdin().is_terminal())
        .then(RawMode::enter)
        .transpose()
        .map_err(|cause| CliError::Io {
            what: "the terminal cannot be set to raw mode".into(),
            cause,
        })?;
    // The channel is empty, so there is room.
    let _ = requests.try_send(message(Request::Start(start)));
    Ok((requests, receiver, raw))
}

fn message(message: Request) -> StreamRequest {
    StreamRequest {
        message: Some(message),
    }
}

async fn converse(
    requests: Requests,
    mut responses: Streaming<StreamResponse>,
    session: Session,
    raw: Option<RawMode>,
) -> Result<ExitCode, CliError> {
    if session.start.stdin {
        tokio::spawn(send_stdin(requests.clone()));
    }
    if session.start.tty {
        tokio::spawn(send_resizes(requests.clone()));
    } else if let Some((client, container)) = session.stop {
        tokio::spawn(stop_on_signal(client, container));
    }
    let result = receive(&mut responses).await;
    drop(raw);
    drop(requests);
    result
}

async fn receive(responses: &mut Streaming<StreamResponse>) -> Result<ExitCode, CliError> {
    while let Some(response) = responses.message().await? {
        match response.message {
            Some(Response::Stdout(bytes)) => write(io::stdout(), &bytes)?,
            Some(Response::Stderr(bytes)) => write(io::stderr(), &bytes)?,
            Some(Response::Exited(exit)) => {
                if exit.oom_killed {
                    eprintln!(
                        "caisson: the container was killed because it went over its memory limit"
                    );
                }
                // A status is 0 to 255.
                return Ok(ExitCode::from(u8::try_from(exit.code).unwrap_or(u8::MAX)));
            }
            Some(Response::Started(_)) | None => {}
        }
    }
    Err(CliError::Daemon(
        "the daemon ended the session before the process ended".into(),
    ))
}

fn write(mut stream: impl Write, bytes: &[u8]) -> Result<(), CliError> {
    let written = stream.write_all(bytes).and_then(|()| stream.flush());
    match written {
        // Whoever read our output has enough of it, as with any program in a pipe.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(CliError::Quiet(141)),
        other => other.map_err(|cause| CliError::Io {
            what: "the output cannot be written".into(),
            cause,
        }),
    }
}

async fn send_stdin(requests: Requests) {
    let mut stdin = tokio::io::stdin();
    let mut chunk = vec![0; CHUNK];
    loop {
        let next = match stdin.read(&mut chunk).await {
            Ok(n) if n > 0 => Request::Stdin(chunk[..n].to_vec()),
            _ => Request::StdinClosed(true),
        };
        let last = matches!(next, Request::StdinClosed(_));
        if requests.send(message(next)).await.is_err() || last {
            return;
        }
    }
}

async fn send_resizes(requests: Requests) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else {
        return;
    };
    while changes.recv().await.is_some() {
        if let Some(size) = terminal::size()
            && requests.send(message(Request::Resize(size))).await.is_err()
        {
            return;
        }
    }
}

/// Ctrl-C asks the container to stop; the second one does not wait.
async fn stop_on_signal(client: Client, container: String) {
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return;
    };
    let mut timeout = STOP_SECONDS;
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        let request = cri::StopContainerRequest {
            container_id: container.clone(),
            timeout,
        };
        timeout = 0;
        let mut runtime = client.runtime.clone();
        tokio::spawn(async move {
            if let Err(status) = runtime.stop_container(request).await {
                eprintln!("caisson: {}", status.message());
            }
        });
    }
}
