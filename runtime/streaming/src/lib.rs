//! Kubernetes streaming: exec, attach and port-forward over SPDY/3.1 and over WebSocket.
//!
//! The daemon issues a URL for a request ([`Endpoint::issue`]); a client dials it, and [`Listener::serve`] connects the
//! client's streams to what a [`Backend`] does. [`client`] is the other side, over SPDY.
//!
//! What a client sends is untrusted: every length, count and time is bounded, and memory is bounded per connection
//! (see [`stream`]).

pub mod client;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod idle;
mod portforward;
mod remotecommand;
mod server;
pub mod spdy;
pub mod status;
pub mod stream;
#[cfg(test)]
mod tests;
mod tokens;
mod upgrade;
pub mod websocket;

pub use remotecommand::{Resizes, Streams, TerminalSize};
pub use server::{Endpoint, Listener};
pub use stream::{Chunk, Closed, Gone, Input, Output};
pub use tokens::{Request, TooMany, Wants};

/// Why a backend could not do what was asked: one sentence, which the client gets.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

/// What is behind the URLs.
pub trait Backend: Send + Sync + 'static {
    /// Runs a command in a container until it ends, and returns its exit status.
    fn exec(
        &self,
        container: &str,
        command: Vec<String>,
        tty: bool,
        streams: &mut Streams,
    ) -> impl Future<Output = Result<i32, BackendError>> + Send;

    /// Connects a client with a container's own process, until the process ends or the client has no more to say.
    fn attach(
        &self,
        container: &str,
        streams: &mut Streams,
    ) -> impl Future<Output = Result<(), BackendError>> + Send;

    /// Connects a client with a port of a pod until both directions have ended. The error is told where the
    /// connection was not made, or broke.
    fn port_forward(
        &self,
        pod: &str,
        port: u16,
        input: &mut Input,
        output: &Output,
    ) -> impl Future<Output = Result<(), BackendError>> + Send;
}
