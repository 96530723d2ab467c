//! The line that opens a stream connection.

use std::io;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::endpoint::Kind;
use crate::service::validate;

/// The longest header line, line feed included.
pub const MAX_LINE: usize = 512;

/// What a connection asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header {
    /// A standard stream of a process.
    Stream {
        /// The container.
        container: String,
        /// The exec, or the container's own process.
        exec: Option<String>,
        /// Which stream.
        kind: Kind,
        /// Of standard input: the end of the client's side leaves it open for the next client.
        keep: bool,
    },
    /// A connection to a port inside the pod, 1 to 65535.
    Dial(u16),
    /// Each byte back, as a sign of life.
    Health,
    /// An orderly end of the guest.
    Shutdown,
}

/// Why a header was refused. The text goes to the client.
#[derive(Debug, Error)]
pub enum HeaderError {
    /// The connection ended or broke.
    #[error("the connection ended before its header line")]
    Io(#[from] io::Error),
    /// No line feed in [`MAX_LINE`] bytes.
    #[error("the header line is longer than {MAX_LINE} bytes")]
    TooLong,
    /// Not a request.
    #[error(
        "the header line is not \"STREAM <container> <exec or -> <stdin|stdin keep|stdout|stderr|tty>\", \"DIAL <port>\", \"HEALTH\" or \"SHUTDOWN\""
    )]
    Malformed,
    /// An id that cannot exist.
    #[error("{0}")]
    Id(#[from] validate::InvalidId),
}

impl Header {
    /// Parses the line without its line feed.
    ///
    /// # Errors
    /// [`HeaderError::Malformed`] and [`HeaderError::Id`].
    pub fn parse(line: &[u8]) -> Result<Self, HeaderError> {
        let line = std::str::from_utf8(line).map_err(|_| HeaderError::Malformed)?;
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["HEALTH"] => Ok(Self::Health),
            ["SHUTDOWN"] => Ok(Self::Shutdown),
            ["DIAL", port] if !port.starts_with('+') => match port.parse() {
                Ok(port @ 1..) => Ok(Self::Dial(port)),
                _ => Err(HeaderError::Malformed),
            },
            ["STREAM", container, exec, kind] | ["STREAM", container, exec, kind, "keep"] => {
                let keep = words.len() == 5;
                if keep && kind != "stdin" {
                    return Err(HeaderError::Malformed);
                }
                validate::container_id(container)?;
                let exec = match exec {
                    "-" => None,
                    exec => {
                        validate::exec_id(exec)?;
                        Some(exec.to_owned())
                    }
                };
                Ok(Self::Stream {
                    container: container.to_owned(),
                    exec,
                    kind: Kind::parse(kind).ok_or(HeaderError::Malformed)?,
                    keep,
                })
            }
            _ => Err(HeaderError::Malformed),
        }
    }
}

/// Reads the header line, and what came behind it in the same read: the stream's first bytes.
///
/// # Errors
/// Each [`HeaderError`].
pub async fn read(client: &mut (impl AsyncRead + Unpin)) -> Result<(Header, Vec<u8>), HeaderError> {
    let mut bytes = Vec::with_capacity(MAX_LINE);
    loop {
        if let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let rest = bytes.split_off(end + 1);
            return Ok((Header::parse(&bytes[..end])?, rest));
        }
        if bytes.len() >= MAX_LINE {
            return Err(HeaderError::TooLong);
        }
        let room = (MAX_LINE - bytes.len()) as u64;
        if (&mut *client).take(room).read_buf(&mut bytes).await? == 0 {
            return Err(HeaderError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        assert_eq!(Header::parse(b"HEALTH").unwrap(), Header::Health);
        assert_eq!(Header::parse(b"SHUTDOWN").unwrap(), Header::Shutdown);
        assert_eq!(
            Header::parse(b"STREAM web-1 - stdout").unwrap(),
            Header::Stream {
                container: "web-1".into(),
                exec: None,
                kind: Kind::Stdout,
                keep: false
            }
        );
        assert_eq!(
            Header::parse(b"STREAM web e.1 tty").unwrap(),
            Header::Stream {
                container: "web".into(),
                exec: Some("e.1".into()),
                kind: Kind::Tty,
                keep: false
            }
        );
        assert!(matches!(
            Header::parse(b"STREAM web - stdin keep").unwrap(),
            Header::Stream { keep: true, .. }
        ));
        assert_eq!(Header::parse(b"DIAL 65535").unwrap(), Header::Dial(65_535));
    }

    #[test]
    fn refusals() {
        for line in [
            &b""[..],
            b"SHUTDOWN ",
            b"HEALTH c",
            b"STREAM a - out",
            b"STREAM a - stdout extra",
            b"STREAM a - stdout keep",
            b"STREAM a - stdin keep keep",
            b"DIAL",
            b"DIAL 0",
            b"DIAL 65536",
            b"DIAL +80",
            b"DIAL 80 x",
            b"DIAL localhost",
            b"STREAM  - stdout",
            b"STREAM ../a - stdout",
            b"STREAM a \xff stdout",
            b"GET / HTTP/1.1\r",
        ] {
            assert!(Header::parse(line).is_err(), "{line:?}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn bytes_behind_the_line_belong_to_the_stream() {
        let mut input = &b"STREAM a - stdin\nhello"[..];
        let (header, rest) = read(&mut input).await.unwrap();
        assert!(matches!(
            header,
            Header::Stream {
                kind: Kind::Stdin,
                ..
            }
        ));
        // The reader may leave bytes unread, but never lose any.
        assert_eq!([&rest[..], input].concat(), b"hello");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_endless_line_is_refused() {
        let long = vec![b'a'; 10 * MAX_LINE];
        let mut input = &long[..];
        assert!(matches!(read(&mut input).await, Err(HeaderError::TooLong)));
        assert_eq!(input.len(), 9 * MAX_LINE);
    }
}
