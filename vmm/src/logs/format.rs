//! Lines of a log in the CRI format: `<RFC 3339 time> <stdout|stderr> <P|F> <text>\n`.
//!
//! `F` is a whole line or the last part of one, `P` a part after which more of the same line follows. As in
//! containerd, a part has at most 16 KiB of text, and what has no newline when the output ends is a `P`.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// The most bytes of text in a line of the log.
pub const MAX_TEXT: usize = 16 * 1024;

/// What a line belongs to. A terminal's output counts as standard output.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tag {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Tag {
    /// The tag as the log has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Cuts a stream into lines of the log.
pub struct Formatter {
    tag: Tag,
    /// The beginning of a line whose end has not come; at most [`MAX_TEXT`].
    begun: Vec<u8>,
}

impl Formatter {
    /// A formatter for a stream's first byte.
    pub fn new(tag: Tag) -> Self {
        Self {
            tag,
            begun: Vec::new(),
        }
    }

    /// Appends to `out` the lines that these bytes complete.
    pub fn feed(&mut self, mut bytes: &[u8], now: SystemTime, out: &mut Vec<u8>) {
        let prefix = prefix(self.tag, now);
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            let rest = self.split_long(&bytes[..end], &prefix, out);
            line(out, &prefix, 'F', &self.begun, rest);
            self.begun.clear();
            bytes = &bytes[end + 1..];
        }
        let rest = self.split_long(bytes, &prefix, out);
        self.begun.extend_from_slice(rest);
    }

    /// Appends what is left when the stream has ended.
    pub fn finish(&mut self, now: SystemTime, out: &mut Vec<u8>) {
        if !self.begun.is_empty() {
            line(out, &prefix(self.tag, now), 'P', &self.begun, &[]);
            self.begun.clear();
        }
    }

    /// Writes full parts as long as what was begun and `text` are longer than one; returns the rest of `text`.
    fn split_long<'t>(&mut self, mut text: &'t [u8], prefix: &[u8], out: &mut Vec<u8>) -> &'t [u8] {
        while self.begun.len() + text.len() > MAX_TEXT {
            let (part, rest) = text.split_at(MAX_TEXT - self.begun.len());
            line(out, prefix, 'P', &self.begun, part);
            self.begun.clear();
            text = rest;
        }
        text
    }
}

fn line(out: &mut Vec<u8>, prefix: &[u8], tag: char, first: &[u8], second: &[u8]) {
    out.extend_from_slice(prefix);
    out.extend_from_slice(if tag == 'F' { b"F " } else { b"P " });
    out.extend_from_slice(first);
    out.extend_from_slice(second);
    out.push(b'\n');
}

fn prefix(tag: Tag, now: SystemTime) -> Vec<u8> {
    let mut prefix = Vec::with_capacity(40);
    // Writing to memory does not fail.
    let _ = write!(prefix, "{} {} ", rfc3339(now), tag.name());
    prefix
}

/// A time in UTC with nanoseconds. A clock before 1970 counts as 1970.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let nanos = since.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
///
/// The calendar repeats every 400 years (146,097 days). Years are counted from March, so that the leap day
/// is the last of its year and months have lengths that a line approximates.
fn civil(days: u64) -> (u64, u64, u64) {
    // 719,468 days lie between 0000-03-01 and 1970-01-01.
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const EPOCH: &str = "1970-01-01T00:00:00.000000000Z stdout ";

    fn feed(parts: &[&[u8]]) -> String {
        let mut formatter = Formatter::new(Tag::Stdout);
        let mut out = Vec::new();
        for part in parts {
            formatter.feed(part, UNIX_EPOCH, &mut out);
        }
        formatter.finish(UNIX_EPOCH, &mut out);
        String::from_utf8(out).unwrap().replace(EPOCH, "")
    }

    #[test]
    fn times_are_right() {
        for (seconds, nanos, text) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (1_709_251_199, 999_999_999, "2024-02-29T23:59:59.999999999Z"),
            (1_795_305_600, 123_456_789, "2026-11-22T00:00:00.123456789Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::new(seconds, nanos)), text);
        }
    }

    #[test]
    fn lines_may_come_in_pieces() {
        assert_eq!(
            feed(&[b"a\nb", b"c", b"\n\nd\r\n"]),
            "F a\nF bc\nF \nF d\r\n"
        );
        assert_eq!(feed(&[b""]), "");
    }

    #[test]
    fn the_last_line_without_an_end_is_a_part() {
        assert_eq!(feed(&[b"one\ntw", b"o"]), "F one\nP two\n");
    }

    #[test]
    fn a_long_line_is_cut_and_a_line_of_just_the_limit_is_not() {
        let long = "x".repeat(MAX_TEXT);
        assert_eq!(feed(&[long.as_bytes(), b"\n"]), format!("F {long}\n"));
        assert_eq!(feed(&[long.as_bytes(), b"y\n"]), format!("P {long}\nF y\n"));
        let double = format!("{long}{long}");
        assert_eq!(
            feed(&[b"", double.as_bytes()]),
            format!("P {long}\nP {long}\n")
        );
    }
}
