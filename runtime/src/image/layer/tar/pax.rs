//! PAX extended headers (POSIX.1 pax, "Extended Header"), with the keys that layers use.

use std::collections::BTreeMap;
use std::io;

use super::malformed;

/// Most entries of a sparse map.
pub(super) const MAX_SPARSE: usize = 1 << 20;

/// The values of a PAX header. What an entry does not say, the archive's global header may.
#[derive(Debug, Clone, Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    /// Seconds and nanoseconds.
    pub mtime: Option<(i64, u32)>,
    /// Last one wins.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub sparse: SparseKeys,
}

/// The keys of the three PAX forms of GNU sparse files.
#[derive(Debug, Clone, Default)]
pub(super) struct SparseKeys {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    /// Forms 0.0 and 0.1: the numbers of the map, in order.
    pub map: Option<Vec<u64>>,
}

impl Pax {
    /// Adds the records of an extended header: `LENGTH KEY=VALUE\n`, where the length counts itself.
    pub(super) fn read(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let space = data
                .iter()
                .take(20)
                .position(|byte| *byte == b' ')
                .ok_or_else(|| malformed("a PAX record has no length"))?;
            let length = usize::try_from(decimal(&data[..space])?)
                .map_err(|_| malformed("a PAX record is too long"))?;
            if length < space + 3 || length > data.len() || data[length - 1] != b'\n' {
                return Err(malformed("a PAX record's length is wrong"));
            }
            let record = &data[space + 1..length - 1];
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or_else(|| malformed("a PAX record has no value"))?;
            self.set(&record[..equals], &record[equals + 1..])?;
            data = &data[length..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        // An empty value takes back what a global header said.
        let path = |value: &[u8]| -> io::Result<Option<Vec<u8>>> {
            if value.contains(&0) {
                return Err(malformed("a PAX path has a NUL character"));
            }
            Ok((!value.is_empty()).then(|| value.to_vec()))
        };
        let optional = |value: &[u8]| {
            if value.is_empty() {
                Ok(None)
            } else {
                decimal(value).map(Some)
            }
        };
        match key {
            b"path" => self.path = path(value)?,
            b"linkpath" => self.link = path(value)?,
            b"size" => self.size = optional(value)?,
            b"uid" => self.uid = optional(value)?,
            b"gid" => self.gid = optional(value)?,
            b"mtime" => {
                self.mtime = if value.is_empty() {
                    None
                } else {
                    Some(time(value)?)
                }
            }
            b"GNU.sparse.major" => self.sparse.major = optional(value)?,
            b"GNU.sparse.minor" => self.sparse.minor = optional(value)?,
            b"GNU.sparse.name" => self.sparse.name = path(value)?,
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.real_size = optional(value)?,
            b"GNU.sparse.map" => {
                let numbers: io::Result<Vec<u64>> = if value.is_empty() {
                    Ok(Vec::new())
                } else {
                    value.split(|byte| *byte == b',').map(decimal).collect()
                };
                self.sparse.map = Some(numbers?);
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let map = self.sparse.map.get_or_insert_default();
                // Offset and length take turns, and begin with an offset.
                if map.len().is_multiple_of(2) != (key == b"GNU.sparse.offset") {
                    return Err(malformed("a PAX sparse map is out of order"));
                }
                map.push(decimal(value)?);
            }
            b"GNU.sparse.numblocks" => {
                self.sparse.map.get_or_insert_default();
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        match &self.sparse.map {
            Some(map) if map.len() > 2 * MAX_SPARSE => Err(malformed("a sparse map is too long")),
            _ => Ok(()),
        }
    }
}

/// Decimal digits and nothing else.
pub(super) fn decimal(text: &[u8]) -> io::Result<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err(malformed("a PAX number is not decimal"));
    }
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| malformed("a PAX number is too large"))
}

/// Seconds with an optional sign and fraction, as (seconds, nanoseconds) with the nanoseconds counting forward.
fn time(text: &[u8]) -> io::Result<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &[][..]),
    };
    let seconds =
        i64::try_from(decimal(whole)?).map_err(|_| malformed("a PAX time is too large"))?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(malformed("a PAX time is not a number"));
    }
    let nanoseconds = (0..9).fold(0u32, |value, at| {
        value * 10 + fraction.get(at).map_or(0, |digit| u32::from(digit - b'0'))
    });
    Ok(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(data: &[u8]) -> io::Result<Pax> {
        let mut pax = Pax::default();
        pax.read(data)?;
        Ok(pax)
    }

    #[test]
    fn records() {
        let pax =
            read(b"12 path=a/b\n14 size=12345\n15 mtime=-1.25\n26 SCHILY.xattr.user.x=\0\n\n")
                .unwrap();
        assert_eq!(pax.path.unwrap(), b"a/b");
        assert_eq!(pax.size, Some(12345));
        assert_eq!(pax.mtime, Some((-2, 750_000_000)));
        assert_eq!(pax.xattrs[&b"user.x"[..]], b"\0\n");
    }

    #[test]
    fn refuses_malformed_records() {
        for bad in [
            &b"path=a\n"[..],
            b"999 path=a\n",
            b"8 path=a\n",
            b"3 \n",
            b"0 \n",
            b"10 path=a\0",
            b"11 path=a\0\n",
            b"7 size\n",
            b"10 size=-1\n",
            b"99999999999999999999999 a=b\n",
            b"21 GNU.sparse.map=1,\n",
            b"25 GNU.sparse.numbytes=1\n",
        ] {
            assert!(read(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
    }
}
