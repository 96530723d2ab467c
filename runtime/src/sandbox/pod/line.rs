//! A control connection for requests that carry no descriptors, which may be kept and given up at any moment.

use std::path::Path;

use caisson_vmm_protocol::{ChannelError, MAX_FRAME, Reply, Request};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::control::ControlError;

/// The connection. After an error, or a call that was given up, it is of no more use.
#[derive(Debug)]
pub struct Line(UnixStream);

impl From<UnixStream> for Line {
    fn from(stream: UnixStream) -> Self {
        Self(stream)
    }
}

impl Line {
    /// Connects to a pod process.
    ///
    /// # Errors
    /// Nobody listens.
    pub async fn connect(socket: &Path) -> Result<Self, ControlError> {
        Ok(UnixStream::connect(socket).await?.into())
    }

    /// Sends a request and takes its answer, however long that takes.
    ///
    /// # Errors
    /// [`ControlError::Refused`] with the pod process's own sentence; the connection's.
    pub async fn ask(&mut self, request: &Request) -> Result<Reply, ControlError> {
        let body = serde_json::to_vec(request).map_err(ChannelError::from)?;
        let length = u32::try_from(body.len()).map_err(|_| ChannelError::TooLong(body.len()))?;
        let mut frame = length.to_le_bytes().to_vec();
        frame.extend(body);
        self.0.write_all(&frame).await?;
        match self.next().await? {
            Reply::Error { message } => Err(ControlError::Refused(message)),
            reply => Ok(reply),
        }
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// The connection ended, or what came is no such message.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<T, ControlError> {
        let length = self.0.read_u32_le().await? as usize;
        if length > MAX_FRAME {
            return Err(ChannelError::TooLong(length).into());
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await?;
        Ok(serde_json::from_slice(&body).map_err(ChannelError::from)?)
    }
}
