//! One input of the fuzz target `logs`: what a container writes, in pieces, and what an agent answers.

use std::cell::Cell;
use std::time::{Duration, UNIX_EPOCH};

use super::format::{Formatter, MAX_TEXT, Tag};
use super::*;
use crate::fuzzing::input::Input;

/// What is behind a line's time and stream, per line.
fn lines(log: &[u8], tag: Tag) -> impl Iterator<Item = (bool, &[u8])> {
    let prefix = format!("1970-01-01T00:00:00.000000000Z {} ", tag.name()).into_bytes();
    log.split_inclusive(|byte| *byte == b'\n').map(move |line| {
        let line = line.strip_suffix(b"\n").expect("a line that ends");
        let line = line.strip_prefix(&*prefix).expect("a time and a stream");
        match line.split_at_checked(2) {
            Some((b"F ", text)) => (true, text),
            Some((b"P ", text)) => (false, text),
            _ => panic!("neither whole nor a part"),
        }
    })
}

/// Whatever the pieces, the log's lines must be the bytes that came.
fn format(input: &mut Input<'_>, tag: Tag) {
    let mut formatter = Formatter::new(tag);
    let (mut came, mut log) = (Vec::new(), Vec::new());
    while !input.is_empty() {
        let piece = match input.byte() {
            // Much of the same: the limit of a part is far longer than an input.
            0xff => vec![input.byte(); usize::from(input.word())],
            count => input.bytes(count.into()).to_vec(),
        };
        formatter.feed(&piece, UNIX_EPOCH, &mut log);
        came.extend(piece);
    }
    formatter.finish(UNIX_EPOCH, &mut log);
    let mut told = Vec::new();
    for (whole, text) in lines(&log, tag) {
        assert!(text.len() <= MAX_TEXT, "a part of {} bytes", text.len());
        told.extend_from_slice(text);
        if whole {
            told.push(b'\n');
        }
    }
    assert!(told == came, "the log has other bytes than came");
}

/// An agent that has said all that it says.
pub(crate) struct Said(pub Vec<u8>);

impl Dial for Said {
    fn dial(&self, _: u32, _: Duration) -> io::Result<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair()?;
        io::Write::write_all(&mut theirs, &self.0)?;
        theirs.shutdown(std::net::Shutdown::Write)?;
        // Nobody reads our line, but somebody could.
        HELD.set(Some(theirs));
        Ok(ours)
    }
}

thread_local!(static HELD: Cell<Option<UnixStream>> = const { Cell::new(None) });

fn answer(said: &[u8]) {
    match open_stream(&Said(said.to_vec()), "STREAM c - stdout", OPEN_TIME) {
        Ok(mut stream) => {
            let mut rest = Vec::new();
            io::Read::read_to_end(&mut stream, &mut rest).expect("what was said");
            assert_eq!([b"OK\n", &*rest].concat(), said);
        }
        Err(AgentStreamError::Refused { reason, .. }) => {
            assert!(!reason.chars().any(char::is_control), "{reason:?}");
        }
        Err(_) => {}
    }
}

/// The log's writer, and the reader of the agent's answers.
pub fn logs(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() & 3 {
        0 => answer(input.rest()),
        1 => format(&mut input, Tag::Stderr),
        _ => format(&mut input, Tag::Stdout),
    }
}
