//! CreateContainer, StartContainer, UpdateContainer, RemoveContainer.

use std::sync::Arc;

use caisson_proto::agent::{
    self as proto, CreateContainerRequest, CreateContainerResponse, ProcessUser, layer::Source,
};

use super::blocking;
use super::container::{Container, Phase, Process};
use super::error::ServiceError;
use super::exits;
use super::pod::Pod;
use super::stdio::{Streams, Wanted};
use crate::engine::spec::{LinuxResources, Spec};
use crate::engine::{self, Directory, DiskRange, ImageVolume, Layer, MemoryVolume, RootFs};
use crate::{debug, warn};

const LAYERS_MAX: usize = 127;

/// Makes a container and tells its process's PID and user.
pub async fn create(
    pod: Arc<Pod>,
    request: CreateContainerRequest,
) -> Result<CreateContainerResponse, ServiceError> {
    let id = request.container_id.clone();
    let reservation = pod.reserve(&id)?;
    let layers = request
        .rootfs
        .as_ref()
        .map_or(0, |rootfs| rootfs.layers.len());
    if !(1..=LAYERS_MAX).contains(&layers) {
        return Err(ServiceError::Argument {
            field: "rootfs.layers",
            reason: format!("has {layers} layers, 1 to {LAYERS_MAX} are possible"),
        });
    }
    let window = pod.reaper.spawning();
    let (engine, init) = blocking(move || make(request)).await??;
    let exit = window.claim(init.pid);
    drop(window);
    let pid = init.pid;
    let user = engine.identity();
    let container = Container::new(id, engine, init);
    if let Some(oom) = &pod.oom {
        oom.add(&container);
    }
    exits::watch_init(pod.clone(), container.clone(), exit);
    debug!("container {} created, process {pid}", container.id);
    reservation.fulfil(container);
    let user = user.map(|(uid, gid, groups)| ProcessUser { uid, gid, groups });
    Ok(CreateContainerResponse { pid, user })
}

/// The blocking part of [`create`]: undone as a whole if a step of it fails.
fn make(
    request: CreateContainerRequest,
) -> Result<(engine::Container, Arc<Process>), ServiceError> {
    let spec = Spec::parse(&request.spec_json)?;
    let wanted = Wanted {
        stdin: request.stdin,
        stdout: true,
        stderr: true,
    };
    let (pipes, stdio) = Streams::pipes(wanted).map_err(|error| ServiceError::Io {
        step: "make the pipes of the standard streams",
        error,
    })?;
    let volumes = request.image_volumes.into_iter();
    let rootfs = RootFs {
        layers: layers("rootfs.layers", request.rootfs.unwrap_or_default().layers)?,
        volumes: volumes
            .map(|volume| {
                Ok(ImageVolume {
                    layers: layers("image_volumes.layers", volume.layers)?,
                    sub_path: volume.sub_path,
                })
            })
            .collect::<Result<_, ServiceError>>()?,
        memory: request
            .memory_volumes
            .into_iter()
            .map(memory_volume)
            .collect(),
    };
    let (container, master) =
        engine::Container::create(&request.container_id, spec, rootfs, stdio)?;
    let streams = match master.map(Streams::terminal).transpose() {
        Ok(terminal) => terminal.unwrap_or(pipes),
        Err(error) => {
            if let Err(error) = container.destroy() {
                warn!("undo container {}: {error}", request.container_id);
            }
            return Err(ServiceError::Io {
                step: "take the terminal",
                error,
            });
        }
    };
    let init = Process::new(container.pid(), streams);
    Ok((container, init))
}

/// The layers of an image, as the engine knows them.
fn layers(field: &'static str, layers: Vec<proto::Layer>) -> Result<Vec<Layer>, ServiceError> {
    let layer = |layer: proto::Layer| match layer.source {
        Some(Source::Path(path)) => Ok(Layer::File(path.into())),
        Some(Source::Disk(range)) => Ok(Layer::Disk(DiskRange {
            serial: range.serial,
            offset: range.offset,
            bytes: range.bytes,
        })),
        None => Err(ServiceError::Argument {
            field,
            reason: "has a layer without a source".into(),
        }),
    };
    layers.into_iter().map(layer).collect()
}

fn memory_volume(volume: proto::MemoryVolume) -> MemoryVolume {
    let directory = |directory: Option<proto::Directory>| {
        let root = proto::Directory {
            mode: 0o755,
            ..proto::Directory::default()
        };
        let proto::Directory { mode, uid, gid } = directory.unwrap_or(root);
        Directory { mode, uid, gid }
    };
    MemoryVolume {
        name: volume.name,
        size: volume.size_bytes,
        root: directory(volume.root),
        sub_path: volume.sub_path,
        sub: directory(volume.sub),
    }
}

/// Runs an engine call that shares the container with others, off the event loop.
pub async fn with_engine<T: Send + 'static>(
    container: &Arc<Container>,
    call: impl FnOnce(&engine::Container) -> Result<T, engine::EngineError> + Send + 'static,
) -> Result<T, ServiceError> {
    let container = container.clone();
    Ok(blocking(move || call(&container.engine)).await??)
}

/// Lets a created container's process run.
pub async fn start(pod: Arc<Pod>, id: String) -> Result<(), ServiceError> {
    let container = pod.container(&id)?;
    pod.check_moving()?;
    container.begin_start()?;
    let result = with_engine(&container, engine::Container::start).await;
    // A failed start ends the process: its exit is what the daemon sees next.
    container.set_phase(Phase::Running);
    if result.is_ok() {
        debug!("container {id} started");
    }
    result
}

/// Changes a container's limits.
pub async fn update(pod: Arc<Pod>, id: String, resources: Vec<u8>) -> Result<(), ServiceError> {
    let container = pod.container(&id)?;
    let resources = LinuxResources::parse(&resources)?;
    with_engine(&container, move |engine| engine.update(&resources)).await
}

/// Ends, unmounts and forgets a container; one that is not there is not an error.
pub async fn remove(pod: Arc<Pod>, id: String) -> Result<(), ServiceError> {
    super::validate::container_id(&id)?;
    let Some(container) = pod.take_for_removal(&id).await else {
        return Ok(());
    };
    let result = match blocking(move || container.engine.destroy()).await {
        Ok(result) => result.map_err(ServiceError::from),
        Err(error) => Err(error),
    };
    pod.end_removal(&id, result.is_ok());
    match &result {
        Ok(()) => debug!("container {id} removed"),
        Err(error) => warn!("remove container {id}: {error}"),
    }
    result
}
