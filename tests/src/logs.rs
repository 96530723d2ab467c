//! Reading a container's log as a kubelet does.

use std::fs;
use std::path::Path;

/// A line of the CRI log format.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Line {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the line goes on in the next entry.
    pub partial: bool,
    /// The bytes, without the newline.
    pub content: Vec<u8>,
}

/// All lines of a log. Panics on a line that is not in the format.
pub fn read_log(path: &Path) -> Vec<Line> {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|b| *b == b'\n').map(parse).collect()
}

fn parse(line: &[u8]) -> Line {
    let fields: Vec<_> = line.splitn(4, |b| *b == b' ').collect();
    let [time, stream, tag, content] = fields.as_slice() else {
        panic!("not a log line: {:?}", String::from_utf8_lossy(line));
    };
    assert!(time.len() >= 20 && time[10] == b'T', "a time: {time:?}");
    assert!(matches!(*tag, b"F" | b"P"), "a tag: {tag:?}");
    Line {
        stream: String::from_utf8_lossy(stream).into_owned(),
        partial: *tag == b"P",
        content: content.to_vec(),
    }
}
