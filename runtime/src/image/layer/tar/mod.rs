//! A reader of tar streams that come from strangers: ustar, PAX and GNU, every length bounded.
//!
//! The `tar` crate reads long names and PAX headers of any size into memory, and knows one of the four sparse
//! forms; hence a reader of our own.

mod header;
mod pax;

use std::io::{self, Read};

use header::{BLOCK, Header};
use pax::{MAX_SPARSE, Pax};

/// Longest GNU long name, in bytes. Linux paths have 4,096.
const MAX_NAME: u64 = 64 << 10;
/// Longest PAX header, in bytes. It can hold extended attributes.
const MAX_PAX: u64 = 1 << 20;

/// Where the stored data of a sparse file goes: offsets and lengths, in order.
pub(crate) type SparseMap = Vec<(u64, u64)>;

/// What an entry makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// A regular file with this many bytes; the data is read through [`TarReader::read_data`].
    File {
        size: u64,
    },
    /// Another name of the file with this path.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Directory,
    Fifo,
    /// Major and minor number.
    CharDevice(u64, u64),
    BlockDevice(u64, u64),
}

/// One entry, with everything that the extended headers before it said.
#[derive(Debug)]
pub(crate) struct Entry {
    /// As in the archive, not yet normalised.
    pub path: Vec<u8>,
    pub kind: EntryKind,
    /// The 12 permission bits.
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds, nanoseconds.
    pub mtime: (i64, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of a sparse file: where its stored data goes (offset, length), in order, within the file's size.
    pub sparse: Option<SparseMap>,
}

/// A source that can pass over data without reading it, if it is a file.
pub(crate) trait TarSource: Read {
    /// Passes over `count` bytes. The end of the source may come before that and need not be noticed.
    fn pass(&mut self, count: u64) -> io::Result<()>
    where
        Self: Sized,
    {
        let passed = io::copy(&mut Read::take(&mut *self, count), &mut io::sink())?;
        if passed == count {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// Where the source stands, in bytes from its beginning, if it knows.
    fn position(&mut self) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Any stream, read through to pass over.
pub(crate) struct Stream<R>(pub R);

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> TarSource for Stream<R> {}

impl TarSource for std::fs::File {
    fn pass(&mut self, count: u64) -> io::Result<()> {
        let count = i64::try_from(count).map_err(|_| malformed("a size is too large"))?;
        io::Seek::seek_relative(self, count)
    }

    fn position(&mut self) -> io::Result<u64> {
        io::Seek::stream_position(self)
    }
}

/// Reads the entries of an archive one after the other.
pub(crate) struct TarReader<R> {
    inner: R,
    /// Data of the current entry that is still to come.
    remaining: u64,
    /// Zeros after it, up to a whole block.
    padding: u64,
    global: Pax,
    ended: bool,
}

impl<R: TarSource> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            remaining: 0,
            padding: 0,
            global: Pax::default(),
            ended: false,
        }
    }

    /// Where the current entry's data begins.
    pub(crate) fn data_position(&mut self) -> io::Result<u64> {
        self.inner.position()
    }

    /// The next entry; `None` at the end of the archive. Data of the last one that was not read is passed over.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut local: Option<Pax> = None;
        let (mut long_path, mut long_link) = (None, None);
        loop {
            self.inner.pass(self.remaining)?;
            self.inner.pass(self.padding)?;
            (self.remaining, self.padding) = (0, 0);
            let pending = local.is_some() || long_path.is_some() || long_link.is_some();
            let Some(block) = self.block()? else {
                if pending {
                    return Err(malformed("the archive ends after an extended header"));
                }
                return Ok(None);
            };
            let header = Header::new(&block)?;
            self.set_remaining(header.size()?)?;
            match header.kind() {
                b'L' => long_path = Some(self.long_name()?),
                b'K' => long_link = Some(self.long_name()?),
                b'x' => {
                    let data = self.extended(MAX_PAX, "PAX header")?;
                    local
                        .get_or_insert_with(|| self.global.clone())
                        .read(&data)?;
                }
                b'g' => {
                    let data = self.extended(MAX_PAX, "PAX header")?;
                    self.global.read(&data)?;
                }
                _ => {
                    let pax = local.unwrap_or_else(|| self.global.clone());
                    return self.entry(&header, pax, long_path, long_link).map(Some);
                }
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        pax: Pax,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> io::Result<Entry> {
        if let Some(size) = pax.size {
            self.set_remaining(size)?;
        }
        let mut path = pax.path.or(long_path).unwrap_or_else(|| header.path());
        let link = || pax.link.or(long_link).unwrap_or_else(|| header.link());
        let mut sparse = None;
        let kind = match header.kind() {
            b'0' | 0 | b'7' if path.ends_with(b"/") && self.remaining == 0 => EntryKind::Directory,
            b'0' | 0 | b'7' => match self.pax_sparse(&pax.sparse)? {
                Some((size, map)) => {
                    if let Some(name) = pax.sparse.name {
                        path = name;
                    }
                    sparse = Some(map);
                    EntryKind::File { size }
                }
                None => EntryKind::File {
                    size: self.remaining,
                },
            },
            b'S' => {
                let (size, map) = self.gnu_sparse(header)?;
                sparse = Some(map);
                EntryKind::File { size }
            }
            b'1' => EntryKind::HardLink(link()),
            b'2' => EntryKind::Symlink(link()),
            b'3' => header
                .device()
                .map(|(major, minor)| EntryKind::CharDevice(major, minor))?,
            b'4' => header
                .device()
                .map(|(major, minor)| EntryKind::BlockDevice(major, minor))?,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                return Err(malformed(&format!(
                    "a tar entry has the unknown type {:?}",
                    char::from(other)
                )));
            }
        };
        if !matches!(kind, EntryKind::File { .. }) {
            // What has no data has none, whatever its size field says: all readers agree on that.
            (self.remaining, self.padding) = (0, 0);
        }
        Ok(Entry {
            path,
            kind,
            mode: header.mode()?,
            uid: pax.uid.map_or_else(|| header.uid(), Ok)?,
            gid: pax.gid.map_or_else(|| header.gid(), Ok)?,
            mtime: match pax.mtime {
                Some(time) => time,
                None => (header.mtime()?, 0),
            },
            xattrs: pax.xattrs.into_iter().collect(),
            sparse,
        })
    }

    /// Reads data of the current entry; 0 at its end. An archive that ends before that is an error.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer
            .len()
            .min(usize::try_from(self.remaining).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let count = self.inner.read(&mut buffer[..want])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.remaining -= count as u64;
        Ok(count)
    }

    /// A header block; `None` at the end, which is a block of zeros or (some writers) simply the end of the stream.
    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while !self.ended && filled < BLOCK {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => self.ended = true,
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if block.iter().all(|byte| *byte == 0) {
            self.ended = true;
        }
        Ok((!self.ended).then_some(block))
    }

    fn set_remaining(&mut self, size: u64) -> io::Result<()> {
        if size > i64::MAX as u64 {
            return Err(malformed("a tar entry's size is too large"));
        }
        self.remaining = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    fn extended(&mut self, limit: u64, what: &str) -> io::Result<Vec<u8>> {
        if self.remaining > limit {
            return Err(malformed(&format!(
                "a {what} has {} bytes, and {limit} is the limit",
                self.remaining
            )));
        }
        // At most 1 MiB, checked above.
        let mut data = vec![0; self.remaining as usize];
        let mut filled = 0;
        while filled < data.len() {
            filled += self.read_data(&mut data[filled..])?;
        }
        Ok(data)
    }

    fn long_name(&mut self) -> io::Result<Vec<u8>> {
        let mut name = self.extended(MAX_NAME, "long name")?;
        if let Some(end) = name.iter().position(|byte| *byte == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    /// The old GNU form: the map is in the header, and in blocks after it.
    fn gnu_sparse(&mut self, header: &Header<'_>) -> io::Result<(u64, SparseMap)> {
        let (mut map, mut more, size) = header.gnu_sparse()?;
        while more {
            let mut block = [0; BLOCK];
            self.inner.read_exact(&mut block)?;
            header::sparse_entries(&block[..504], &mut map)?;
            more = block[504] != 0;
            if map.len() > MAX_SPARSE {
                return Err(malformed("a sparse map is too long"));
            }
        }
        self.check_map(size, map)
    }

    /// The PAX forms 0.0 and 0.1 (map in the header) and 1.0 (map before the data).
    fn pax_sparse(&mut self, keys: &pax::SparseKeys) -> io::Result<Option<(u64, SparseMap)>> {
        let numbers = match (keys.major, keys.minor, &keys.map) {
            (None, None, None) => return Ok(None),
            (Some(1), Some(0), _) => self.map_before_data()?,
            (None | Some(0), _, Some(map)) => map.clone(),
            _ => return Err(malformed("a sparse file has an unknown PAX form")),
        };
        let size = keys
            .real_size
            .ok_or_else(|| malformed("a sparse file lacks its real size"))?;
        if !numbers.len().is_multiple_of(2) {
            return Err(malformed("a sparse map has an odd number of values"));
        }
        let map = numbers
            .chunks_exact(2)
            .map(|pair| (pair[0], pair[1]))
            .collect();
        self.check_map(size, map).map(Some)
    }

    /// Decimal numbers, a line each, the first saying how many pairs follow; padded to a whole block.
    fn map_before_data(&mut self) -> io::Result<Vec<u64>> {
        let (mut numbers, mut digits): (Vec<u64>, Vec<u8>) = (Vec::new(), Vec::new());
        let mut wanted = None;
        loop {
            let mut block = [0; BLOCK];
            let mut filled = 0;
            while filled < BLOCK {
                match self.read_data(&mut block[filled..])? {
                    0 => return Err(malformed("a sparse map ends too early")),
                    count => filled += count,
                }
            }
            for byte in block {
                if byte != b'\n' {
                    digits.push(byte);
                    if digits.len() > 20 {
                        return Err(malformed("a sparse map has a line that is too long"));
                    }
                    continue;
                }
                let value = pax::decimal(&digits)?;
                digits.clear();
                match wanted {
                    None if value > MAX_SPARSE as u64 => {
                        return Err(malformed("a sparse map is too long"));
                    }
                    None => wanted = Some(2 * value as usize),
                    Some(_) => numbers.push(value),
                }
                if wanted == Some(numbers.len()) {
                    return Ok(numbers);
                }
            }
        }
    }

    /// The map must be in order, inside the file, and as long as the data that follows.
    fn check_map(&self, size: u64, map: SparseMap) -> io::Result<(u64, SparseMap)> {
        let (mut end, mut stored) = (0u64, 0u64);
        for (offset, length) in &map {
            let next = offset
                .checked_add(*length)
                .filter(|next| *offset >= end && *next <= size);
            end = next.ok_or_else(|| {
                malformed("a sparse map is out of order or leads outside its file")
            })?;
            stored += length;
        }
        if stored != self.remaining {
            return Err(malformed(
                "a sparse map does not fit the data that is stored",
            ));
        }
        Ok((size, map))
    }
}

pub(super) fn malformed(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}

#[cfg(test)]
mod tests;
