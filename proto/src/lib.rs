//! The generated gRPC types of Caisson.
//!
//! * [`cri`]: the Kubernetes Container Runtime Interface, package `runtime.v1`, as of Kubernetes 1.36.
//! * [`agent`]: what the daemon says to the agent in the guest, over vsock.
//! * [`cli`]: what the `caisson` command needs beyond CRI, on the daemon's same socket.
//! * [`CAPABILITIES`]: their names, in specs.
//! * [`Unexecutable`]: what a status tells of a program that cannot be executed.
//!
//! The meaning of each message is in the `.proto` files under `proto/proto`.

mod capabilities;
mod unexecutable;

pub use capabilities::CAPABILITIES;
pub use unexecutable::Unexecutable;

/// The version of the agent's protocol: the number of its incompatible changes. A daemon has nothing to do with an agent
/// of another one.
pub const AGENT_PROTOCOL: u32 = 2;

/// CRI `runtime.v1`: the interface that kubelet and crictl speak.
#[allow(missing_docs, clippy::all)]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// The agent's protocol, `caisson.agent.v1`.
#[allow(missing_docs, clippy::all)]
pub mod agent {
    tonic::include_proto!("caisson.agent.v1");
}

/// The CLI's own service, `caisson.cli.v1`.
#[allow(missing_docs, clippy::all)]
pub mod cli {
    tonic::include_proto!("caisson.cli.v1");
}
