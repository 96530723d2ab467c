//! The container engine: makes containers from OCI runtime specs (version 1.2) with the kernel's own means.
//!
//! It is synchronous and keeps no thread. [`Container::create`] stacks the root file system, makes the control
//! group, and starts the process that becomes the container's: the agent's own program anew, which must hand over
//! to [`init_main`] first thing when its first argument is [`INIT`].
//!
//! # Processes
//! The processes that [`Container::create`] and [`Container::exec`] return are children of the calling process, which
//! has to wait for them (`waitpid`). It also gets children that it never hears of here: a first stage for each of the
//! two, one for each point at which hooks run in the agent's namespaces, and one for each new user namespace.
//! They end by themselves and their status means nothing. The engine never waits for a process: it learns what it
//! needs over sockets.

mod cgroup;
mod channel;
mod container;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod init;
mod launch;
mod namespaces;
pub mod paths;
mod plan;
mod prepare;
mod rootfs;
mod seccomp;
pub mod spec;
mod sys;

use std::os::fd::OwnedFd;

pub use cgroup::{Detail, DeviceIo, HugePages, Pressure, PressureLine, Stats};
pub use container::Container;
pub use error::EngineError;
pub use init::init_main;
pub(crate) use init::sysctl::check as check_sysctl;
pub use launch::INIT;
pub use namespaces::make_pod_namespaces;
pub use rootfs::{Directory, DiskRange, ImageVolume, Layer, MemoryVolume, RootFs, mount_scratch};

/// The container's ends of its standard streams; what is missing is `/dev/null`. Not used by a process with a terminal.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Standard input.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: Option<OwnedFd>,
    /// Standard error.
    pub stderr: Option<OwnedFd>,
}
