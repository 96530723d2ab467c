//! `runtime.v1.RuntimeService`: each call taken apart, done elsewhere, and put together again.

use std::sync::Arc;
use std::time::Duration;

use caisson_proto::cri;
use cri::runtime_service_server::RuntimeService;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use super::containers::{self, exec, log, stats};
use super::{Context, CriError, RUNTIME_NAME, conditions, detached, listing, metrics, pods};
use crate::sandbox::ids;
use crate::streaming;
use crate::telemetry::Caller;

type Answer<T> = Result<Response<T>, Status>;

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

fn ok<T>(message: T) -> Answer<T> {
    Ok(Response::new(message))
}

fn later(what: &str) -> Status {
    CriError::unimplemented(format!("{what} is not part of this release of Caisson")).into()
}

/// An idempotent call has nothing to do for what is not there.
fn found<T>(result: Result<T, CriError>) -> Result<Option<T>, CriError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code == tonic::Code::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn seconds(value: i64) -> Duration {
    Duration::from_secs(u64::try_from(value).unwrap_or(0))
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        ok(cri::VersionResponse {
            version: "0.1.0".into(), // of the kubelet's runtime API, as every runtime answers
            runtime_name: RUNTIME_NAME.into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        })
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let kvm = self.context.kvm.require().await;
        let mut info = std::collections::HashMap::new();
        if request.get_ref().verbose {
            let config = serde_json::to_string(&self.context.config).unwrap_or_default();
            info.insert("config".to_owned(), config);
        }
        let user_namespaces = ids::usable(&self.context.config.root).await;
        let handler = |name: &str| cri::RuntimeHandler {
            name: name.to_owned(),
            features: Some(cri::RuntimeHandlerFeatures {
                recursive_read_only_mounts: true,
                user_namespaces,
            }),
        };
        let names = self.context.config.usable_handlers().map(|(name, _)| name);
        ok(cri::StatusResponse {
            status: Some(cri::RuntimeStatus {
                conditions: conditions::conditions(&self.context, kvm).await,
            }),
            info,
            // The empty name stands for the default handler.
            runtime_handlers: std::iter::once("").chain(names).map(handler).collect(),
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..Default::default()
            }),
        })
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        ok(cri::RuntimeConfigResponse {
            linux: Some(cri::LinuxRuntimeConfiguration {
                cgroup_driver: cri::CgroupDriver::Cgroupfs as i32,
            }),
        })
    }

    async fn update_runtime_config(
        &self,
        _: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        // It tells the node's pod CIDR, which is CNI's affair here.
        ok(cri::UpdateRuntimeConfigResponse {})
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let caller = Caller::of(request.metadata());
        let (context, request) = (self.context.clone(), request.into_inner());
        let run = async move { pods::run(&context, request, &caller).await };
        let pod_sandbox_id = detached(run).await?;
        ok(cri::RunPodSandboxResponse { pod_sandbox_id })
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        let id = &request.get_ref().pod_sandbox_id;
        if let Some(pod) = found(self.context.registry.pod(id))? {
            let context = self.context.clone();
            detached(async move { pods::stop(&context, &pod).await }).await?;
        }
        ok(cri::StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        let id = &request.get_ref().pod_sandbox_id;
        if let Some(pod) = found(self.context.registry.pod(id))? {
            let context = self.context.clone();
            detached(async move { pods::remove(&context, &pod).await }).await?;
        }
        ok(cri::RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let request = request.get_ref();
        let pod = self.context.registry.pod(&request.pod_sandbox_id)?;
        let mut status = pods::status(&self.context, &pod);
        if request.verbose {
            status.info = pods::verbose(&pod).await;
        }
        ok(status)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let items = listing::pods(&self.context, &filter);
        ok(cri::ListPodSandboxResponse { items })
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let (context, request) = (self.context.clone(), request.into_inner());
        let container_id =
            detached(async move { containers::create(&context, request).await }).await?;
        ok(cri::CreateContainerResponse { container_id })
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        let container = self
            .context
            .registry
            .container(&request.get_ref().container_id)?;
        let context = self.context.clone();
        detached(async move {
            containers::start(&context, &container, containers::Copies::default()).await
        })
        .await?;
        ok(cri::StartContainerResponse {})
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        if let Some(container) = found(self.context.registry.container(&request.container_id))? {
            let grace = seconds(request.timeout);
            detached(async move { containers::stop(&container, grace).await }).await?;
        }
        ok(cri::StopContainerResponse {})
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        let id = &request.get_ref().container_id;
        if let Some(container) = found(self.context.registry.container(id))? {
            let context = self.context.clone();
            detached(async move { containers::remove(&context, &container).await }).await?;
        }
        ok(cri::RemoveContainerResponse {})
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let containers = listing::containers(&self.context, &filter);
        ok(cri::ListContainersResponse { containers })
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let request = request.get_ref();
        let container = self.context.registry.container(&request.container_id)?;
        ok(cri::ContainerStatusResponse {
            status: Some(containers::status(&container)),
            info: if request.verbose {
                containers::verbose(&container)
            } else {
                std::collections::HashMap::new()
            },
        })
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let container = self.context.registry.container(&request.container_id)?;
        let resources = request
            .linux
            .ok_or_else(|| CriError::invalid("the request has no linux resources"))?;
        let context = self.context.clone();
        detached(async move { containers::update(&context, &container, &resources).await }).await?;
        ok(cri::UpdateContainerResourcesResponse {})
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        let container = self
            .context
            .registry
            .container(&request.get_ref().container_id)?;
        log::reopen(&container).await?;
        ok(cri::ReopenContainerLogResponse {})
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let container = self.context.registry.container(&request.container_id)?;
        // In a task of its own, so that the time-out kills the command even when the client is gone.
        let answer =
            detached(
                async move { exec::sync(&container, request.cmd, seconds(request.timeout)).await },
            )
            .await?;
        ok(answer)
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        let container = self
            .context
            .registry
            .container(&request.get_ref().container_id)?;
        ok(cri::ContainerStatsResponse {
            stats: Some(stats::container(&container).await?),
        })
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let stats = listing::container_stats(&self.context, filter).await;
        ok(cri::ListContainerStatsResponse { stats })
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        let pod = self
            .context
            .registry
            .pod(&request.get_ref().pod_sandbox_id)?;
        ok(cri::PodSandboxStatsResponse {
            stats: Some(stats::pod(&self.context, &pod).await?),
        })
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let stats = listing::pod_stats(&self.context, filter).await;
        ok(cri::ListPodSandboxStatsResponse { stats })
    }

    async fn get_container_events(
        &self,
        _: Request<cri::GetEventsRequest>,
    ) -> Answer<BoxStream<cri::ContainerEventResponse>> {
        ok(listing::events(&self.context))
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let url = streaming::exec(&self.context, request.into_inner())?;
        ok(cri::ExecResponse { url })
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let url = streaming::attach(&self.context, request.into_inner())?;
        ok(cri::AttachResponse { url })
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        let url = streaming::port_forward(&self.context, request.into_inner())?;
        ok(cri::PortForwardResponse { url })
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        // NOT_FOUND before UNIMPLEMENTED: what is not there cannot be checkpointed by anybody.
        self.context
            .registry
            .container(&request.get_ref().container_id)?;
        Err(later("CheckpointContainer"))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let pod = self.context.registry.pod(&request.pod_sandbox_id)?;
        pods::resize(&self.context, &pod, request.overhead, request.resources)?;
        ok(cri::UpdatePodSandboxResourcesResponse {})
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        ok(cri::ListMetricDescriptorsResponse {
            descriptors: metrics::descriptors(),
        })
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        ok(cri::ListPodSandboxMetricsResponse {
            pod_metrics: metrics::list(&self.context).await,
        })
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<BoxStream<cri::StreamPodSandboxesResponse>> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let list = listing::pods(&self.context, &filter);
        ok(listing::stream(list, |pod_sandboxes| {
            cri::StreamPodSandboxesResponse { pod_sandboxes }
        }))
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<BoxStream<cri::StreamContainersResponse>> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let list = listing::containers(&self.context, &filter);
        ok(listing::stream(list, |containers| {
            cri::StreamContainersResponse { containers }
        }))
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<BoxStream<cri::StreamContainerStatsResponse>> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let list = listing::container_stats(&self.context, filter).await;
        ok(listing::stream(list, |container_stats| {
            cri::StreamContainerStatsResponse { container_stats }
        }))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<BoxStream<cri::StreamPodSandboxStatsResponse>> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let list = listing::pod_stats(&self.context, filter).await;
        ok(listing::stream(list, |pod_sandbox_stats| {
            cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        }))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<BoxStream<cri::StreamPodSandboxMetricsResponse>> {
        let list = metrics::list(&self.context).await;
        ok(listing::stream(list, |pod_sandbox_metrics| {
            cri::StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        }))
    }
}
