//! How the guest reaches virtio devices.

pub mod mmio;
mod registers;

pub use registers::Registers;
