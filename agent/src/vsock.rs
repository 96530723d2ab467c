//! The agent's sockets towards the host: vsock in a guest, unix sockets elsewhere.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tonic::transport::server::Connected;

/// gRPC is served on this vsock port.
pub const GRPC_PORT: u32 = 1024;
/// Raw streams are served on this vsock port.
pub const STREAM_PORT: u32 = 1025;
/// The agent connects to this port of the host once, when it serves: whatever the answer, that is "ready".
pub const READY_PORT: u32 = 1026;
/// Likewise, when nothing of the guest's start is under way any more.
pub const SETTLED_PORT: u32 = 1027;

/// Where connections come from.
pub enum Listener {
    /// A guest's vsock port.
    Vsock(VsockListener),
    /// A unix socket, for the agent outside of a guest.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on a vsock port.
    pub fn vsock(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self::Vsock)
    }

    /// Serves on a unix socket that listens already.
    pub fn unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        UnixListener::from_std(listener).map(Self::Unix)
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Vsock(listener) => {
                let accepted = std::future::poll_fn(|context| listener.poll_accept(context)).await;
                accepted.map(|(stream, _)| Connection::Vsock(stream))
            }
            Self::Unix(listener) => listener
                .accept()
                .await
                .map(|(stream, _)| Connection::Unix(stream)),
        }
    }
}

/// Listens on a unix socket; an old socket file there is replaced.
pub fn bind_unix(path: &str) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// One accepted connection.
pub enum Connection {
    /// Over vsock.
    Vsock(VsockStream),
    /// Over a unix socket.
    Unix(UnixStream),
}

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_write(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, buffer),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Tells the host that this point is reached. The connection itself is the message; it is normally refused.
pub async fn knock(port: u32) {
    let connect = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port));
    let _ = tokio::time::timeout(Duration::from_secs(2), connect).await;
}
