//! One 512-byte tar header: POSIX ustar, with GNU's numbers.

use std::io;

use super::{SparseMap, malformed};

pub(super) const BLOCK: usize = 512;

/// A header block whose checksum was right.
pub(super) struct Header<'a>(&'a [u8; BLOCK]);

impl<'a> Header<'a> {
    pub(super) fn new(block: &'a [u8; BLOCK]) -> io::Result<Self> {
        let header = Self(block);
        let stated =
            octal(&block[148..156]).ok_or_else(|| malformed("a tar header has no checksum"))?;
        let sum = |signed: bool| -> i64 {
            block
                .iter()
                .enumerate()
                .map(|(at, byte)| match (at, signed) {
                    (148..156, _) => i64::from(b' '),
                    (_, false) => i64::from(*byte),
                    (_, true) => i64::from(*byte as i8),
                })
                .sum()
        };
        // Some old writers summed signed characters.
        let stated =
            i64::try_from(stated).map_err(|_| malformed("a tar header's checksum is wrong"))?;
        if stated != sum(false) && stated != sum(true) {
            return Err(malformed("a tar header's checksum is wrong"));
        }
        Ok(header)
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    fn is_ustar(&self) -> bool {
        &self.0[257..263] == b"ustar\0"
    }

    fn is_gnu(&self) -> bool {
        &self.0[257..263] == b"ustar "
    }

    /// The name, with ustar's prefix before it.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = if self.is_ustar() {
            text(&self.0[345..500])
        } else {
            &[]
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> io::Result<u32> {
        // The bits above 0o7777 repeat the type in some writers' headers.
        Ok((number(&self.0[100..108], "mode")? & 0o7777) as u32)
    }

    pub(super) fn uid(&self) -> io::Result<u64> {
        number(&self.0[108..116], "uid")
    }

    pub(super) fn gid(&self) -> io::Result<u64> {
        number(&self.0[116..124], "gid")
    }

    pub(super) fn size(&self) -> io::Result<u64> {
        number(&self.0[124..136], "size")
    }

    pub(super) fn mtime(&self) -> io::Result<i64> {
        signed(&self.0[136..148], "mtime")
    }

    pub(super) fn device(&self) -> io::Result<(u64, u64)> {
        Ok((
            number(&self.0[329..337], "device number")?,
            number(&self.0[337..345], "device number")?,
        ))
    }

    /// The first entries of an old GNU sparse map, whether more follow, and the file's real size.
    pub(super) fn gnu_sparse(&self) -> io::Result<(SparseMap, bool, u64)> {
        if !self.is_gnu() {
            return Err(malformed("a sparse file has no GNU header"));
        }
        let mut map = Vec::new();
        sparse_entries(&self.0[386..482], &mut map)?;
        Ok((
            map,
            self.0[482] != 0,
            number(&self.0[483..495], "real size")?,
        ))
    }
}

/// Adds the (offset, length) pairs of a GNU sparse table, up to its first empty one.
pub(super) fn sparse_entries(table: &[u8], map: &mut Vec<(u64, u64)>) -> io::Result<()> {
    for pair in table.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        map.push((
            number(&pair[..12], "sparse map")?,
            number(&pair[12..], "sparse map")?,
        ));
    }
    Ok(())
}

/// The field up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    &field[..end]
}

fn number(field: &[u8], name: &str) -> io::Result<u64> {
    u64::try_from(signed(field, name)?)
        .map_err(|_| malformed(&format!("a tar header's {name} is negative")))
}

/// Octal digits, or (first bit set) GNU's base 256 in two's complement.
fn signed(field: &[u8], name: &str) -> io::Result<i64> {
    let wrong = || malformed(&format!("a tar header's {name} is not a number"));
    if field[0] & 0x80 == 0 {
        return octal(field)
            .and_then(|value| i64::try_from(value).ok())
            .ok_or_else(wrong);
    }
    let negative = field[0] & 0x40 != 0;
    let first = if negative {
        i128::from(field[0]) - 256
    } else {
        i128::from(field[0] & 0x3f)
    };
    // The longest field has 12 bytes, which an i128 holds.
    let value = field[1..]
        .iter()
        .fold(first, |value, byte| value << 8 | i128::from(*byte));
    i64::try_from(value).map_err(|_| wrong())
}

/// Octal digits between spaces or NULs; an empty field is zero.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field)
        .ok()?
        .trim_matches(|c| c == ' ' || c == '\0');
    if text.is_empty() {
        return Some(0);
    }
    if !text.bytes().all(|byte| matches!(byte, b'0'..=b'7')) {
        return None;
    }
    u64::from_str_radix(text, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(signed(b"0000644\0", "x").unwrap(), 0o644);
        assert_eq!(signed(b"   644 \0", "x").unwrap(), 0o644);
        assert_eq!(signed(b"\0\0\0\0", "x").unwrap(), 0);
        assert_eq!(signed(&[0x80, 0, 0, 0, 0, 0, 1, 0], "x").unwrap(), 256);
        assert_eq!(signed(&[0xff; 12], "x").unwrap(), -1);
        assert!(number(&[0xff; 12], "x").is_err());
        assert!(
            signed(
                &[
                    0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0
                ],
                "x"
            )
            .is_err()
        );
        for bad in [
            &b"0000648\0"[..],
            b"-000001\0",
            b"0x00001\0",
            b"1\x002\0\0\0\0\0",
        ] {
            assert!(signed(bad, "x").is_err(), "{bad:?}");
        }
    }
}
