//! The agent of a Caisson pod: PID 1 of the guest, and the engine that makes its containers.

pub mod engine;
