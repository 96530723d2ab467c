//! What the fuzz targets of this crate do with one input (see `tests/fuzz`). The tests of the crate do it with the
//! targets' seeds, so that whatever a fuzzer has found is tried with every run of them.
//!
//! A device's handler runs here on the caller's thread: [`guest::Guest`] is its driver, its memory and its event loop.
//! The same input always does the same.

pub(crate) mod guest;
pub(crate) mod input;
#[cfg(test)]
mod tests;

pub use crate::control::fuzzing::control;
pub use crate::logs::fuzzing::logs;
pub use crate::virtio::balloon::fuzzing::balloon;
pub use crate::virtio::blk::fuzzing::blk;
pub use crate::virtio::fs::fuzzing::{fs, fuse};
pub use crate::virtio::mem::fuzzing::mem;
pub use crate::virtio::net::fuzzing::net;
pub use crate::virtio::rng::fuzzing::rng;
pub use crate::virtio::vsock::fuzzing::{vsock, vsock_packets};
pub use crate::vm::fuzzing::bus;
