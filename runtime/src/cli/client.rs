//! The connection to the daemon, and what can go wrong with it.

use std::io;
use std::path::{Path, PathBuf};

use caisson_proto::Unexecutable;
use caisson_proto::cli::cli_client::CliClient;
use caisson_proto::cri;
use caisson_proto::cri::image_service_client::ImageServiceClient;
use caisson_proto::cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// The label of pods that `caisson run` made: removing the container removes the pod.
pub const OWN_POD: &str = "caisson.dev/run";

/// Why a command failed; each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Nobody answers at the socket.
    #[error("no daemon answers at {}: {cause}; start it with `caisson serve`", path.display())]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// Why the connection failed.
        cause: String,
    },
    /// The daemon refused or failed.
    #[error("{0}")]
    Daemon(String),
    /// A program cannot be executed.
    #[error("{message}")]
    Unexecutable {
        /// What the daemon said.
        message: String,
        /// Why.
        why: Unexecutable,
    },
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// An argument makes no sense.
    #[error("{0}")]
    Usage(String),
    /// A file or stream of this machine failed.
    #[error("{what}: {cause}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// What the system said.
        cause: io::Error,
    },
    /// Everything was said already; the exit status.
    #[error("exit status {0}")]
    Quiet(u8),
}

impl CliError {
    /// Any other error, by its sentence.
    pub fn other(error: impl std::fmt::Display) -> Self {
        Self::Daemon(error.to_string())
    }
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> Self {
        // A transport's message is layered; the innermost cause says what happened.
        let mut source: Option<&dyn std::error::Error> = std::error::Error::source(&status);
        while let Some(error) = source {
            if let Some(missing) = error.downcast_ref::<Unreachable>() {
                return Self::NoDaemon {
                    path: missing.0.clone(),
                    cause: missing.1.clone(),
                };
            }
            source = error.source();
        }
        if let Some(why) = Unexecutable::of(&status) {
            let message = status.message().to_owned();
            return Self::Unexecutable { message, why };
        }
        match status.code() {
            Code::Unavailable | Code::Unknown if status.message().is_empty() => {
                Self::Daemon("the daemon closed the connection".into())
            }
            _ => Self::Daemon(status.message().to_owned()),
        }
    }
}

/// Nobody listens at this socket.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", .0.display(), .1)]
struct Unreachable(PathBuf, String);

/// Clients of the daemon's services.
#[derive(Clone)]
pub struct Client {
    /// CRI's pods and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// CRI's images.
    pub images: ImageServiceClient<Channel>,
    /// What CRI has not.
    pub cli: CliClient<Channel>,
}

impl Client {
    /// Clients of the daemon at this socket, which is dialled with the first request.
    pub fn new(socket: &Path) -> Self {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
            let path = path.clone();
            async move {
                UnixStream::connect(&path)
                    .await
                    .map(TokioIo::new)
                    .map_err(|e| Unreachable(path, e.to_string()))
            }
        });
        let channel =
            Endpoint::from_static("http://caisson").connect_with_connector_lazy(connector);
        let most = 64 << 20;
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(most),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(most),
            cli: CliClient::new(channel),
        }
    }

    /// The container that a person means by a name, an ID, or the beginning of an ID.
    pub async fn find(&self, meant: &str) -> Result<cri::Container, CliError> {
        let request = cri::ListContainersRequest { filter: None };
        let answer = self.runtime.clone().list_containers(request).await?;
        let all = answer.into_inner().containers;
        let name = |c: &cri::Container| c.metadata.as_ref().map(|m| m.name.clone());
        let found = choose(all, meant, "containers", |c| (c.id.clone(), name(c)))?;
        found.ok_or_else(|| {
            CliError::Usage(format!(
                "there is no container {meant:?}; `caisson ps -a` lists all"
            ))
        })
    }

    /// The ID of the pod that a person means by a name, an ID, or the beginning of an ID; `None`: there is none.
    pub async fn find_pod(&self, meant: &str) -> Result<Option<String>, CliError> {
        let request = cri::ListPodSandboxRequest { filter: None };
        let answer = self.runtime.clone().list_pod_sandbox(request).await?;
        let all = answer.into_inner().items;
        let name = |p: &cri::PodSandbox| p.metadata.as_ref().map(|m| m.name.clone());
        let found = choose(all, meant, "pods", |p| (p.id.clone(), name(p)))?;
        Ok(found.map(|pod| pod.id))
    }

    /// The ID of the pod that a person means as of [`Client::find_pod`], or of the pod of a container as of [`Client::find`].
    pub async fn pod_of(&self, meant: &str) -> Result<String, CliError> {
        match self.find_pod(meant).await? {
            Some(pod) => Ok(pod),
            None => Ok(self.find(meant).await?.pod_sandbox_id),
        }
    }
}

/// The one that is meant; `known` tells the ID and the name of each.
fn choose<T>(
    all: Vec<T>,
    meant: &str,
    what: &str,
    known: impl Fn(&T) -> (String, Option<String>),
) -> Result<Option<T>, CliError> {
    let (mut found, rest): (Vec<T>, Vec<T>) = all.into_iter().partition(|one| {
        let (id, name) = known(one);
        id == meant || name.as_deref() == Some(meant)
    });
    if found.is_empty() && !meant.is_empty() {
        let begins = |one: &T| known(one).0.starts_with(meant);
        found = rest.into_iter().filter(begins).collect();
    }
    match found.as_slice() {
        [] | [_] => Ok(found.pop()),
        [first, ..] => Err(CliError::Usage(format!(
            "{meant:?} can be any of {} {what}; give more of the ID, such as {}",
            found.len(),
            short(&known(first).0)
        ))),
    }
}

/// Whether `caisson run` made this container and its pod.
pub fn is_own(container: &cri::Container) -> bool {
    container.labels.contains_key(OWN_POD)
}

/// As much of an ID as people read.
pub fn short(id: &str) -> &str {
    let id = id.strip_prefix("sha256:").unwrap_or(id);
    id.get(..12).unwrap_or(id)
}
