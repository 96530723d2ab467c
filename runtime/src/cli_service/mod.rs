//! The CLI's own service, `caisson.cli.v1`: what the `caisson` command needs beyond CRI, on the same code paths.

mod images;
mod streams;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use caisson_proto::cli;
use cli::cli_server::Cli;
use cli::stream_request::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use crate::cri::{Context, CriError, detached, pods};
use crate::sandbox::pod::memory::HostMemory;

type Answer<T> = Result<Response<T>, Status>;

/// How many messages may wait for a slow client.
const BACKLOG: usize = 32;

/// The service.
pub struct Service {
    context: Arc<Context>,
}

impl Service {
    /// The service on this context.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context }
    }
}

fn responses<T: Send + 'static>(receiver: mpsc::Receiver<Result<T, Status>>) -> BoxStream<T> {
    Box::pin(ReceiverStream::new(receiver))
}

/// The first message, which says what is wanted.
async fn first(requests: &mut Streaming<cli::StreamRequest>) -> Result<cli::StreamStart, Status> {
    match requests
        .message()
        .await?
        .and_then(|request| request.message)
    {
        Some(Message::Start(start)) => Ok(start),
        _ => Err(CriError::invalid("the first message of the stream is not `start`").into()),
    }
}

/// A path of the daemon's host.
fn absolute(path: &str) -> Result<PathBuf, CriError> {
    let path = PathBuf::from(path);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(CriError::invalid(format!(
            "the path {} is not absolute",
            path.display()
        ))),
    }
}

#[tonic::async_trait]
impl Cli for Service {
    async fn exec(
        &self,
        request: Request<Streaming<cli::StreamRequest>>,
    ) -> Answer<BoxStream<cli::StreamResponse>> {
        let mut requests = request.into_inner();
        let start = first(&mut requests).await?;
        let container = self.context.registry.container(&start.container_id)?;
        let (sender, receiver) = mpsc::channel(BACKLOG);
        streams::exec(&container, start, requests, sender).await?;
        Ok(Response::new(responses(receiver)))
    }

    async fn attach(
        &self,
        request: Request<Streaming<cli::StreamRequest>>,
    ) -> Answer<BoxStream<cli::StreamResponse>> {
        let mut requests = request.into_inner();
        let start = first(&mut requests).await?;
        let container = self.context.registry.container(&start.container_id)?;
        let (sender, receiver) = mpsc::channel(BACKLOG);
        streams::attach(&self.context, &container, start, requests, sender).await?;
        Ok(Response::new(responses(receiver)))
    }

    async fn pull(
        &self,
        request: Request<cli::PullRequest>,
    ) -> Answer<BoxStream<cli::PullProgress>> {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        images::pull(&self.context, request.into_inner(), sender)?;
        Ok(Response::new(responses(receiver)))
    }

    async fn load(
        &self,
        request: Request<cli::LoadRequest>,
    ) -> Answer<BoxStream<cli::PullProgress>> {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        images::load(&self.context, request.into_inner(), sender)?;
        Ok(Response::new(responses(receiver)))
    }

    async fn save(&self, request: Request<cli::SaveRequest>) -> Answer<BoxStream<cli::SaveChunk>> {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        images::save(&self.context, request.into_inner(), sender)?;
        Ok(Response::new(responses(receiver)))
    }

    async fn prune(&self, request: Request<cli::PruneRequest>) -> Answer<cli::PruneResponse> {
        let context = self.context.clone();
        let all = request.get_ref().all;
        let pruned = detached(async move { images::prune(&context, all).await }).await?;
        Ok(Response::new(pruned))
    }

    async fn timings(&self, request: Request<cli::TimingsRequest>) -> Answer<cli::TimingsResponse> {
        let pod = self
            .context
            .registry
            .pod(&request.get_ref().pod_sandbox_id)?;
        let steps = pod
            .sandbox()
            .map(|sandbox| sandbox.timings().steps())
            .unwrap_or_default();
        let micros =
            |duration: std::time::Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Ok(Response::new(cli::TimingsResponse {
            steps: steps
                .into_iter()
                .map(|step| cli::Timing {
                    start_us: micros(step.start),
                    duration_us: micros(step.duration),
                    step: step.name,
                })
                .collect(),
        }))
    }

    async fn snapshot(
        &self,
        request: Request<cli::SnapshotRequest>,
    ) -> Answer<cli::SnapshotResponse> {
        let request = request.into_inner();
        let pod = self.context.registry.pod(&request.pod_sandbox_id)?;
        let (context, dir) = (self.context.clone(), absolute(&request.path)?);
        let leave = request.leave_running;
        detached(async move { pods::snapshot(&context, &pod, dir, leave).await }).await?;
        Ok(Response::new(cli::SnapshotResponse {}))
    }

    async fn restore(&self, request: Request<cli::RestoreRequest>) -> Answer<cli::RestoreResponse> {
        let (context, dir) = (self.context.clone(), absolute(&request.get_ref().path)?);
        let restored = detached(async move { pods::restore(&context, dir).await });
        Ok(Response::new(cli::RestoreResponse {
            pod_sandbox_id: restored.await?,
        }))
    }

    async fn pod_memory(
        &self,
        request: Request<cli::PodMemoryRequest>,
    ) -> Answer<cli::PodMemoryResponse> {
        let id = &request.get_ref().pod_sandbox_id;
        let pod = self.context.registry.pod(id)?;
        let Some(pid) = pod.sandbox().and_then(|sandbox| sandbox.host_pid()) else {
            let message = format!("pod {id} has no process, so it holds no memory");
            return Err(CriError::precondition(message).into());
        };
        let read = tokio::task::spawn_blocking(move || HostMemory::read(pid));
        let memory = read.await.map_err(io::Error::other).flatten();
        let memory = memory.map_err(|error| {
            CriError::internal(format!("the memory of pod {id} cannot be read: {error}"))
        })?;
        Ok(Response::new(cli::PodMemoryResponse {
            private_bytes: memory.private,
            shared_bytes: memory.shared,
            proportional_bytes: memory.proportional,
        }))
    }
}
