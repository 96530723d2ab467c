//! The agent's gRPC service. Each RPC is a few lines here; what it does is in the module of its concern.
//!
//! Calls that change something run in a task of their own: a client that hangs up does not leave half a container
//! behind. Whatever can block runs off the event loop, under locks of the one container it is about.

mod container;
mod containers;
mod error;
mod exec;
mod exits;
mod oom;
mod pod;
mod quiesce;
pub mod shutdown;
mod stats;
mod stdio;
pub mod validate;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use caisson_proto::AGENT_PROTOCOL;
use caisson_proto::agent::agent_server::{Agent, AgentServer};
use caisson_proto::agent::*;
use futures::{Stream, stream};
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

pub use error::ServiceError;
pub use pod::{Ending, Pod};

use crate::sandbox::{self, Plan};
use crate::vsock::Listener;
use pod::Setup;

/// A spec of 4 MiB and what is around it.
const REQUEST_MAX: usize = 5 << 20;
/// The longest grace of Shutdown.
const GRACE_MAX: Duration = Duration::from_secs(3600);

type Events = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;
type Answer<T> = Result<Response<T>, Status>;

/// The service over one pod.
pub struct Service {
    pod: Arc<Pod>,
}

/// Runs something that blocks off the event loop.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ServiceError> {
    Ok(tokio::task::spawn_blocking(call).await?)
}

/// Runs a call to its end even if the client hangs up.
async fn detached<T: Send + 'static>(
    call: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
) -> Result<T, Status> {
    let result = tokio::spawn(call).await.map_err(ServiceError::from)?;
    Ok(result?)
}

/// Watches for OOM kills and for a stream's `SHUTDOWN`, for ever.
pub fn watch(pod: &Arc<Pod>) {
    tokio::spawn(oom::run(pod.clone()));
    let pod = pod.clone();
    tokio::spawn(async move {
        pod.shutdown_requested.notified().await;
        shutdown::run(&pod, shutdown::DEFAULT_GRACE).await;
    });
}

/// Serves gRPC for ever.
///
/// # Errors
/// If the server ends.
pub async fn serve(listener: Listener, pod: Arc<Pod>) -> Result<(), tonic::transport::Error> {
    let service = AgentServer::new(Service { pod }).max_decoding_message_size(REQUEST_MAX);
    let connections = stream::unfold(listener, |listener| async {
        let connection = listener.accept().await;
        if connection.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Some((connection, listener))
    });
    tonic::transport::Server::builder()
        // Each container and exec has a Wait open.
        .max_concurrent_streams(Some(8192))
        .add_service(service)
        .serve_with_incoming(connections)
        .await
}

#[tonic::async_trait]
impl Agent for Service {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Ok(Response::new(VersionResponse {
            protocol: AGENT_PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: release.trim_end().into(),
            health_stream: true,
        }))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Answer<HealthResponse> {
        Ok(Response::new(HealthResponse {
            uptime_ms: u64::try_from(self.pod.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            sandbox_ready: self.pod.setup() == Setup::Ready,
            quiescent: self.pod.is_quiescent(),
        }))
    }

    async fn setup_sandbox(
        &self,
        request: Request<SetupSandboxRequest>,
    ) -> Answer<SetupSandboxResponse> {
        let pod = self.pod.clone();
        detached(async move {
            pod.begin_setup()?;
            // A request that is refused has done nothing, and may be mended and sent again.
            let plan = Plan::try_from(request.into_inner())
                .inspect_err(|_| pod.end_setup(Setup::Fresh))?;
            pod.wait_until_settled().await;
            blocking(move || sandbox::set_up(&plan))
                .await?
                .inspect_err(|error| crate::error!("sandbox: {error}"))?;
            pod.end_setup(Setup::Ready);
            crate::info!("sandbox ready");
            Ok(())
        })
        .await?;
        Ok(Response::new(SetupSandboxResponse {}))
    }

    async fn quiesce(&self, _: Request<QuiesceRequest>) -> Answer<QuiesceResponse> {
        detached(quiesce::quiesce(self.pod.clone())).await?;
        Ok(Response::new(QuiesceResponse {}))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Answer<ResumeResponse> {
        detached(quiesce::resume(self.pod.clone(), request.into_inner())).await?;
        Ok(Response::new(ResumeResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Answer<CreateContainerResponse> {
        let made = detached(containers::create(self.pod.clone(), request.into_inner())).await?;
        Ok(Response::new(made))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Answer<StartContainerResponse> {
        let id = request.into_inner().container_id;
        detached(containers::start(self.pod.clone(), id)).await?;
        Ok(Response::new(StartContainerResponse {}))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        let pid = detached(exec::exec(self.pod.clone(), request.into_inner())).await?;
        Ok(Response::new(ExecResponse { pid }))
    }

    async fn signal(&self, request: Request<SignalRequest>) -> Answer<SignalResponse> {
        detached(exec::signal(self.pod.clone(), request.into_inner())).await?;
        Ok(Response::new(SignalResponse {}))
    }

    async fn wait(&self, request: Request<WaitRequest>) -> Answer<WaitResponse> {
        let request = request.into_inner();
        let status = exec::wait(&self.pod, &request.container_id, &request.exec_id).await?;
        Ok(Response::new(WaitResponse {
            status: Some(status),
        }))
    }

    async fn update_container(
        &self,
        request: Request<UpdateContainerRequest>,
    ) -> Answer<UpdateContainerResponse> {
        let request = request.into_inner();
        let update = containers::update(
            self.pod.clone(),
            request.container_id,
            request.resources_json,
        );
        detached(update).await?;
        Ok(Response::new(UpdateContainerResponse {}))
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Answer<StatsResponse> {
        let request = request.into_inner();
        let answer = stats::read(&self.pod, request.container_ids, request.detail).await?;
        Ok(Response::new(answer))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Answer<RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        detached(containers::remove(self.pod.clone(), id)).await?;
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn resize_tty(&self, request: Request<ResizeTtyRequest>) -> Answer<ResizeTtyResponse> {
        exec::resize(&self.pod, request.into_inner()).await?;
        Ok(Response::new(ResizeTtyResponse {}))
    }

    async fn events(&self, _: Request<EventsRequest>) -> Answer<Events> {
        let events = stream::unfold(Some(self.pod.events.subscribe()), |receiver| async {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Ok(event) => Some((Ok(event), Some(receiver))),
                // Better an end than a gap: the reader lists the containers and subscribes again.
                Err(RecvError::Lagged(lost)) => Some((
                    Err(Status::data_loss(format!(
                        "{lost} events were lost: list the containers"
                    ))),
                    None,
                )),
                Err(RecvError::Closed) => None,
            }
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_containers(
        &self,
        _: Request<ListContainersRequest>,
    ) -> Answer<ListContainersResponse> {
        let containers = self.pod.containers();
        Ok(Response::new(ListContainersResponse {
            containers: containers
                .iter()
                .map(|container| container.state())
                .collect(),
        }))
    }

    async fn shutdown(&self, request: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        let grace = Duration::from_millis(request.into_inner().grace_ms.into()).min(GRACE_MAX);
        if !self.pod.begin_shutdown() {
            return Err(ServiceError::ShuttingDown.into());
        }
        let pod = self.pod.clone();
        detached(async move {
            shutdown::shut_down(&pod, grace).await;
            tokio::spawn(async move { shutdown::end(&pod).await });
            Ok(())
        })
        .await?;
        Ok(Response::new(ShutdownResponse {}))
    }
}
