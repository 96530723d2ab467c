//! Pod sandboxes: run, stop, remove, show, and find again.

mod dns;
mod health;
mod ready;
mod reboot;
mod recover;
mod remove;
mod resize;
mod restore;
mod run;
mod sandbox;
mod scratch;
mod size;
mod snapshot;
mod stop;
mod tend;
mod view;
mod watch;

use caisson_proto::cri;

pub use ready::{ReadyPool, keep_ready};
pub use recover::recover;
pub use remove::remove;
pub use resize::resize;
pub use restore::restore;
pub use run::{hostname, run};
pub use size::usual_shape;
pub use snapshot::snapshot;
pub use stop::stop;
pub use tend::tend_networks;
pub use view::{item, status, verbose};

use super::CriError;
use crate::network::{PodIdentity, PortMapping};
use crate::store::{SandboxRecord, SandboxState};

/// A pod's annotation that says which network it gets: "cni" (as without it), or "none" for a loopback device only.
pub const NETWORK_ANNOTATION: &str = "caisson.dev/network";

/// The namespaces that the pod asks for.
pub fn namespaces(config: &cri::PodSandboxConfig) -> cri::NamespaceOption {
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    security.namespace_options.unwrap_or_default()
}

/// Whether the pod's network is the node's.
pub fn on_host_network(config: &cri::PodSandboxConfig) -> bool {
    namespaces(config).network() == cri::NamespaceMode::Node
}

/// Whether the pod wants a network of its own beside its loopback device.
///
/// # Errors
/// INVALID_ARGUMENT for a value of [`NETWORK_ANNOTATION`] that is not known.
fn wants_network(config: &cri::PodSandboxConfig) -> Result<bool, CriError> {
    match config
        .annotations
        .get(NETWORK_ANNOTATION)
        .map(String::as_str)
    {
        None | Some("cni") => Ok(!on_host_network(config)),
        Some("none") => Ok(false),
        Some(other) => Err(CriError::invalid(format!(
            "the annotation {NETWORK_ANNOTATION} is {other} and must be cni or none"
        ))),
    }
}

/// The state as the interface knows it. A pod that is being made or stopped or that does not answer cannot be used, so
/// it is not ready.
pub fn cri_state(record: &SandboxRecord) -> cri::PodSandboxState {
    match (record.state, &record.silence) {
        (SandboxState::Ready, None) => cri::PodSandboxState::SandboxReady,
        _ => cri::PodSandboxState::SandboxNotready,
    }
}

/// Whether the pod has a PID namespace that its containers may share.
pub fn shares_pid(config: &cri::PodSandboxConfig) -> bool {
    config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.as_ref())
        .is_none_or(|options| options.pid() == cri::NamespaceMode::Pod)
}

/// What the network knows of a pod.
fn identity(record: &SandboxRecord) -> PodIdentity {
    let config = &record.config.0;
    let metadata = config.metadata.clone().unwrap_or_default();
    PodIdentity {
        id: record.id.clone(),
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        // Ports were checked when the pod was run; a host port of 0 maps nothing.
        port_mappings: config
            .port_mappings
            .iter()
            .filter_map(|mapping| {
                Some(PortMapping {
                    host_port: u16::try_from(mapping.host_port).ok().filter(|p| *p > 0)?,
                    container_port: u16::try_from(mapping.container_port).ok()?,
                    protocol: match mapping.protocol() {
                        cri::Protocol::Tcp => "tcp",
                        cri::Protocol::Udp => "udp",
                        cri::Protocol::Sctp => "sctp",
                    }
                    .to_owned(),
                    host_ip: mapping.host_ip.clone(),
                })
            })
            .collect(),
    }
}
