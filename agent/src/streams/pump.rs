//! Moves bytes between a stream's end and its client, in one task a connection: a slow client slows its own
//! stream only, because nothing is read from a pipe before the client has taken what was read before.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};

use super::endpoint::{CHUNK, Endpoint, Kind, Pending, Turn, is_terminal};

/// Why a direction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The process's side is closed and everything has been delivered.
    Process,
    /// The client has closed its sending side.
    HalfClose,
    /// The stream is held: everything that was read has been delivered.
    Held,
    /// The connection is broken, or another client has taken over.
    Lost,
}

/// Serves one client until its stream or its connection ends. `keep` leaves a standard input open behind it.
pub async fn serve<S: AsyncRead + AsyncWrite>(mut turn: Turn, client: S, keep: bool) {
    let (mut reader, mut writer) = tokio::io::split(client);
    let endpoint = turn.endpoint.clone();
    let Some(fd) = endpoint.fd() else {
        // Ended before: nothing but the end is left to tell.
        finish(&mut reader, &mut writer).await;
        return;
    };
    let in_flight = &mut *turn.in_flight;
    let end = tokio::select! {
        () = endpoint.wanted() => End::Lost,
        end = async {
            match endpoint.kind() {
                Kind::Stdin => input(&fd, &mut in_flight.input, &mut reader).await,
                Kind::Stdout | Kind::Stderr => {
                    output_and_watch(&endpoint, &fd, &mut in_flight.output, &mut reader, &mut writer).await
                }
                Kind::Tty => {
                    tokio::select! {
                        end = output(&endpoint, &fd, &mut in_flight.output, &mut writer) => end,
                        end = terminal_input(&endpoint, &fd, &mut in_flight.input, &mut reader) => end,
                    }
                }
            }
        } => end,
    };
    in_flight.output.shrink();
    in_flight.input.shrink();
    drop(fd);
    match end {
        // A half-close reaches here for standard input only. For a pipe it is the process's end of file; a
        // terminal's input, and one that is kept, stay open for the next one who types.
        End::HalfClose if keep || endpoint.is_terminal() => {
            drop(turn);
            let _ = writer.shutdown().await;
        }
        End::Process | End::HalfClose => {
            endpoint.close();
            drop(turn);
            finish(&mut reader, &mut writer).await;
        }
        End::Held => {
            drop(turn);
            finish(&mut reader, &mut writer).await;
        }
        End::Lost => {}
    }
}

/// Tells the client that there is no more, and waits until it has hung up: closing earlier could throw away
/// what a slow client has not read yet.
async fn finish(reader: &mut (impl AsyncRead + Unpin), writer: &mut (impl AsyncWrite + Unpin)) {
    if writer.shutdown().await.is_ok() {
        discard(reader).await;
    }
}

/// Reads and drops bytes until the client closes its sending side or is gone.
async fn discard(reader: &mut (impl AsyncRead + Unpin)) -> End {
    let mut buffer = [0; 64];
    loop {
        match reader.read(&mut buffer).await {
            Ok(0) => return End::HalfClose,
            Ok(_) => {}
            Err(_) => return End::Lost,
        }
    }
}

/// From the process to the client.
async fn output(
    endpoint: &Endpoint,
    fd: &AsyncFd<OwnedFd>,
    pending: &mut Pending,
    writer: &mut (impl AsyncWrite + Unpin),
) -> End {
    let mut buffer = Vec::new();
    loop {
        while !pending.rest().is_empty() {
            match writer.write(pending.rest()).await {
                Ok(0) | Err(_) => return End::Lost,
                Ok(count) => pending.delivered(count),
            }
        }
        let read = fd.async_io(Interest::READABLE, |fd| {
            // Allocated only when there is something to read: an idle stream holds no buffer.
            buffer.resize(CHUNK, 0);
            let result = nix::unistd::read(fd, &mut buffer);
            if result == Err(nix::errno::Errno::EAGAIN) {
                buffer = Vec::new();
            }
            Ok(result?)
        });
        let read = tokio::select! {
            biased;
            () = endpoint.held() => return End::Held,
            read = read => read,
        };
        match read {
            // A terminal's master reads EIO when the last slave is closed.
            Ok(0) | Err(_) => return End::Process,
            Ok(count) => pending.push(&buffer[..count]),
        }
    }
}

/// Output, while watching for the client's departure: a client sends nothing on an output stream.
async fn output_and_watch(
    endpoint: &Endpoint,
    fd: &AsyncFd<OwnedFd>,
    pending: &mut Pending,
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
) -> End {
    let watch = async {
        match discard(reader).await {
            End::Lost => End::Lost,
            _ => {
                endpoint.abandon();
                std::future::pending().await
            }
        }
    };
    tokio::select! {
        end = output(endpoint, fd, pending, writer) => end,
        end = watch => end,
    }
}

/// From the client to the process.
async fn input(
    fd: &AsyncFd<OwnedFd>,
    pending: &mut Pending,
    reader: &mut (impl AsyncRead + Unpin),
) -> End {
    let mut buffer = Vec::new();
    loop {
        while !pending.rest().is_empty() {
            match write_some(fd, pending.rest()).await {
                // The process has closed its standard input.
                Err(_) => return End::Process,
                Ok(count) => pending.delivered(count),
            }
        }
        buffer.clear();
        buffer.shrink_to(CHUNK);
        tokio::select! {
            biased;
            read = read_chunk(reader, &mut buffer) => match read {
                Ok(0) => return End::HalfClose,
                Ok(_) => pending.push(&buffer),
                Err(_) => return End::Lost,
            },
            // A pipe whose reader has gone says so while nothing is written, too.
            _ = fd.ready(Interest::ERROR), if !is_terminal(fd) => return End::Process,
        }
    }
}

/// A terminal's input: its half-close ends nothing, since a terminal has no half.
async fn terminal_input(
    endpoint: &Endpoint,
    fd: &AsyncFd<OwnedFd>,
    pending: &mut Pending,
    reader: &mut (impl AsyncRead + Unpin),
) -> End {
    match input(fd, pending, reader).await {
        End::Lost => End::Lost,
        End::HalfClose => {
            endpoint.abandon();
            std::future::pending().await
        }
        // The output direction finds the end, after the last bytes.
        End::Process | End::Held => std::future::pending().await,
    }
}

async fn read_chunk(
    reader: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> io::Result<usize> {
    if buffer.capacity() == 0 {
        buffer.reserve_exact(CHUNK);
    }
    reader.read_buf(buffer).await
}

async fn write_some(fd: &AsyncFd<OwnedFd>, bytes: &[u8]) -> io::Result<usize> {
    fd.async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, bytes)?))
        .await
}
