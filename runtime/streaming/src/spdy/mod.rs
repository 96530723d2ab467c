//! SPDY/3.1 (protocol draft 3.1), as far as Kubernetes uses it: streams with headers, data both ways, half-close, reset.
//!
//! Kubernetes' peers (moby/spdystream) neither send WINDOW_UPDATE nor wait for it. Neither does this implementation: an
//! obeyed window that is never opened again would stop a stream for ever. TCP and bounded queues hold senders back.

mod connection;
mod dictionary;
pub mod frame;
pub mod headers;
mod table;
mod tasks;

pub use connection::{Connection, Role, Stream};
pub use headers::Headers;
pub(crate) use table::Sender;

/// Why a connection cannot go on: the peer does not speak the protocol, or the transport broke.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// Another version.
    #[error("the peer speaks version {0} of SPDY, not 3")]
    Version(u16),
    /// A frame of a length that cannot be.
    #[error("a control frame of {0} bytes")]
    Length(usize),
    /// A stream ID that cannot be.
    #[error("stream ID {0} is out of range or out of order")]
    StreamId(u32),
    /// A header block that is malformed.
    #[error("the headers of a stream are malformed: {0}")]
    Headers(&'static str),
    /// The transport.
    #[error("the connection broke: {0}")]
    Io(#[from] std::io::Error),
}

/// A stream could not be opened.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OpenError {
    /// The peer refused it.
    #[error("the peer refused the stream")]
    Refused,
    /// The connection is closed.
    #[error("the connection is closed")]
    Closed,
}
