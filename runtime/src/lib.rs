//! Caisson's daemon and command line.
//!
//! [`daemon`] serves CRI and the CLI's service on one unix socket. A request goes from [`cri`] (or [`cli_service`])
//! to a [`sandbox`], which holds a pod's containers; [`image`] and [`network`] give it what it needs, and [`store`]
//! remembers it.

pub mod cli;
pub mod cli_service;
pub mod config;
pub mod cri;
pub mod daemon;
pub mod doctor;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod image;
pub mod mounts;
pub mod network;
pub mod sandbox;
pub mod session;
pub mod snapshot;
pub mod steps;
pub mod store;
pub mod streaming;
pub mod telemetry;
pub mod timings;
mod usage;
