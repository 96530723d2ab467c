//! What the end-to-end tests share: a throw-away node with the real daemon, and a client of it.
//!
//! The programs come from the directory that `CAISSON_BUILD` names (`scripts/build` makes it), the image from
//! `scripts/demo-image`. A machine on which KVM does not work is no place for these tests: [`Node::start`] says
//! "skipped" with the reason there; `scripts/test` runs them in the KVM lab instead.

pub mod alpha;
mod disk;
mod images;
mod leaks;
mod logs;
mod maker;
mod node;
mod pods;
mod random;
pub mod runtime;
pub mod streaming;
mod templates;
#[cfg(test)]
mod threat_model;
pub mod users;

use sha2::{Digest as _, Sha256};

pub use disk::Disk;
pub use images::{ImageNode, Pushed, Registry};
pub use leaks::Traces;
pub use logs::{Line, read_log};
pub use maker::ImageMaker;
pub use node::{BRIDGE, Node, NodeOptions, bridged, dial};
pub use pods::{Container, ContainerOptions, Pod, PodOptions, of_host, pod_process};
pub use random::{Random, number};

/// The name of the image that every node has.
pub const IMAGE: &str = "docker.io/library/busybox:test";

/// The SHA-256 digest of some bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
