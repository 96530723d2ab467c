//! How the agent and a process that it prepares talk: messages over a socket pair that exec closes.
//!
//! The process sends its number when it exists, then waits for [`Message::Continue`]; it sends
//! [`Message::Ready`] when everything is set up, then waits for [`Message::Start`]; and the end of the
//! stream after that means that its program runs. At any point it can send [`Message::Failed`] instead and end.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use caisson_proto::Unexecutable;
use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};

/// Longest message in bytes; a longer failure is cut.
const MAX_MESSAGE: usize = 8192;

/// What is said.
#[derive(Debug)]
pub(crate) enum Message {
    /// To the agent: the process exists; with a descriptor of it.
    Created {
        /// Its number in the agent's PID namespace.
        pid: i32,
        /// A pidfd.
        pidfd: OwnedFd,
    },
    /// To the process: go on.
    Continue,
    /// To the agent: all is prepared; with the terminal's other end, if it has one.
    Ready(Option<OwnedFd>),
    /// To the process: execute.
    Start,
    /// To the agent: what failed.
    Failed {
        /// A sentence.
        reason: String,
        /// It was the program that cannot be executed.
        unexecutable: Option<Unexecutable>,
    },
}

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// Two connected ends, both closed by exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self(one), Self(other)))
    }

    /// Takes over an inherited end.
    pub fn from_descriptor(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut descriptor = None;
        match message {
            Message::Created { pid, pidfd } => {
                bytes.push(b'P');
                bytes.extend(pid.to_le_bytes());
                descriptor = Some(pidfd.as_raw_fd());
            }
            Message::Continue => bytes.push(b'C'),
            Message::Ready(terminal) => {
                bytes.push(b'R');
                descriptor = terminal.as_ref().map(AsRawFd::as_raw_fd);
            }
            Message::Start => bytes.push(b'S'),
            Message::Failed {
                reason,
                unexecutable,
            } => {
                bytes.push(b'E');
                let word = unexecutable.map_or("", Unexecutable::as_str);
                bytes.extend(word.bytes().chain([0]));
                bytes.extend(reason.bytes().take(MAX_MESSAGE - bytes.len()));
            }
        }
        let descriptors: Vec<_> = descriptor.into_iter().collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            if descriptors.is_empty() { &[] } else { &rights },
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }

    /// Receives a message; none at the end of the stream.
    ///
    /// # Errors
    /// `TimedOut` when nothing came until `deadline`; `InvalidData` for what is not a message.
    pub fn receive(&self, deadline: Option<Instant>) -> io::Result<Option<Message>> {
        self.wait(deadline)?;
        let mut bytes = [0u8; MAX_MESSAGE];
        let mut control = cmsg_space!([std::os::fd::RawFd; 1]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let (length, descriptor) = loop {
            match recvmsg::<()>(
                self.0.as_raw_fd(),
                &mut slices,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Ok(received) => {
                    let mut descriptor = None;
                    for message in received.cmsgs()? {
                        if let ControlMessageOwned::ScmRights(numbers) = message {
                            for number in numbers {
                                // SAFETY: the kernel has just installed this descriptor for us.
                                descriptor = Some(unsafe { OwnedFd::from_raw_fd(number) });
                            }
                        }
                    }
                    break (received.bytes, descriptor);
                }
                Err(nix::errno::Errno::EINTR) => {}
                // The other end was closed with something unread.
                Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        };
        let unknown = || io::Error::new(io::ErrorKind::InvalidData, "a malformed message");
        let Some((kind, rest)) = bytes[..length].split_first() else {
            return Ok(None);
        };
        Ok(Some(match kind {
            b'P' => Message::Created {
                pid: i32::from_le_bytes(rest.try_into().map_err(|_| unknown())?),
                pidfd: descriptor.ok_or_else(unknown)?,
            },
            b'C' => Message::Continue,
            b'R' => Message::Ready(descriptor),
            b'S' => Message::Start,
            b'E' => {
                let mut parts = rest.splitn(2, |byte| *byte == 0);
                let word = parts.next().ok_or_else(unknown)?;
                let reason = parts.next().ok_or_else(unknown)?;
                Message::Failed {
                    reason: String::from_utf8_lossy(reason).into_owned(),
                    unexecutable: Unexecutable::from_word(word),
                }
            }
            _ => return Err(unknown()),
        }))
    }

    fn wait(&self, deadline: Option<Instant>) -> io::Result<()> {
        let Some(deadline) = deadline else {
            return Ok(());
        };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let step = PollTimeout::try_from(left.min(Duration::from_secs(60)))
                .unwrap_or(PollTimeout::ZERO);
            let mut set = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut set, step) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_the_end_is_seen() {
        let (agent, process) = Channel::pair().unwrap();
        let soon = || Some(Instant::now() + Duration::from_secs(5));
        for unexecutable in [None, Some(Unexecutable::Missing)] {
            process
                .send(&Message::Failed {
                    reason: "mount /data: no such device".into(),
                    unexecutable,
                })
                .unwrap();
        }
        process
            .send(&Message::Ready(Some(
                std::fs::File::open("/dev/null").unwrap().into(),
            )))
            .unwrap();
        drop(process);
        for expected in [None, Some(Unexecutable::Missing)] {
            let Some(Message::Failed {
                reason,
                unexecutable,
            }) = agent.receive(soon()).unwrap()
            else {
                panic!("not a failure");
            };
            assert_eq!(reason, "mount /data: no such device");
            assert_eq!(unexecutable, expected);
        }
        assert!(matches!(
            agent.receive(soon()).unwrap(),
            Some(Message::Ready(Some(_)))
        ));
        assert!(agent.receive(soon()).unwrap().is_none());
    }

    #[test]
    fn a_silent_process_does_not_hold_the_agent() {
        let (agent, _process) = Channel::pair().unwrap();
        let error = agent
            .receive(Some(Instant::now() + Duration::from_millis(20)))
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
