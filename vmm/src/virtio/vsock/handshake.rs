//! The line with which a client of the listener says where it wants to: `CONNECT <port>\n`.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::sys::socket::{MsgFlags, recv};

/// The longest line, its end included: `CONNECT 4294967295\n` and some room for spaces.
const MAX_LINE: usize = 32;

/// A client that has not sent its line yet.
pub(super) struct Handshake {
    pub stream: UnixStream,
    /// When we give the client up.
    pub deadline: Instant,
}

/// How far a client has come.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Progress {
    /// The line is not complete.
    More,
    /// The client wants to this port.
    Port(u32),
    /// The client is gone or sent something else.
    Bad,
}

impl Handshake {
    /// Reads the line if it is there, and not a byte more: what follows belongs to the stream.
    pub fn progress(&self) -> Progress {
        let mut line = [0; MAX_LINE];
        let fd = self.stream.as_raw_fd();
        let seen = match recv(fd, &mut line, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(n) => n,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Progress::More,
            Err(_) => return Progress::Bad,
        };
        let Some(end) = line[..seen].iter().position(|b| *b == b'\n') else {
            let hopeless = seen == 0 || seen == MAX_LINE;
            return if hopeless {
                Progress::Bad
            } else {
                Progress::More
            };
        };
        match recv(fd, &mut line[..=end], MsgFlags::MSG_DONTWAIT) {
            Ok(n) if n == end + 1 => parse(&line[..end]).map_or(Progress::Bad, Progress::Port),
            _ => Progress::Bad,
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    // `parse` alone would take a leading plus.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Tells the client that the guest has accepted.
///
/// # Errors
/// What the system says: the client is gone. Its receive buffer is empty, so the line always fits.
pub(super) fn accept(stream: &UnixStream, host_port: u32) -> io::Result<()> {
    let line = format!("OK {host_port}\n");
    let sent = nix::sys::socket::send(
        stream.as_raw_fd(),
        line.as_bytes(),
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
    )?;
    if sent == line.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn handshake() -> (UnixStream, Handshake) {
        let (client, stream) = UnixStream::pair().unwrap();
        let deadline = Instant::now();
        (client, Handshake { stream, deadline })
    }

    #[test]
    fn the_line_is_taken_and_nothing_behind_it() {
        let (mut client, handshake) = handshake();
        assert_eq!(handshake.progress(), Progress::More);
        client.write_all(b"CONN").unwrap();
        assert_eq!(handshake.progress(), Progress::More);
        client.write_all(b"ECT 1024\nand data\n").unwrap();
        assert_eq!(handshake.progress(), Progress::Port(1024));
        let mut rest = [0; 9];
        (&handshake.stream).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"and data\n");
    }

    #[test]
    fn what_is_no_such_line_is_bad() {
        let bad: [&[u8]; 9] = [
            b"\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT +1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"connect 1\n",
            b"CONNECT \xff\n",
            &[b'1'; 40],
        ];
        for line in bad {
            let (mut client, handshake) = handshake();
            client.write_all(line).unwrap();
            assert_eq!(handshake.progress(), Progress::Bad, "{line:?}");
        }
        let (client, handshake) = handshake();
        drop(client);
        assert_eq!(handshake.progress(), Progress::Bad);
    }
}
