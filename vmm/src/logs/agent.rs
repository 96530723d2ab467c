//! Raw streams of the agent: one header line, one answer line, then bytes (see `agent.proto`).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use caisson_vmm_protocol::STREAM_PORT;

use crate::virtio::vsock::VsockConnector;

/// The longest answer line.
const MAX_ANSWER: usize = 512;

/// Opens a connection to a port of the guest.
pub trait Dial: Send + Sync {
    /// # Errors
    /// Why there is no connection; `TimedOut` when there is none within `timeout`.
    fn dial(&self, port: u32, timeout: Duration) -> io::Result<UnixStream>;
}

impl Dial for VsockConnector {
    fn dial(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        self.connect(port, timeout)
    }
}

/// Why the agent gave no stream.
#[derive(Debug, thiserror::Error)]
pub enum AgentStreamError {
    /// No connection, or it broke before the answer.
    #[error("the agent could not be asked for \"{line}\": {source}")]
    Io {
        /// What it was asked.
        line: String,
        /// What failed.
        source: io::Error,
    },
    /// The agent said no.
    #[error("the agent refused \"{line}\": {reason}")]
    Refused {
        /// What it was asked.
        line: String,
        /// Its reason, printable and bounded.
        reason: String,
    },
    /// The agent said something that is no answer.
    #[error("the agent did not answer \"{line}\" as its protocol says; it may be broken into")]
    Protocol {
        /// What it was asked.
        line: String,
    },
}

/// Connects to the agent's stream port, says `line` and reads the answer. The stream that comes back blocks and
/// has no time-outs; nothing of it has been read.
///
/// # Errors
/// [`AgentStreamError`], within `timeout`.
pub fn open_stream(
    dial: &dyn Dial,
    line: &str,
    timeout: Duration,
) -> Result<UnixStream, AgentStreamError> {
    let failed = |source| AgentStreamError::Io {
        line: line.to_owned(),
        source,
    };
    let deadline = Instant::now() + timeout;
    let mut stream = dial.dial(STREAM_PORT, timeout).map_err(failed)?;
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    stream
        .write_all(format!("{line}\n").as_bytes())
        .map_err(failed)?;
    let answer = read_line(&mut stream, deadline).map_err(failed)?;
    stream.set_write_timeout(None).map_err(failed)?;
    stream.set_read_timeout(None).map_err(failed)?;
    let line = line.to_owned();
    match answer.as_deref() {
        Some(b"OK") => Ok(stream),
        Some(answer) => match answer.strip_prefix(b"ERR ") {
            Some(reason) => Err(AgentStreamError::Refused {
                line,
                reason: printable(reason),
            }),
            None => Err(AgentStreamError::Protocol { line }),
        },
        None => Err(AgentStreamError::Protocol { line }),
    }
}

/// Reads a line byte by byte: what follows it belongs to the stream. `None` when it is too long.
fn read_line(stream: &mut UnixStream, deadline: Instant) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    while line.len() < MAX_ANSWER {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) if byte == [b'\n'] => return Ok(Some(line)),
            Ok(_) => line.push(byte[0]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
