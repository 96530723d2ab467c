//! The daemon: it takes up what the one before it left, then serves CRI and the CLI's service on a unix socket.
//!
//! Pods do not depend on it: when it stops, they go on.

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use caisson_proto::cli::cli_server::CliServer;
use caisson_proto::cri::image_service_server::ImageServiceServer;
use caisson_proto::cri::runtime_service_server::RuntimeServiceServer;
use caisson_vmm_protocol::RateLimit;
use futures::StreamExt as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::cli_service;
use crate::config::{Config, ConfigError, HandlerKind};
use crate::cri::alpha::V1Alpha2Layer;
use crate::cri::registry::Registry;
use crate::cri::{Context, CriError, image_service, pods, runtime_service};
use crate::doctor::{KvmProbe, cni_config};
use crate::image::{ImageConfig, ImageError, Images, Policy};
use crate::network::Network;
use crate::sandbox::host::HostConfig;
use crate::sandbox::microvm::{MicroVmConfig, Templates};
use crate::sandbox::pod::PodConfig;
use crate::store::{Store, StoreError};
use crate::streaming::Backend;
use crate::telemetry::Telemetry;

/// The largest request, as the kubelet's own limit.
const MAX_REQUEST: usize = 16 << 20;
/// How long calls under way may take when the daemon is told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// The pause after a connection that could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How often layers that nobody needs are looked for.
const COLLECT_EVERY: Duration = Duration::from_secs(60);
/// The mode of directories that only root may use.
const PRIVATE: u32 = 0o700;
/// The fewest guests that may boot at the same time.
const MIN_BOOTS: usize = 2;

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another daemon serves this socket.
    #[error(
        "another daemon already serves {0}; stop it, or set another socket in the configuration"
    )]
    InUse(PathBuf),
    /// A directory, the socket or a signal handler cannot be set up.
    #[error("cannot {what} {path}: {cause}")]
    Setup {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it did not work.
        cause: io::Error,
    },
    /// The streaming server's address cannot be had.
    #[error(
        "cannot listen on {address} for streaming: {cause}; set another streaming.address in the configuration"
    )]
    Streaming {
        /// The address.
        address: std::net::SocketAddr,
        /// Why it did not work.
        cause: io::Error,
    },
    /// See [`ConfigError`].
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// See [`StoreError`].
    #[error(transparent)]
    Store(#[from] StoreError),
    /// See [`ImageError`].
    #[error(transparent)]
    Images(#[from] ImageError),
    /// The pods of the last daemon cannot be taken up.
    #[error("cannot take up the pods of the last daemon: {0}")]
    Recover(#[from] CriError),
    /// The server failed.
    #[error("the server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// Another daemon runs, the configuration cannot be used, or the node's disk fails.
pub async fn serve(config: Config) -> Result<(), DaemonError> {
    start_log(&config)?;
    raise_descriptor_limit();
    for dir in [&config.root, &config.state] {
        private_dir(dir)?;
    }
    refuse_second(&config.socket).await?;
    // Opened before the socket is touched: the store refuses a second daemon on the same root.
    let store = Store::open(&config.root.join("state.redb"))?;
    let images = Images::open(&config.root, image_config(&config)?)?;
    let address = config.streaming.address;
    let idle = Duration::from_secs(config.streaming.idle_timeout_seconds.into());
    let streaming = caisson_streaming::Listener::bind(address, idle).await;
    let streaming = streaming.map_err(|cause| DaemonError::Streaming { address, cause })?;
    let context = Arc::new(Context {
        streaming: streaming.endpoint(),
        microvm: microvm_config(&config),
        host: host_config(&config),
        registry: Registry::new(store, config.microvm.pod_users()),
        images,
        network: Network::new(cni_config(&config), config.state.join("netns")),
        kvm: KvmProbe::new(config.clone()),
        ready: pods::ReadyPool::new(config.microvm.ready_clones),
        boots: tokio::sync::Semaphore::new(boots()),
        telemetry: telemetry(&config)?,
        config,
    });
    pods::recover(&context).await?;
    match &context.microvm.templates {
        Some(templates) => templates.prepare(&context.microvm).await,
        None => Templates::remove(&context.config.state),
    }
    pods::tend_networks(&context);
    let using = context.clone();
    let collected = context
        .images
        .gc(move || image_service::layers_in_use(&using));
    collected.await?;
    tokio::spawn(collect_images(context.clone()));
    let probing = context.clone();
    let keeping = tokio::spawn(async move {
        let probe = probing.kvm.get().await;
        tracing::info!(works = probe.works, "KVM: {}", probe.reason);
        if let Some(templates) = &probing.microvm.templates
            && probe.works
            && probing.config.uses(HandlerKind::MicroVm)
        {
            match pods::usual_shape(&probing.config.microvm) {
                Ok(shape) => {
                    let smallest = shape.smallest();
                    templates.make(shape, probing.microvm.clone());
                    templates.make(smallest, probing.microvm.clone());
                }
                Err(error) => {
                    tracing::warn!(%error, "there is no usual pod to make a template for")
                }
            }
            pods::keep_ready(&probing).await;
        }
    });

    tracing::info!(address = %context.streaming.address(), "streaming");
    tokio::spawn(streaming.serve(Arc::new(Backend::new(context.clone()))));
    let socket = context.config.socket.clone();
    let connections = UnixListenerStream::new(bind(&socket)?).then(|connection| async {
        if connection.is_err() {
            // Out of descriptors or memory: waiting is all that can help.
            tokio::time::sleep(ACCEPT_AGAIN).await;
        }
        connection
    });
    let stop = stop_signal()?;
    tracing::info!(socket = %socket.display(), version = env!("CARGO_PKG_VERSION"), "serving");
    let (stopping, mut stopped) = tokio::sync::watch::channel(false);
    let server = Server::builder()
        .layer(V1Alpha2Layer)
        .add_service(
            RuntimeServiceServer::new(runtime_service::Service::new(context.clone()))
                .max_decoding_message_size(MAX_REQUEST),
        )
        .add_service(
            ImageServiceServer::new(image_service::Service::new(context.clone()))
                .max_decoding_message_size(MAX_REQUEST),
        )
        .add_service(CliServer::new(cli_service::Service::new(context.clone())))
        .serve_with_incoming_shutdown(connections, async move {
            stop.await;
            tracing::info!("stopping; pods go on");
            stopping.send_replace(true);
        });
    // Streams can last for ever, a stop cannot.
    let limit = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
        tokio::time::sleep(STOP_LIMIT).await;
    };
    let result = tokio::select! {
        result = server => result,
        () = limit => Ok(()),
    };
    let _ = std::fs::remove_file(&socket);
    context.ready.close();
    if tokio::time::timeout(STOP_LIMIT, keeping).await.is_err() {
        tracing::warn!("machines that wait for pods are left; the next daemon removes them");
    }
    if context.telemetry.is_some() {
        let _ = tokio::task::spawn_blocking(move || {
            context.telemetry.as_ref().map(Telemetry::shut_down)
        })
        .await;
    }
    Ok(result?)
}

/// A pod takes a few descriptors for as long as it runs, and the usual limit is 1024.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays what it was");
    }
}

/// The lists of a kubelet come again and again. The memory of an answer is kept for the next one: given back to the kernel,
/// each page of it would be asked for anew, which took a third of the time of a ListContainers call. To be called before the first thread is started.
#[cfg(target_env = "gnu")]
pub fn keep_freed_memory() {
    for (what, bytes) in [
        (libc::M_TRIM_THRESHOLD, 8 << 20),
        (libc::M_MMAP_THRESHOLD, 4 << 20),
    ] {
        // SAFETY: it takes two numbers, and there is no second thread yet. What it could not set stays as it was.
        unsafe { libc::mallopt(what, bytes) };
    }
}

/// The other allocators are left as they are.
#[cfg(not(target_env = "gnu"))]
pub fn keep_freed_memory() {}

/// The daemon's log goes to standard error, where a service manager takes it.
fn start_log(config: &Config) -> Result<(), DaemonError> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log_level).map_err(|error| {
        ConfigError::Value {
            key: "log_level",
            cause: error.to_string(),
        }
    })?;
    // Another log that is already there, as in a test, is as good.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .try_init();
    Ok(())
}

/// How microVMs are made, by the configuration. A file that is missing fails the pod that needs it, with the places
/// that were looked at (see `RuntimeReady`).
fn microvm_config(config: &Config) -> MicroVmConfig {
    let microvm = &config.microvm;
    MicroVmConfig {
        pod: pod_config(config),
        kernel: or(config.kernel_path(), &microvm.kernel),
        initramfs: or(config.initramfs_path(), &microvm.initramfs),
        cmdline_extra: microvm.kernel_cmdline_extra.clone(),
        start_timeout: Duration::from_secs(u64::from(microvm.start_timeout_seconds)),
        disk_rate: RateLimit {
            bytes: microvm.disk_bytes_per_second,
            operations: microvm.disk_operations_per_second,
        },
        net_rate: RateLimit {
            bytes: microvm.net_bytes_per_second,
            operations: microvm.net_packets_per_second,
        },
        vhost_net: microvm.vhost_net,
        templates: microvm
            .templates
            .then(|| Arc::new(Templates::new(&pod_config(config), microvm.template_user()))),
    }
}

fn telemetry(config: &Config) -> Result<Option<Telemetry>, ConfigError> {
    let endpoint = &config.telemetry.endpoint;
    if endpoint.is_empty() {
        return Ok(None);
    }
    let telemetry = Telemetry::new(endpoint).map_err(|error| ConfigError::Value {
        key: "telemetry.endpoint",
        cause: error.to_string(),
    })?;
    Ok(Some(telemetry))
}

/// How pods on the host are made, by the configuration.
fn host_config(config: &Config) -> HostConfig {
    HostConfig {
        pod: pod_config(config),
        agent: if config.uses(HandlerKind::Host) {
            or(config.agent_path(), &config.host.agent)
        } else {
            config.host.agent.clone()
        },
        layers: config.root.join("images/layers"),
    }
}

fn pod_config(config: &Config) -> PodConfig {
    PodConfig {
        vmm: or(config.vmm_path(), &config.microvm.vmm),
        state_dir: config.state.clone(),
        data_dir: config.root.clone(),
        cgroup_parent: config.cgroup_parent.clone(),
    }
}

/// What was found, or else what is configured.
fn or(found: Result<PathBuf, ConfigError>, configured: &Path) -> PathBuf {
    found.unwrap_or_else(|error| {
        tracing::warn!("{error}");
        configured.to_owned()
    })
}

/// How many guests may boot at the same time. A boot keeps one CPU busy; more boots than CPUs only make each slower, and
/// some too slow.
// must-test: start latency that grows with the number of pods on the node
fn boots() -> usize {
    std::thread::available_parallelism().map_or(MIN_BOOTS, |cpus| cpus.get().max(MIN_BOOTS))
}

fn image_config(config: &Config) -> Result<ImageConfig, ImageError> {
    let images = &config.images;
    let policies = images
        .policy
        .iter()
        .map(|policy| Policy::load(&policy.registry, &policy.cosign_key))
        .collect::<Result<_, _>>()?;
    let pinned = images
        .pinned
        .iter()
        .map(|name| name.parse())
        .collect::<Result<_, _>>()?;
    Ok(ImageConfig {
        certs_dir: images.certs_dir.clone(),
        max_unpacked_bytes: u64::from(images.max_unpacked_gib) << 30,
        progress_timeout_seconds: images.progress_timeout_seconds.into(),
        parallel_layers: images.parallel_layers.into(),
        foreign_layers: images.foreign_layers,
        verity: images.verity,
        pinned,
        policies,
        ..ImageConfig::default()
    })
}

/// Removes layers that nobody needs any more, as they are when the last container of a removed image goes.
async fn collect_images(context: Arc<Context>) {
    loop {
        tokio::time::sleep(COLLECT_EVERY).await;
        let using = context.clone();
        match context
            .images
            .gc(move || image_service::layers_in_use(&using))
            .await
        {
            Ok(0) => {}
            Ok(freed) => tracing::info!(freed, "layers that nobody needs were removed"),
            Err(error) => tracing::warn!(%error, "layers could not be collected"),
        }
    }
}

/// Makes a directory that nobody but root can enter; one that is there becomes so.
fn private_dir(path: &Path) -> Result<(), DaemonError> {
    make_dir(path, PRIVATE)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(PRIVATE))
        .map_err(|cause| setup("close to others the directory", path, cause))
}

/// Makes a directory with this mode, unless it is there.
fn make_dir(path: &Path, mode: u32) -> Result<(), DaemonError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|cause| setup("make the directory", path, cause))
}

fn setup(what: &'static str, path: &Path, cause: io::Error) -> DaemonError {
    DaemonError::Setup {
        what,
        path: path.to_owned(),
        cause,
    }
}

/// A socket that somebody answers on belongs to a daemon.
async fn refuse_second(path: &Path) -> Result<(), DaemonError> {
    match tokio::net::UnixStream::connect(path).await {
        Ok(_) => Err(DaemonError::InUse(path.to_owned())),
        Err(_) => Ok(()),
    }
}

/// Listens on the socket, for root only from its first moment, in place of what a dead daemon left there.
fn bind(path: &Path) -> Result<UnixListener, DaemonError> {
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt as _;
        if !meta.file_type().is_socket() {
            let cause = io::Error::other("there is something there that is not a socket");
            return Err(setup("listen on", path, cause));
        }
    }
    if let Some(parent) = path.parent() {
        // It may be somebody else's, such as /run.
        make_dir(parent, PRIVATE)?;
    }
    let fresh = path.with_extension(format!("new.{}", std::process::id()));
    let _ = std::fs::remove_file(&fresh);
    let listen = || -> io::Result<UnixListener> {
        let listener = UnixListener::bind(&fresh)?;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&fresh, path)?;
        Ok(listener)
    };
    listen().map_err(|cause| setup("listen on", path, cause))
}

fn stop_signal() -> Result<impl Future<Output = ()>, DaemonError> {
    let handler = |kind| {
        signal(kind).map_err(|cause| setup("handle signals", Path::new("of the daemon"), cause))
    };
    let mut terminate = handler(SignalKind::terminate())?;
    let mut interrupt = handler(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap()); // a daemon that died
        refuse_second(&path).await.unwrap();
        let _listener = bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = refuse_second(&path).await.unwrap_err();
        assert!(error.to_string().contains("another daemon"), "{error}");
    }

    #[tokio::test]
    async fn a_file_in_the_sockets_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        assert!(bind(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
