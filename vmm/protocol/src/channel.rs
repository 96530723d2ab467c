//! Frames with descriptors over a unix stream socket.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Serialize, de::DeserializeOwned};

use crate::FdIndex;

/// The longest frame, in bytes of JSON.
pub const MAX_FRAME: usize = 1 << 20;
/// The most descriptors beside one frame (the kernel's own limit is 253).
pub const MAX_FDS: usize = 64;

/// What can go wrong on a control connection.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed or timed out.
    #[error("the control socket failed: {0}")]
    Io(#[from] io::Error),
    /// The other side closed the connection.
    #[error("the other side closed the control connection")]
    Closed,
    /// A frame is longer than [`MAX_FRAME`].
    #[error("a control frame has {0} bytes, more than {MAX_FRAME}")]
    TooLong(usize),
    /// More than [`MAX_FDS`] descriptors were to be sent or came.
    #[error("a control frame has more than {MAX_FDS} descriptors")]
    TooManyFds,
    /// A frame is not the JSON of the message that was expected.
    #[error("a control message cannot be understood: {0}")]
    Json(#[from] serde_json::Error),
    /// A message names a descriptor that did not come with it.
    #[error("a control message names descriptor {0}, which did not come with it")]
    MissingFd(u16),
}

/// A received message and the descriptors that came beside it.
#[derive(Debug)]
pub struct Frame<T> {
    /// The message.
    pub message: T,
    fds: Vec<Option<OwnedFd>>,
}

impl<T> Frame<T> {
    /// Takes a descriptor that the message names. Each can be taken once.
    ///
    /// # Errors
    /// [`ChannelError::MissingFd`] if it did not come or was taken already.
    pub fn take_fd(&mut self, index: FdIndex) -> Result<OwnedFd, ChannelError> {
        self.fds
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or(ChannelError::MissingFd(index.0))
    }

    /// The message and the remaining descriptors, apart.
    pub fn into_parts(self) -> (T, Vec<Option<OwnedFd>>) {
        (self.message, self.fds)
    }
}

/// One side of a control connection. Blocking; time-outs are the socket's own.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// A channel over a connected socket.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// The socket, to set time-outs or to poll.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a message and lends the descriptors to the other side, in order.
    ///
    /// # Errors
    /// [`ChannelError::TooLong`], [`ChannelError::TooManyFds`], or what the socket says.
    pub fn send<T: Serialize>(&mut self, message: &T, fds: &[RawFd]) -> Result<(), ChannelError> {
        if fds.len() > MAX_FDS {
            return Err(ChannelError::TooManyFds);
        }
        let body = serde_json::to_vec(message)?;
        if body.len() > MAX_FRAME {
            return Err(ChannelError::TooLong(body.len()));
        }
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        let rights = [ControlMessage::ScmRights(fds)];
        let control: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
        let sent = loop {
            match sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(&frame)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => break other.map_err(io::Error::from)?,
            }
        };
        self.stream.write_all(&frame[sent..])?;
        Ok(())
    }

    /// Receives the next message with its descriptors, which are close-on-exec.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] at the end of the stream; otherwise what was wrong with the frame.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<Frame<T>, ChannelError> {
        let mut length = [0u8; 4];
        let fds = self.recv_first(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_FRAME {
            return Err(ChannelError::TooLong(length));
        }
        let mut body = vec![0; length];
        self.stream
            .read_exact(&mut body)
            .map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => ChannelError::Closed,
                _ => e.into(),
            })?;
        Ok(Frame {
            message: serde_json::from_slice(&body)?,
            fds: fds.into_iter().map(Some).collect(),
        })
    }

    /// Reads the four bytes of the length and takes the descriptors that come with the first of them.
    fn recv_first(&mut self, length: &mut [u8; 4]) -> Result<Vec<OwnedFd>, ChannelError> {
        let mut fds = Vec::new();
        let mut have = 0;
        while have < length.len() {
            let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
            let mut iov = [IoSliceMut::new(&mut length[have..])];
            let received = match recvmsg::<()>(
                self.stream.as_raw_fd(),
                &mut iov,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other.map_err(io::Error::from)?,
            };
            let truncated = received.flags.contains(MsgFlags::MSG_CTRUNC);
            for message in received.cmsgs().map_err(io::Error::from)? {
                if let ControlMessageOwned::ScmRights(raw) = message {
                    // SAFETY: the kernel has just installed these descriptors for us; nobody else owns them.
                    fds.extend(raw.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
                }
            }
            if truncated || fds.len() > MAX_FDS {
                return Err(ChannelError::TooManyFds);
            }
            if received.bytes == 0 {
                return Err(ChannelError::Closed);
            }
            have += received.bytes;
        }
        Ok(fds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Reply, Request};
    use std::fs::File;

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::new(a), Channel::new(b))
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (mut a, mut b) = pair();
        let mut file = tempfile();
        file.write_all(b"hello").unwrap();
        let request = Request::ReopenLog {
            container_id: "c1".into(),
            file: FdIndex(0),
        };
        a.send(&request, &[file.as_raw_fd()]).unwrap();
        let mut frame = b.recv::<Request>().unwrap();
        let Request::ReopenLog { file, .. } = frame.message.clone() else {
            panic!("another message");
        };
        let got = File::from(frame.take_fd(file).unwrap());
        assert_eq!(got.metadata().unwrap().len(), 5);
        assert!(matches!(
            frame.take_fd(file),
            Err(ChannelError::MissingFd(0))
        ));
    }

    #[test]
    fn a_long_frame_is_refused_before_it_is_read() {
        let (mut a, mut b) = pair();
        a.stream.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(
            b.recv::<Reply>(),
            Err(ChannelError::TooLong(n)) if n == u32::MAX as usize
        ));
    }

    #[test]
    fn an_unknown_field_and_a_closed_connection_are_errors() {
        let (mut a, mut b) = pair();
        a.send(&serde_json::json!({"status": {"version": 1, "x": 2}}), &[])
            .unwrap();
        assert!(matches!(b.recv::<Request>(), Err(ChannelError::Json(_))));
        drop(a);
        assert!(matches!(b.recv::<Request>(), Err(ChannelError::Closed)));
    }

    fn tempfile() -> File {
        nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::empty())
            .unwrap()
            .into()
    }
}
