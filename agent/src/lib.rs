//! The agent of a Caisson pod: PID 1 of the guest, and the engine that makes its containers.
//!
//! [`boot`] brings the guest up, [`host`] is its counterpart for a pod that runs on the host, [`service`] answers the daemon over [`vsock`], [`streams`] carries standard
//! streams, [`sandbox`] makes the guest the pod, [`engine`] makes containers, and [`reaper`] learns how
//! processes end. All of it is one thread of async code, and threads for what blocks.

pub mod boot;
pub mod disks;
pub mod engine;
pub mod host;
pub mod log;
mod loopback;
pub mod paths;
pub mod reaper;
pub mod sandbox;
pub mod service;
pub mod streams;
pub mod vsock;
