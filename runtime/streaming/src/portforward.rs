//! Port-forward: over SPDY, plain or in a WebSocket tunnel, any number of connections to any port of the pod, each a
//! data and an error stream with the same request ID; over WebSocket channels, one connection to each of the ports
//! that were named, with a data and an error channel each.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;

use crate::spdy::{Connection, Role, Stream};
use crate::stream::{Input, Output};
use crate::websocket::Channels;
use crate::{Backend, BackendError};

/// What is served over SPDY.
pub const SPDY_PROTOCOLS: &[&str] = &["portforward.k8s.io"];
/// SPDY in a WebSocket.
pub const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Channels.
pub const CHANNELS: &str = "v4.channel.k8s.io";
/// What is served over WebSocket.
pub const WEBSOCKET_PROTOCOLS: &[&str] = &[TUNNEL, CHANNELS];

/// The most ports of one WebSocket: two channels each, with numbers below 255.
pub const MAX_PORTS: usize = 64;
/// How long a client may take to open the second stream of a pair.
const CREATION_TIME: Duration = Duration::from_secs(30);
/// The most streams that wait for their pair.
const MAX_HALVES: usize = 64;

/// Serves connections over SPDY until the client closes.
pub async fn serve_spdy<B: Backend, S>(transport: S, pod: String, backend: Arc<B>)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let mut connection = match Connection::new(transport, Role::Server) {
        Ok(connection) => connection,
        Err(error) => {
            tracing::warn!(%error, "a port-forward client cannot be served");
            return;
        }
    };
    let mut halves: HashMap<String, (Instant, Stream)> = HashMap::new();
    let mut forwards = JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = connection.accept() => stream,
            Some(_) = forwards.join_next() => continue,
            () = tokio::time::sleep(CREATION_TIME), if !halves.is_empty() => {
                late(&mut halves).await;
                continue;
            }
        };
        let Some(stream) = stream else { break };
        let Some((port, is_data)) = check(&stream) else {
            continue; // dropped, it is reset
        };
        let id = request_id(&stream, is_data);
        let Some((_, other)) = halves.remove(&id) else {
            late(&mut halves).await;
            if halves.len() < MAX_HALVES {
                halves.insert(id, (Instant::now(), stream));
            }
            continue;
        };
        let (data, error) = match (is_data, is_of_kind(&other, "error")) {
            (true, true) => (stream, other),
            (false, false) => (other, stream),
            // A second one of the same kind: the pair is spoilt, and both are reset.
            _ => continue,
        };
        let (pod, backend) = (pod.clone(), backend.clone());
        forwards.spawn(async move {
            let mut input = data.input;
            forward(&*backend, &pod, port, &mut input, data.output, error.output).await;
        });
    }
    drop(halves);
    let mut closed = connection.closed();
    // The client opens no more; what is under way goes on until it has gone.
    tokio::select! {
        () = async { while forwards.join_next().await.is_some() {} } => {}
        () = closed.wait() => {}
    }
    drop(forwards);
    connection.close().await;
}

fn is_of_kind(stream: &Stream, kind: &str) -> bool {
    stream.headers.get("streamtype") == kind
}

/// The port of a stream, and whether it is a data stream; `None` where its headers make no sense.
fn check(stream: &Stream) -> Option<(u16, bool)> {
    let port = stream
        .headers
        .get("port")
        .parse()
        .ok()
        .filter(|port| *port > 0);
    let is_data = is_of_kind(stream, "data");
    match port {
        Some(port) if is_data || is_of_kind(stream, "error") => Some((port, is_data)),
        _ => {
            tracing::debug!(
                "a port-forward stream with headers that make no sense: {:?}",
                stream.headers
            );
            None
        }
    }
}

/// Which pair a stream belongs to. Old clients give no ID; they open the error stream and then the data stream.
fn request_id(stream: &Stream, is_data: bool) -> String {
    match stream.headers.get("requestid") {
        "" if is_data => format!("stream {}", stream.id.saturating_sub(2)),
        "" => format!("stream {}", stream.id),
        id => id.chars().take(64).collect(),
    }
}

/// Drops what has waited too long for its pair, and says so where there is a stream for it.
async fn late(halves: &mut HashMap<String, (Instant, Stream)>) {
    let late: Vec<String> = halves
        .iter()
        .filter(|(_, (since, _))| since.elapsed() >= CREATION_TIME)
        .map(|(id, _)| id.clone())
        .collect();
    for id in late {
        if let Some((_, stream)) = halves.remove(&id)
            && is_of_kind(&stream, "error")
        {
            let text =
                format!("error forwarding: request {id} timed out waiting for its data stream");
            let _ = stream.output.write(Bytes::from(text)).await;
            stream.output.finish().await;
        }
    }
}

/// Serves one connection to a port of each that was named.
pub async fn serve_channels<B: Backend, S>(
    socket: WebSocketStream<S>,
    pod: String,
    ports: Vec<u16>,
    backend: Arc<B>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // At most MAX_PORTS.
    let data_channels: Vec<u8> = (0..ports.len().min(MAX_PORTS))
        .map(|n| n as u8 * 2)
        .collect();
    let mut channels = Channels::new(socket, &data_channels, false);
    let mut forwards = JoinSet::new();
    for (number, port) in data_channels.into_iter().zip(ports) {
        let (data, error) = (channels.output(number), channels.output(number + 1));
        let Some(mut input) = channels.input(number) else {
            continue;
        };
        let (pod, backend) = (pod.clone(), backend.clone());
        forwards.spawn(async move {
            // Each channel begins with its port.
            let begin = Bytes::copy_from_slice(&port.to_le_bytes());
            if data.write(begin.clone()).await.is_ok() && error.write(begin).await.is_ok() {
                forward(&*backend, &pod, port, &mut input, data, error).await;
            }
        });
    }
    let mut closed = channels.closed();
    tokio::select! {
        () = async { while forwards.join_next().await.is_some() {} } => {}
        () = closed.wait() => {}
    }
    drop(forwards);
    channels.close().await;
}

/// Forwards one connection, and tells on the error stream why it failed.
async fn forward<B: Backend>(
    backend: &B,
    pod: &str,
    port: u16,
    input: &mut Input,
    data: Output,
    error: Output,
) {
    match backend.port_forward(pod, port, input, &data).await {
        Ok(()) => data.finish().await,
        Err(BackendError(cause)) => {
            let text = format!("error forwarding port {port} to pod {pod}: {cause}");
            tracing::debug!("{text}");
            let _ = error.write(Bytes::from(text)).await;
        }
    }
    error.finish().await;
}
