//! The Caisson virtual machine monitor: one process per pod, on KVM and the rust-vmm crates.

pub mod arch;
pub mod boot;
pub mod config;
pub mod control;
pub mod jail;
pub mod logs;
pub mod probe;
pub mod process;
pub mod timeline;
pub mod transport;
pub mod virtio;
pub mod vm;
