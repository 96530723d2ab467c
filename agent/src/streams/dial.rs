//! Connections to ports inside the pod, for port-forward: the agent dials, with sockets of the pod's network namespace.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpSocket, TcpStream};

use super::endpoint::CHUNK;
use crate::sandbox::namespaces;

/// How long one address may take to answer. Both fit into the time that the other side waits.
const LIMIT: Duration = Duration::from_secs(4);

/// Connects to a port on the loopback device: IPv4 first, as applications that listen on one address usually do.
///
/// # Errors
/// A sentence with the reason of both.
pub async fn connect(port: u16) -> Result<TcpStream, String> {
    let mut refusals = Vec::new();
    for address in [
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    ] {
        let dialled = async { socket(address)?.connect(address).await };
        match tokio::time::timeout(LIMIT, dialled).await {
            Ok(Ok(stream)) => {
                // Small writes are a person who types, or a request.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => refusals.push(format!("{address}: {error}")),
            Err(_) => refusals.push(format!("{address}: no answer within {} s", LIMIT.as_secs())),
        }
    }
    Err(format!("cannot connect to {}", refusals.join("; ")))
}

/// A socket that belongs to the pod's network, whoever uses it.
fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    namespaces::inside(|| match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    })?
}

/// Moves bytes between a client and an application until both directions have ended. `first` came with the request.
///
/// # Errors
/// Either side broke off.
pub async fn serve<S>(mut client: S, mut application: TcpStream, first: &[u8]) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    application.write_all(first).await?;
    copy_bidirectional_with_sizes(&mut client, &mut application, CHUNK, CHUNK)
        .await
        .map(drop)
}
