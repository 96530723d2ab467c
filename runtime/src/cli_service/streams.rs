//! Interactive streams of the command line: messages of its service on one side, a [`Session`] on the other.

use std::sync::Arc;

use bytes::Bytes;
use caisson_proto::cli;
use cli::stream_request::Message as Request;
use cli::stream_response::Message as Response;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::cri::containers::exec::Plan;
use crate::cri::registry::Container;
use crate::cri::{Context, CriError};
use crate::session::{Attach, End, Event, Session, Sink, Size, Source, Which};

type Sender = mpsc::Sender<Result<cli::StreamResponse, Status>>;

/// Runs a process in a container and moves its streams until it has ended. A client that goes away ends it.
///
/// # Errors
/// See [`Session::exec`].
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
    let session = Session::exec(container, &plan, start.size.map(size)).await;
    serve(session, requests, sender)
}

/// Moves the streams of a container's own process until it has ended; starts it first if that is asked. A client that
/// goes away leaves it as it is.
///
/// # Errors
/// See [`Session::attach`].
pub async fn attach(
    context: &Arc<Context>,
    container: &Arc<Container>,
    start: cli::StreamStart,
    requests: Streaming<cli::StreamRequest>,
    sender: Sender,
) -> Result<(), CriError> {
    let attach = Attach {
        stdin: start.stdin,
        stdout: true,
        stderr: true,
        size: start.size.map(size),
        start: start.start_container,
        detach: false,
    };
    let session = Session::attach(context, container, attach).await;
    serve(session, requests, sender)
}

/// Runs a session in a task of its own.
fn serve(
    session: Result<Session, CriError>,
    requests: Streaming<cli::StreamRequest>,
    sender: Sender,
) -> Result<(), CriError> {
    let session = match session {
        Ok(session) => session,
        Err(error) => return not_executed(error, sender),
    };
    tokio::spawn(async move {
        send(&sender, Response::Started(cli::Started {})).await;
        let result = session
            .run(Requests(requests), Responses(&sender), sender.closed())
            .await;
        match result {
            Some(Ok(End::Exited { code, oom_killed })) => {
                send(&sender, Response::Exited(cli::Exited { code, oom_killed })).await;
            }
            Some(Err(error)) => {
                let _ = sender.send(Err(error.into())).await;
            }
            Some(Ok(End::Detached)) | None => {}
        }
    });
    Ok(())
}

fn size(size: cli::WindowSize) -> Size {
    Size {
        columns: size.columns,
        rows: size.rows,
    }
}

struct Requests(Streaming<cli::StreamRequest>);

impl Source for Requests {
    async fn next(&mut self) -> Option<Event> {
        loop {
            match self.0.message().await.ok()??.message {
                Some(Request::Stdin(bytes)) => return Some(Event::Stdin(bytes.into())),
                Some(Request::StdinClosed(true)) => return Some(Event::StdinClosed),
                Some(Request::Resize(new)) => return Some(Event::Resize(size(new))),
                Some(Request::Start(_) | Request::StdinClosed(false)) | None => {}
            }
        }
    }
}

struct Responses<'a>(&'a Sender);

impl Sink for Responses<'_> {
    async fn send(&self, which: Which, bytes: Bytes) -> bool {
        let bytes = bytes.into();
        let response = match which {
            Which::Stdout => Response::Stdout(bytes),
            Which::Stderr => Response::Stderr(bytes),
        };
        send(self.0, response).await
    }
}

/// A program that cannot be run is told as a shell tells it: on standard error, and by the exit status.
fn not_executed(error: CriError, sender: Sender) -> Result<(), CriError> {
    let Some(why) = error.unexecutable else {
        return Err(error);
    };
    tokio::spawn(async move {
        let said = format!("caisson: {error}\n");
        send(&sender, Response::Started(cli::Started {})).await;
        send(&sender, Response::Stderr(said.into_bytes())).await;
        let exited = cli::Exited {
            code: why.exit_status().into(),
            oom_killed: false,
        };
        send(&sender, Response::Exited(exited)).await;
    });
    Ok(())
}

async fn send(sender: &Sender, message: Response) -> bool {
    let response = cli::StreamResponse {
        message: Some(message),
    };
    sender.send(Ok(response)).await.is_ok()
}
