//! Makes the guest the pod: everything `SetupSandbox` asks for, checked first and then done in order.

mod clock;
mod dns;
pub mod growth;
mod host;
pub mod namespaces;
mod netlink;
mod network;
pub mod pidns;
mod plan;
mod storage;
mod sysctl;

use std::io;
use std::net::{AddrParseError, IpAddr};
use std::path::Path;

use thiserror::Error;

pub use plan::Plan;

use crate::log::Timing;
use crate::paths;

/// Why the sandbox could not be set up.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The request itself is wrong; nothing has been done.
    #[error("{field}: {reason}")]
    Invalid {
        /// The request's field.
        field: &'static str,
        /// What is wrong with it, and what is expected.
        reason: String,
    },
    /// A step failed in the guest.
    #[error("{step}: {error}")]
    Step {
        /// What was to be done, on what.
        step: String,
        /// What the kernel said.
        error: io::Error,
    },
}

impl SandboxError {
    fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            reason: reason.into(),
        }
    }
}

/// Names the step that failed.
trait Context<T> {
    fn context(self, step: impl FnOnce() -> String) -> Result<T, SandboxError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, step: impl FnOnce() -> String) -> Result<T, SandboxError> {
        self.map_err(|error| SandboxError::Step {
            step: step(),
            error: error.into(),
        })
    }
}

/// Sets the sandbox up. Blocks; a failure leaves a guest that is of no use.
///
/// Entropy and clock come first: whatever runs later may use them.
///
/// # Errors
/// The first step that failed.
pub fn set_up(plan: &Plan) -> Result<(), SandboxError> {
    if let Some(own) = crate::host::own() {
        return host::set_up(plan, own);
    }
    let mut timing = Timing::start();
    clock::add_entropy(&plan.entropy)?;
    if let Some(time) = plan.unix_time_ns {
        clock::set(time)?;
    }
    // What follows has sizes that depend on it.
    if let Some(grown) = &plan.growth {
        growth::take(grown)?;
        timing.lap("growth");
    }
    if let Some(ids) = &plan.user_ids {
        namespaces::create(ids)?;
        namespaces::move_network(&plan.interfaces)?;
        timing.lap("user namespace");
    }
    in_pod(|| {
        sysctl::apply(&plan.sysctls)?;
        set_hostname(plan)
    })?;
    timing.lap("identity");
    create_dir(paths::SANDBOX)?;
    storage::mount_shared(&plan.shared_mounts)?;
    timing.lap("share");
    storage::mount_scratch(&plan.scratch)?;
    timing.lap("scratch");
    storage::mount_shm()?;
    timing.lap("shm");
    in_pod(|| network::configure(&plan.interfaces, &plan.routes))?;
    timing.lap("network");
    dns::write(plan, dns::HOSTS)?;
    share(plan)?;
    timing.lap("pid namespace");
    timing.tell("sandbox");
    Ok(())
}

/// Lets a sandbox that stood still go on; one whose machine was written down and `moved` gets the time, the entropy, the
/// network and the names of where it now is, before any container runs. Blocks.
///
/// # Errors
/// The first step that failed.
pub fn go_on(plan: &Plan, moved: bool) -> Result<(), SandboxError> {
    if moved {
        clock::add_entropy(&plan.entropy)?;
        if let Some(time) = plan.unix_time_ns {
            clock::set(time)?;
        }
        in_pod(|| {
            network::clear(&plan.interfaces)?;
            network::configure(&plan.interfaces, &plan.routes)
        })?;
        dns::write(plan, dns::HOSTS)?;
    }
    storage::mount_shared(&plan.shared_mounts)
}

/// Unmounts what the host shares. Blocks.
///
/// # Errors
/// It is in use.
pub fn unmount_shared() -> Result<(), SandboxError> {
    storage::unmount_shared()
}

/// Makes the rest of what the containers share, once its files are there.
fn share(plan: &Plan) -> Result<(), SandboxError> {
    if let Some(ids) = &plan.user_ids {
        namespaces::own_files(ids)?;
    }
    if plan.shared_pid_namespace {
        pidns::create(plan.user_ids.is_some())?;
    }
    Ok(())
}

fn in_pod(work: impl FnOnce() -> Result<(), SandboxError> + Send) -> Result<(), SandboxError> {
    namespaces::inside(work).context(|| "enter the pod's namespaces".into())?
}

fn set_hostname(plan: &Plan) -> Result<(), SandboxError> {
    if plan.hostname.is_empty() {
        return Ok(());
    }
    nix::unistd::sethostname(&plan.hostname).context(|| format!("set hostname {}", plan.hostname))
}

/// Undoes the mounts, when the agent ends outside of a guest that ends with it.
pub fn tear_down() {
    pidns::remove();
    storage::unmount_all();
}

fn create_dir(path: impl AsRef<Path>) -> Result<(), SandboxError> {
    let path = path.as_ref();
    std::fs::create_dir_all(path).context(|| format!("create directory {}", path.display()))
}

/// An address in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// The address, host part included.
    pub address: IpAddr,
    /// The length of the network's prefix in bits.
    pub prefix: u8,
}

impl Cidr {
    /// Parses `address/prefix`.
    ///
    /// # Errors
    /// A sentence that quotes what it cannot read.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not an address in CIDR notation, such as 10.0.0.2/24");
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_: AddrParseError| bad())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(bad());
        }
        match prefix.parse() {
            Ok(prefix) if prefix <= bits => Ok(Self { address, prefix }),
            _ => Err(bad()),
        }
    }
}
