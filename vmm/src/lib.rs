//! The Caisson virtual machine monitor: one process per pod, on KVM and the rust-vmm crates.

pub mod virtio;
