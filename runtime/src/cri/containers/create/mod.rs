//! CreateContainer.

mod profiles;
mod record;

use std::sync::Arc;

use caisson_proto::{agent, cri};

use super::super::registry::{Container, Pod};
use super::super::spec::{self, ImageDefaults};
use super::super::{Context, CriError, guest, pods};
use super::{image_volumes, volumes};
use crate::config::HandlerKind;
use crate::image::Image;
use crate::sandbox::Sandbox;
use crate::steps::{self, Step};
use crate::store::{ContainerState, UserRecord};

/// The most supplementary groups that are taken from a guest's word.
const MAX_GROUPS: usize = 1024;

/// Makes a container and returns its ID. If a step fails, everything is taken back.
///
/// # Errors
/// FAILED_PRECONDITION in a pod that is not ready; NOT_FOUND for an unknown pod or image; ALREADY_EXISTS with the ID
/// that has the name; INVALID_ARGUMENT or UNIMPLEMENTED that names the field which is wrong or cannot be honoured.
pub async fn create(
    context: &Arc<Context>,
    request: cri::CreateContainerRequest,
) -> Result<String, CriError> {
    let pod = context.registry.pod(&request.pod_sandbox_id)?;
    pod.ready()?;
    let mut config = request
        .config
        .ok_or_else(|| CriError::invalid("the request has no container configuration"))?;
    let image = find_image(context, &config).await?;
    let volumes = image_volumes::find(context, &mut config.mounts).await?;
    let record = record::of(&pod, config, &image, &volumes)?;

    // Whoever takes the pod apart waits until this has ended, one way or the other.
    let _making = pod.lifecycle.read().await;
    let sandbox = pod.ready()?;
    let container = context
        .registry
        .create_container(record, pod.clone())
        .await?;
    steps::done(Step::CreateRecorded);
    match make(
        context,
        &container,
        &pod,
        sandbox.as_ref(),
        &image,
        &volumes,
    )
    .await
    {
        Ok(()) => {
            context
                .registry
                .emit(cri::ContainerEventType::ContainerCreatedEvent, &container);
            Ok(container.id.clone())
        }
        Err(error) => {
            tracing::warn!(container = container.id, pod = pod.id, %error, "the container could not be made");
            undo(context, &container).await;
            Err(error)
        }
    }
}

async fn find_image(context: &Context, config: &cri::ContainerConfig) -> Result<Image, CriError> {
    let name = config
        .image
        .as_ref()
        .map(|image| image.image.as_str())
        .filter(|name| !name.is_empty())
        .ok_or_else(|| CriError::invalid("the container configuration names no image"))?;
    context.images.get(name).await?.ok_or_else(|| {
        CriError::new(
            tonic::Code::NotFound,
            format!("the image {name} is not on this node; pull it first"),
        )
    })
}

/// What the image says of its process.
pub fn image_defaults(image: &Image) -> ImageDefaults {
    let config = &image.config;
    ImageDefaults {
        user: config.user.clone(),
        env: config.env.clone(),
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        working_dir: config.working_dir.clone(),
        stop_signal: config.stop_signal.clone(),
    }
}

async fn make(
    context: &Arc<Context>,
    container: &Arc<Container>,
    pod: &Arc<Pod>,
    sandbox: &dyn Sandbox,
    image: &Image,
    volumes: &[Image],
) -> Result<(), CriError> {
    let (record, pod_record) = (container.record(), pod.record());
    let (config, pod_config) = (&record.config.0, &pod_record.config.0);
    let security = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default();

    // Everything that can be refused without the guest is refused before the guest is touched.
    let host = match pod_record.kind {
        HandlerKind::Host => Some(host_pod(config, &security, pod_config).await?),
        HandlerKind::MicroVm => None,
    };
    let ids = spec::user_ids(&pods::namespaces(pod_config))?;
    let mut input = spec::Input {
        config,
        image: &image_defaults(image),
        hostname: &pods::hostname(pod_config, &pod.id),
        shared_pid: pods::shares_pid(pod_config),
        target_pid: target_pid(context, &security, pod)?,
        volumes: &[],
        seccomp_profile: profiles::seccomp(&security).await?,
        host: host.as_ref(),
        ids,
    };
    spec::build(&input)?;
    let host_paths = volumes::resolve(&config.mounts, host.is_some(), ids).await?;

    let memory_volumes = volumes::Checked::memory_volumes(&host_paths);
    let shared = volumes::share(sandbox, &container.id, host_paths).await?;
    steps::done(Step::VolumesShared);
    input.volumes = &shared;
    let spec = spec::build(&input)?;
    let layers = share_layers(context, sandbox, image).await?;
    let image_volumes = image_volumes::share(context, sandbox, &config.mounts, volumes).await?;
    let process = spec["process"].clone();
    let spec_json = serde_json::to_vec(&spec)
        .map_err(|error| CriError::internal(format!("cannot encode the spec: {error}")))?;
    let request = agent::CreateContainerRequest {
        container_id: container.id.clone(),
        spec_json,
        rootfs: Some(agent::RootFs { layers }),
        stdin: config.stdin,
        image_volumes,
        memory_volumes,
    };
    let mut client = sandbox.agent();
    let what = format!("create container {}", container.id);
    let made = guest::call(
        sandbox,
        &what,
        guest::CREATE,
        client.create_container(request),
    )
    .await?;
    steps::done(Step::AgentCreated);
    container.change(|record| {
        record.process = process;
        record.guest_pid = made.pid;
        record.user = made.user.map(|user| UserRecord {
            uid: user.uid,
            gid: user.gid,
            groups: user.groups.into_iter().take(MAX_GROUPS).collect(),
        });
        record.state = ContainerState::Created;
    });
    context.registry.save_container(container).await?;
    steps::done(Step::CreateSaved);
    Ok(())
}

/// What a container on the host gets of it.
async fn host_pod(
    config: &cri::ContainerConfig,
    security: &cri::LinuxContainerSecurityContext,
    pod: &cri::PodSandboxConfig,
) -> Result<spec::HostPod, CriError> {
    let asked = config.clone();
    let devices = tokio::task::spawn_blocking(move || spec::devices(&asked))
        .await
        .map_err(|error| CriError::internal(format!("the devices cannot be read: {error}")))??;
    Ok(spec::HostPod {
        namespaces: pods::namespaces(pod),
        devices,
        apparmor: profiles::apparmor(security).await?,
    })
}

/// Shows an image's layers to the agent, the lowest first.
pub(super) async fn share_layers(
    context: &Context,
    sandbox: &dyn Sandbox,
    image: &Image,
) -> Result<Vec<agent::Layer>, CriError> {
    let mut layers = Vec::with_capacity(image.layers.len());
    for path in context.images.layers_to_use(image).await? {
        layers.push(sandbox.share_layer(&path).await?);
    }
    Ok(layers)
}

/// The process whose PID namespace the container asks to join.
fn target_pid(
    context: &Context,
    security: &cri::LinuxContainerSecurityContext,
    pod: &Pod,
) -> Result<Option<i32>, CriError> {
    let Some(options) = &security.namespace_options else {
        return Ok(None);
    };
    if options.pid() != cri::NamespaceMode::Target {
        return Ok(None);
    }
    let target = context.registry.container(&options.target_id)?.record();
    if target.sandbox_id != pod.id {
        return Err(CriError::invalid(format!(
            "the target container {} is in another pod",
            target.id
        )));
    }
    if target.state != ContainerState::Running || target.guest_pid <= 0 {
        return Err(CriError::precondition(format!(
            "the target container {} does not run",
            target.id
        )));
    }
    Ok(Some(target.guest_pid))
}

/// Takes back what a failed create has made; what is left goes with the pod.
pub(super) async fn undo(context: &Context, container: &Arc<Container>) {
    if let Some(sandbox) = container.pod.sandbox() {
        let mut client = sandbox.agent();
        let request = agent::RemoveContainerRequest {
            container_id: container.id.clone(),
        };
        let removed = guest::call(
            sandbox.as_ref(),
            "remove a half-made container",
            guest::QUICK,
            client.remove_container(request),
        );
        if let Err(error) = removed.await {
            tracing::debug!(container = container.id, %error, "the agent kept a half-made container");
        }
        if let Err(error) = sandbox.forget(&container.id).await {
            tracing::warn!(container = container.id, %error, "volumes of a half-made container stay until its pod goes");
        }
    }
    if let Err(error) = context.registry.delete_container(container).await {
        tracing::error!(container = container.id, %error, "the container's record could not be deleted");
    }
}
