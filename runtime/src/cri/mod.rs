//! The Kubernetes Container Runtime Interface, version 1 (and v1alpha2 by the [`alpha`] layer).
//!
//! [`runtime_service`] and [`image_service`] take the requests apart; what they mean is in [`pods`] and [`containers`],
//! which work on the [`registry`] and through the `Sandbox` trait, so that nothing here knows what kind of sandbox a
//! pod has. No lock is held while a guest is asked for something.

pub mod alpha;
mod conditions;
pub mod containers;
mod error;
mod events;
mod filters;
mod guest;
pub mod image_service;
mod listing;
mod metrics;
pub mod pods;
pub mod registry;
pub mod runtime_service;
pub mod spec;
mod users;

use std::sync::Arc;

pub use error::CriError;

use crate::config::Config;
use crate::doctor::KvmProbe;
use crate::image::Images;
use crate::network::Network;
use crate::sandbox::host::HostConfig;
use crate::sandbox::microvm::MicroVmConfig;
use crate::telemetry::Telemetry;
use registry::Registry;

/// What every call works with.
pub struct Context {
    /// The configuration.
    pub config: Config,
    /// How microVMs are made.
    pub microvm: MicroVmConfig,
    /// How pods on the host are made.
    pub host: HostConfig,
    /// Pods and containers.
    pub registry: Registry,
    /// Images.
    pub images: Images,
    /// Pod networks.
    pub network: Network,
    /// Whether KVM works here.
    pub kvm: KvmProbe,
    /// What issues streaming URLs.
    pub streaming: caisson_streaming::Endpoint,
    /// Machines that wait for their pods.
    pub ready: pods::ReadyPool,
    /// The right to boot a guest.
    pub boots: tokio::sync::Semaphore,
    /// Where the steps of pods' starts are told, if a collector is configured.
    pub telemetry: Option<Telemetry>,
}

/// The name of this runtime in the interface.
pub const RUNTIME_NAME: &str = "caisson";

/// A new ID: 64 hexadecimal digits.
pub fn new_id() -> String {
    hex(&rand::random::<[u8; 32]>())
}

/// A new ID for an exec: 16 hexadecimal digits.
pub fn new_exec_id() -> String {
    hex(&rand::random::<[u8; 8]>())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Runs work to its end even when the client that asked for it goes away, so that nothing stays half done.
///
/// # Errors
/// The work's own; INTERNAL if it panicked.
pub async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, CriError>> + Send + 'static,
) -> Result<T, CriError> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(CriError::internal(format!("the call broke off: {error}"))))
}

/// A shared [`Context`].
pub type Shared = Arc<Context>;
