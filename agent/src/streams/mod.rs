//! Standard streams and connections to ports, each on a raw connection of its own. The header of `agent.proto` is their protocol.

mod dial;
mod endpoint;
mod header;
mod pump;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;

pub use endpoint::{Endpoint, Kind};
use header::Header;

use crate::vsock::Listener;
use crate::{debug, warn};

/// Connections served at once; more wait.
const CONNECTIONS_MAX: usize = 2048;
/// How long a client may take to send its header line.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// What stream connections need of the agent.
pub trait Processes: Send + Sync + 'static {
    /// A process's stream, or a sentence that says why there is none.
    fn endpoint(
        &self,
        container: &str,
        exec: Option<&str>,
        kind: Kind,
    ) -> Result<Arc<Endpoint>, String>;

    /// Starts the orderly end of the guest.
    fn shutdown(&self);
}

/// Serves stream connections for ever.
pub async fn listen(listener: Listener, processes: Arc<dyn Processes>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok(client) => {
                let processes = processes.clone();
                tokio::spawn(async move {
                    serve(client, &*processes).await;
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of descriptors or memory: other connections must end first.
                warn!("accept of a stream connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves one stream connection, from its header line to its end.
pub async fn serve<S>(mut client: S, processes: &dyn Processes)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let header = match tokio::time::timeout(HEADER_TIMEOUT, header::read(&mut client)).await {
        Ok(Ok(header)) => header,
        Ok(Err(error)) => return refuse(&mut client, &error.to_string()).await,
        Err(_) => return refuse(&mut client, "no header line within 10 s").await,
    };
    let (container, exec, kind, keep) = match header.0 {
        Header::Dial(port) => return forward(client, port, &header.1).await,
        Header::Health => return echo(client, &header.1).await,
        Header::Shutdown => {
            if client.write_all(b"OK\n").await.is_ok() {
                let _ = client.shutdown().await;
            }
            processes.shutdown();
            return;
        }
        Header::Stream {
            container,
            exec,
            kind,
            keep,
        } => (container, exec, kind, keep),
    };
    let endpoint = match processes.endpoint(&container, exec.as_deref(), kind) {
        Ok(endpoint) => endpoint,
        Err(reason) => return refuse(&mut client, &reason).await,
    };
    let Some(mut turn) = endpoint.take_turn().await else {
        return refuse(&mut client, "the stream has a client already").await;
    };
    drop(endpoint);
    if matches!(kind, Kind::Stdin | Kind::Tty) {
        turn.in_flight.input.push(&header.1);
    }
    if client.write_all(b"OK\n").await.is_err() {
        return;
    }
    pump::serve(turn, client, keep).await;
    debug!(
        "stream {container} {} {} served",
        exec.as_deref().unwrap_or("-"),
        kind.name()
    );
}

/// Connects a client with a port inside the pod.
async fn forward<S>(mut client: S, port: u16, first: &[u8])
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let application = match dial::connect(port).await {
        Ok(application) => application,
        Err(reason) => return refuse(&mut client, &reason).await,
    };
    if client.write_all(b"OK\n").await.is_err() {
        return;
    }
    match dial::serve(client, application, first).await {
        Ok(()) => debug!("port {port} served"),
        Err(error) => debug!("port {port}: {error}"),
    }
}

/// Sends each byte back, for as long as the client sends some.
async fn echo<S>(mut client: S, first: &[u8])
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let answer = [b"OK\n", first].concat();
    let mut answered = client.write_all(&answer).await;
    let mut bytes = [0; 16];
    while answered.is_ok() {
        answered = match client.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(count) => client.write_all(&bytes[..count]).await,
        };
    }
}

async fn refuse(client: &mut (impl AsyncWrite + Unpin), reason: &str) {
    let line = format!("ERR {}\n", reason.replace('\n', " "));
    let write = async {
        client.write_all(line.as_bytes()).await?;
        client.shutdown().await
    };
    // A client that does not read its answer does not get one.
    let _ = tokio::time::timeout(Duration::from_secs(2), write).await;
}
