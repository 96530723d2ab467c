//! The Caisson virtual machine monitor: one process per pod, on KVM and the rust-vmm crates. For a pod that runs on
//! the host the same process writes the logs and has no machine ([`host`]).

pub mod arch;
pub mod boot;
pub mod config;
pub mod control;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod host;
pub mod jail;
pub mod logs;
pub mod pod;
pub mod probe;
pub mod process;
pub mod template;
pub mod threads;
pub mod timeline;
pub mod transport;
pub mod virtio;
pub mod vm;
