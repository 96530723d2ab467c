//! CreateContainer.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use caisson_proto::{agent, cri};
use serde_json::Value;

use super::super::registry::{Container, Pod, now};
use super::super::spec::{self, AppArmor, ImageDefaults, signal};
use super::super::{Context, CriError, guest, new_id, pods};
use super::{image_volumes, volumes};
use crate::config::HandlerKind;
use crate::image::Image;
use crate::sandbox::Sandbox;
use crate::sandbox::host::apparmor;
use crate::store::{ContainerRecord, ContainerState, Proto, UserRecord};

/// The most bytes of a seccomp profile.
const MAX_PROFILE: u64 = 1 << 20;
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
    let record = record(&pod, config, &image, &volumes)?;

    // Whoever takes the pod apart waits until this has ended, one way or the other.
    let _making = pod.lifecycle.read().await;
    let sandbox = pod.ready()?;
    let container = context
        .registry
        .create_container(record, pod.clone())
        .await?;
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
            context.registry.emit(
                cri::ContainerEventType::ContainerCreatedEvent,
                &container.id,
                &pod.id,
            );
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

fn record(
    pod: &Pod,
    config: cri::ContainerConfig,
    image: &Image,
    volumes: &[Image],
) -> Result<ContainerRecord, CriError> {
    let metadata = config
        .metadata
        .clone()
        .filter(|metadata| !metadata.name.is_empty())
        .ok_or_else(|| {
            CriError::invalid("the container configuration has no metadata with a name")
        })?;
    let pod_config = pod.record().config.0;
    let of = pod_config.metadata.clone().unwrap_or_default();
    let log_path = log_path(&pod_config.log_directory, &config.log_path)?;
    let stop_signal = match signal::from_cri(config.stop_signal) {
        Some(signal) => signal,
        None if image.config.stop_signal.is_empty() => signal::TERM,
        None => signal::parse(&image.config.stop_signal).ok_or_else(|| {
            CriError::invalid(format!(
                "the image's stop signal {} is not known; name one in the configuration",
                image.config.stop_signal
            ))
        })?,
    };
    let resources = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.clone())
        .unwrap_or_default();
    Ok(ContainerRecord {
        id: new_id(),
        sandbox_id: pod.id.clone(),
        name: format!(
            "{}_{}_{}_{}_{}",
            metadata.name, of.name, of.namespace, of.uid, metadata.attempt
        ),
        state: ContainerState::Creating,
        created_at: now(),
        started_at: 0,
        finished_at: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        config: Proto(config),
        resources: Proto(resources),
        image_id: image.id.clone(),
        image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
        layers: std::iter::once(image)
            .chain(volumes)
            .flat_map(|image| &image.layers)
            .map(ToString::to_string)
            .collect(),
        log_path,
        stop_signal,
        process: Value::Null,
        guest_pid: 0,
        user: None,
    })
}

/// The log's path on the host; empty when the client wants none.
fn log_path(directory: &str, file: &str) -> Result<PathBuf, CriError> {
    if directory.is_empty() || file.is_empty() {
        return Ok(PathBuf::new());
    }
    let plain = Path::new(file)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !plain || !directory.starts_with('/') {
        return Err(CriError::invalid(format!(
            "the log path {file} must be relative, without .., in an absolute log_directory (here {directory})"
        )));
    }
    Ok(Path::new(directory).join(file))
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
    let config = container.record().config.0;
    let pod_config = pod.record().config.0;
    let security = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default();

    // Everything that can be refused without the guest is refused before the guest is touched.
    let host = match pod.record().kind {
        HandlerKind::Host => Some(host_pod(&config, &security, &pod_config).await?),
        HandlerKind::MicroVm => None,
    };
    let ids = spec::user_ids(&pods::namespaces(&pod_config))?;
    let mut input = spec::Input {
        config: &config,
        image: &image_defaults(image),
        hostname: &pods::hostname(&pod_config, &pod.id),
        shared_pid: pods::shares_pid(&pod_config),
        target_pid: target_pid(context, &security, pod)?,
        volumes: &[],
        seccomp_profile: seccomp_profile(&security).await?,
        host: host.as_ref(),
        ids,
    };
    spec::build(&input)?;
    let host_paths = volumes::resolve(&config.mounts, host.is_some(), ids).await?;

    let shared = volumes::share(sandbox, &container.id, host_paths).await?;
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
    context.registry.save_container(container).await
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
        apparmor: apparmor_profile(security).await?,
    })
}

/// The name of the AppArmor profile, which is loaded if it is the runtime's own; empty: none.
async fn apparmor_profile(
    security: &cri::LinuxContainerSecurityContext,
) -> Result<String, CriError> {
    let enabled = apparmor::enabled().await;
    match spec::apparmor(security)? {
        AppArmor::Unconfined => Ok(String::new()),
        AppArmor::Named(name) if enabled => Ok(name),
        AppArmor::Named(name) => Err(CriError::invalid(format!(
            "the container asks for the AppArmor profile {name}, and the node's kernel has no AppArmor"
        ))),
        // Without AppArmor in the kernel the runtime's default is none.
        AppArmor::Default { .. } if !enabled => Ok(String::new()),
        AppArmor::Default { asked } => match apparmor::load_default().await {
            Ok(()) => Ok(apparmor::DEFAULT_PROFILE.to_owned()),
            Err(error) if asked => Err(CriError::precondition(format!(
                "the runtime's AppArmor profile cannot be loaded: {error}"
            ))),
            Err(error) => {
                tracing::warn!(%error, "a container runs without the runtime's AppArmor profile");
                Ok(String::new())
            }
        },
    }
}

/// Shows an image's layers to the agent, the lowest first: their paths there.
pub(super) async fn share_layers(
    context: &Context,
    sandbox: &dyn Sandbox,
    image: &Image,
) -> Result<Vec<String>, CriError> {
    let mut layers = Vec::with_capacity(image.layers.len());
    for path in context.images.layer_paths(image) {
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

async fn seccomp_profile(
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Option<Value>, CriError> {
    let Some(path) = spec::seccomp_file(security).filter(|_| !security.privileged) else {
        return Ok(None);
    };
    let fail = |why: String| {
        CriError::invalid(format!("the seccomp profile {path} cannot be used: {why}"))
    };
    let meta = tokio::fs::metadata(&path)
        .await
        .map_err(|e| fail(e.to_string()))?;
    if !meta.is_file() || meta.len() > MAX_PROFILE {
        return Err(fail("it is not a file of at most 1 MiB".into()));
    }
    let text = tokio::fs::read(&path)
        .await
        .map_err(|e| fail(e.to_string()))?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| fail(e.to_string()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_paths_stay_in_their_directory() {
        assert_eq!(
            log_path("/var/log/pods/p", "c/0.log").unwrap(),
            Path::new("/var/log/pods/p/c/0.log")
        );
        assert_eq!(log_path("", "c/0.log").unwrap(), Path::new(""));
        assert_eq!(log_path("/x", "").unwrap(), Path::new(""));
        for (directory, file) in [("/x", "../y"), ("/x", "/etc/passwd"), ("x", "y")] {
            assert!(log_path(directory, file).is_err(), "{directory} {file}");
        }
    }
}
