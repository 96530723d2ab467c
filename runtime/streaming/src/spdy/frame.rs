//! Frames of SPDY/3.1 as they are on the wire (SPDY protocol, draft 3.1, sections 2.2 and 2.6).

use super::ProtocolError;
use super::headers::{Deflater, Headers, Inflater};

/// The bytes of every frame's head.
pub const HEAD: usize = 8;
/// The longest control frame that is taken, in bytes behind its head.
pub const MAX_CONTROL: usize = 64 << 10;
/// The highest stream ID.
pub const MAX_ID: u32 = 0x7fff_ffff;

/// This direction of the stream ends with this frame.
pub const FLAG_FIN: u8 = 1;
/// Of SYN_STREAM: the other side has nothing to send on it.
pub const FLAG_UNIDIRECTIONAL: u8 = 2;

const VERSION: u16 = 3;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Why a stream was reset (section 2.6.3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ResetStatus {
    /// The frame was wrong for the stream's state.
    ProtocolError = 1,
    /// The stream was not wanted and nothing was done with it.
    RefusedStream = 3,
    /// The stream is no longer needed.
    Cancel = 5,
}

/// What a frame's head says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Head {
    /// A control frame of that many bytes.
    Control {
        /// Its type.
        kind: u16,
        /// Its flags.
        flags: u8,
        /// The bytes that follow.
        length: usize,
    },
    /// That many bytes of a stream follow.
    Data {
        /// The stream.
        id: u32,
        /// Whether they are its last.
        fin: bool,
        /// The bytes that follow, up to 16 MiB.
        length: usize,
    },
}

impl Head {
    /// Takes the head apart.
    ///
    /// # Errors
    /// Another version of SPDY, a control frame that is too long, data of stream 0.
    pub fn parse(bytes: [u8; HEAD]) -> Result<Self, ProtocolError> {
        let [a, b, c, d, flags, x, y, z] = bytes;
        let length = u32::from_be_bytes([0, x, y, z]) as usize;
        if a & 0x80 == 0 {
            let id = u32::from_be_bytes([a, b, c, d]);
            if id == 0 {
                return Err(ProtocolError::StreamId(id));
            }
            let fin = flags & FLAG_FIN != 0;
            return Ok(Self::Data { id, fin, length });
        }
        let version = u16::from_be_bytes([a & 0x7f, b]);
        if version != VERSION {
            return Err(ProtocolError::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(ProtocolError::Length(length));
        }
        let kind = u16::from_be_bytes([c, d]);
        Ok(Self::Control {
            kind,
            flags,
            length,
        })
    }
}

/// A control frame.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Control {
    /// Opens a stream.
    SynStream {
        /// Its ID: odd from a client, even from a server.
        id: u32,
        /// The opener sends nothing on it.
        fin: bool,
        /// The other side sends nothing on it.
        unidirectional: bool,
        /// What it is for.
        headers: Headers,
    },
    /// Accepts a stream.
    SynReply {
        /// The stream.
        id: u32,
        /// The accepter sends nothing on it.
        fin: bool,
        /// More about it.
        headers: Headers,
    },
    /// Ends a stream in both directions, at once.
    Reset {
        /// The stream.
        id: u32,
        /// Why: see [`ResetStatus`].
        status: u32,
    },
    /// Parameters of the connection. None of them matters to this implementation.
    Settings,
    /// Asks for, or is, an echo.
    Ping(u32),
    /// No more streams are accepted.
    GoAway {
        /// The last stream that was accepted.
        last: u32,
        /// 0: an orderly end; 1: a protocol error.
        status: u32,
    },
    /// More headers of a stream.
    Headers {
        /// The stream.
        id: u32,
        /// They are the end of this direction.
        fin: bool,
        /// The headers.
        headers: Headers,
    },
    /// Flow control, which Kubernetes' peers neither send nor obey.
    WindowUpdate {
        /// The stream; 0 is the connection.
        id: u32,
        /// So many bytes more.
        delta: u32,
    },
    /// A type that this implementation does not know, and ignores as the protocol asks.
    Unknown(u16),
}

impl Control {
    /// Takes a control frame apart.
    ///
    /// # Errors
    /// A wrong length, a stream ID out of range, headers that cannot be inflated.
    pub fn parse(
        kind: u16,
        flags: u8,
        payload: &[u8],
        inflater: &mut Inflater,
    ) -> Result<Self, ProtocolError> {
        let wrong = || ProtocolError::Length(payload.len());
        let word = |at: usize| {
            let bytes = payload.get(at..at + 4).and_then(|b| b.first_chunk::<4>());
            bytes.map(|b| u32::from_be_bytes(*b)).ok_or_else(wrong)
        };
        let id = |at: usize| match word(at)? {
            0 => Err(ProtocolError::StreamId(0)),
            id if id > MAX_ID => Err(ProtocolError::StreamId(id)),
            id => Ok(id),
        };
        let exactly = |length: usize| match payload.len() {
            have if have == length => Ok(()),
            _ => Err(wrong()),
        };
        let fin = flags & FLAG_FIN != 0;
        Ok(match kind {
            SYN_STREAM => Self::SynStream {
                id: id(0)?,
                fin,
                unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                headers: inflater.block(payload.get(10..).ok_or_else(wrong)?)?,
            },
            SYN_REPLY => Self::SynReply {
                id: id(0)?,
                fin,
                headers: inflater.block(payload.get(4..).ok_or_else(wrong)?)?,
            },
            RST_STREAM => {
                exactly(8)?;
                let status = word(4)?;
                Self::Reset { id: id(0)?, status }
            }
            SETTINGS => {
                // Entries of 8 bytes; the whole frame is bounded by MAX_CONTROL.
                let entries = word(0)? as usize;
                exactly(entries.saturating_mul(8).saturating_add(4))?;
                Self::Settings
            }
            PING => {
                exactly(4)?;
                Self::Ping(word(0)?)
            }
            GOAWAY => {
                exactly(8)?;
                let last = word(0)? & MAX_ID;
                Self::GoAway {
                    last,
                    status: word(4)?,
                }
            }
            HEADERS => Self::Headers {
                id: id(0)?,
                fin,
                headers: inflater.block(payload.get(4..).ok_or_else(wrong)?)?,
            },
            WINDOW_UPDATE => {
                exactly(8)?;
                let id = word(0)? & MAX_ID;
                Self::WindowUpdate {
                    id,
                    delta: word(4)? & MAX_ID,
                }
            }
            other => Self::Unknown(other),
        })
    }

    /// The frame's bytes.
    ///
    /// # Errors
    /// The compression of headers fails.
    pub fn encode(&self, deflater: &mut Deflater) -> Result<Vec<u8>, ProtocolError> {
        let flag = |fin: bool| if fin { FLAG_FIN } else { 0 };
        let words = |words: &[u32]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_be_bytes()).collect()
        };
        let (kind, flags, payload) = match self {
            Self::SynStream {
                id,
                fin,
                unidirectional,
                headers,
            } => {
                let unidirectional = if *unidirectional {
                    FLAG_UNIDIRECTIONAL
                } else {
                    0
                };
                // Associated with no stream, of the highest priority.
                let mut payload = words(&[*id, 0]);
                payload.extend([0, 0]);
                payload.extend(deflater.block(headers)?);
                (SYN_STREAM, flag(*fin) | unidirectional, payload)
            }
            Self::SynReply { id, fin, headers } => {
                let mut payload = words(&[*id]);
                payload.extend(deflater.block(headers)?);
                (SYN_REPLY, flag(*fin), payload)
            }
            Self::Reset { id, status } => (RST_STREAM, 0, words(&[*id, *status])),
            Self::Settings => (SETTINGS, 0, words(&[0])),
            Self::Ping(id) => (PING, 0, words(&[*id])),
            Self::GoAway { last, status } => (GOAWAY, 0, words(&[*last, *status])),
            Self::Headers { id, fin, headers } => {
                let mut payload = words(&[*id]);
                payload.extend(deflater.block(headers)?);
                (HEADERS, flag(*fin), payload)
            }
            Self::WindowUpdate { id, delta } => (WINDOW_UPDATE, 0, words(&[*id, *delta])),
            Self::Unknown(kind) => (*kind, 0, Vec::new()),
        };
        if payload.len() > MAX_CONTROL {
            return Err(ProtocolError::Length(payload.len()));
        }
        let mut frame = (0x8000 | VERSION).to_be_bytes().to_vec();
        frame.extend(kind.to_be_bytes());
        frame.extend(flags_and_length(flags, payload.len()));
        frame.extend(payload);
        Ok(frame)
    }
}

/// The head of a data frame. `length` is below 16 MiB.
pub fn data_head(id: u32, fin: bool, length: usize) -> [u8; HEAD] {
    let [a, b, c, d] = (id & MAX_ID).to_be_bytes();
    let [flags, x, y, z] = flags_and_length(if fin { FLAG_FIN } else { 0 }, length);
    [a, b, c, d, flags, x, y, z]
}

fn flags_and_length(flags: u8, length: usize) -> [u8; 4] {
    // Lengths are bounded far below 24 bits by the callers.
    let [_, x, y, z] = (length as u32).to_be_bytes();
    [flags, x, y, z]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(frame: &[u8]) -> (Head, &[u8]) {
        let head = Head::parse(*frame.first_chunk().unwrap()).unwrap();
        (head, &frame[HEAD..])
    }

    #[test]
    fn every_control_frame_comes_back_as_it_was() {
        let headers = Headers::new([("streamtype", "data"), ("port", "80")]);
        let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::default());
        for control in [
            Control::SynStream {
                id: 1,
                fin: true,
                unidirectional: true,
                headers: headers.clone(),
            },
            Control::SynReply {
                id: MAX_ID,
                fin: false,
                headers: Headers::default(),
            },
            Control::Reset { id: 5, status: 3 },
            Control::Settings,
            Control::Ping(7),
            Control::GoAway { last: 9, status: 1 },
            Control::Headers {
                id: 3,
                fin: true,
                headers,
            },
            Control::WindowUpdate { id: 0, delta: 4 },
            Control::Unknown(77),
        ] {
            let frame = control.encode(&mut deflater).unwrap();
            let (
                Head::Control {
                    kind,
                    flags,
                    length,
                },
                payload,
            ) = split(&frame)
            else {
                panic!("{control:?}");
            };
            assert_eq!(length, payload.len());
            let parsed = Control::parse(kind, flags, payload, &mut inflater).unwrap();
            assert_eq!(parsed, control);
        }
        assert_eq!(
            Head::parse(data_head(3, true, 0xff_ffff)).unwrap(),
            Head::Data {
                id: 3,
                fin: true,
                length: 0xff_ffff
            }
        );
    }

    #[test]
    fn hostile_heads_are_refused() {
        for head in [
            [0, 0, 0, 0, 0, 0, 0, 1],                 // data of stream 0
            [0x80, 2, 0, 1, 0, 0, 0, 0],              // SPDY/2
            [0xff, 0xff, 0, 1, 0, 0, 0, 0],           // no SPDY
            [0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],     // a control frame of 16 MiB
            *b"GET / HT".first_chunk::<8>().unwrap(), // taken for data of an enormous stream ID, which nobody opened
        ] {
            match Head::parse(head) {
                Err(_) => {}
                Ok(Head::Data { id, .. }) => assert_eq!(id, 0x4745_5420),
                Ok(other) => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn hostile_payloads_are_refused() {
        let parse =
            |kind, payload: &[u8]| Control::parse(kind, 0, payload, &mut Inflater::default());
        for kind in 1..=9 {
            if kind == 5 {
                continue; // withdrawn from the protocol: unknown, and ignored
            }
            assert!(parse(kind, b"").is_err(), "{kind}");
            assert!(parse(kind, &[0xff; 3]).is_err(), "{kind}");
            assert!(parse(kind, &[0xff; 64]).is_err(), "{kind}");
        }
        assert!(parse(RST_STREAM, &[0; 8]).is_err(), "stream 0");
        assert!(parse(SYN_STREAM, &[0, 0, 0, 1, 0, 0, 0, 0, 0]).is_err());
        // The count of settings says more than there is.
        assert!(parse(SETTINGS, &[0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1]).is_err());
        assert!(parse(PING, &[0; 5]).is_err());
    }
}
