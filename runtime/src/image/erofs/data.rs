//! File data on its way into an image.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use super::tree::FileData;
use super::{BLOCK, MAX_INLINE};

/// Holes from this size on are left out of the file on the host.
const MIN_HOLE: u64 = 64 << 10;

/// Writes file data to the image, block after block, and short files to a spool.
pub(crate) struct DataWriter {
    image: BufWriter<File>,
    /// Where the next byte goes.
    position: u64,
    spool: BufWriter<File>,
    spooled: u64,
}

/// A file whose data is being written.
pub(crate) struct Writing {
    size: u64,
    /// Where the file begins: in the image, or in the spool.
    start: u64,
    inline: bool,
    written: u64,
}

impl DataWriter {
    /// Writes to the empty file `image`; `spool` is an empty file too, and may have no name.
    pub(crate) fn new(image: File, spool: File) -> io::Result<Self> {
        let mut image = BufWriter::with_capacity(1 << 20, image);
        image.seek(SeekFrom::Start(BLOCK))?;
        Ok(Self {
            image,
            position: BLOCK,
            spool: BufWriter::with_capacity(256 << 10, spool),
            spooled: 0,
        })
    }

    /// Bytes of the image so far.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Begins a file of `size` bytes.
    pub(crate) fn begin(&mut self, size: u64) -> Writing {
        let inline = size <= MAX_INLINE;
        Writing {
            size,
            start: if inline { self.spooled } else { self.position },
            inline,
            written: 0,
        }
    }

    /// Where in the image the file's next byte goes; `None` for a short file, which gets its place at the end.
    pub(crate) fn place(&self, file: &Writing) -> Option<u64> {
        (!file.inline).then_some(self.position)
    }

    /// Adds data to the file. More than its size is an error.
    pub(crate) fn write(&mut self, file: &mut Writing, bytes: &[u8]) -> io::Result<()> {
        let count = bytes.len() as u64;
        if count > file.size - file.written {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a file has more data than its size",
            ));
        }
        file.written += count;
        if file.inline {
            self.spooled += count;
            self.spool.write_all(bytes)
        } else {
            self.position += count;
            self.image.write_all(bytes)
        }
    }

    /// Adds zeros to the file.
    pub(crate) fn zeros(&mut self, file: &mut Writing, count: u64) -> io::Result<()> {
        if !file.inline && count >= MIN_HOLE && count <= file.size - file.written {
            let target = self
                .position
                .checked_add(count)
                .ok_or(io::ErrorKind::FileTooLarge)?;
            self.image.seek(SeekFrom::Start(target))?;
            self.position = target;
            file.written += count;
            return Ok(());
        }
        let zeros = [0; BLOCK as usize];
        let mut left = count;
        while left > 0 {
            let part = left.min(BLOCK);
            self.write(file, &zeros[..part as usize])?;
            left -= part;
        }
        Ok(())
    }

    /// Ends the file, which must have got all its data.
    pub(crate) fn end(&mut self, file: Writing) -> io::Result<FileData> {
        if file.written != file.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if file.size == 0 {
            return Ok(FileData::Empty);
        }
        if file.inline {
            return Ok(FileData::Spooled {
                offset: file.start,
                size: file.size as u32,
            });
        }
        self.align()?;
        let first = block_number(file.start)?;
        Ok(FileData::Blocks {
            first,
            size: file.size,
        })
    }

    /// Writes whole blocks, or what is padded to them, and says where they are.
    pub(super) fn blocks(&mut self, bytes: &[u8]) -> io::Result<u32> {
        let first = block_number(self.position)?;
        self.raw(bytes)?;
        self.align()?;
        Ok(first)
    }

    /// Writes bytes of the metadata.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        self.image.write_all(bytes)
    }

    /// Zeros up to the next block.
    pub(super) fn align(&mut self) -> io::Result<()> {
        self.pad_to(self.position.next_multiple_of(BLOCK))
    }

    /// Zeros up to `position`, which is less than a block away or there already.
    pub(super) fn pad_to(&mut self, position: u64) -> io::Result<()> {
        let zeros = [0; BLOCK as usize];
        while self.position < position {
            let part = (position - self.position).min(BLOCK) as usize;
            self.raw(&zeros[..part])?;
        }
        Ok(())
    }

    /// The image's file and the spool, everything written.
    pub(super) fn finish(self) -> io::Result<(File, File)> {
        let image = self
            .image
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        let spool = self
            .spool
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        Ok((image, spool))
    }

    /// The spool, everything written, for reading while the image is still being written.
    pub(super) fn spool(&mut self) -> io::Result<File> {
        self.spool.flush()?;
        self.spool.get_ref().try_clone()
    }
}

/// The number of the block at `position`: 32 bits, hence 16 TiB.
pub(super) fn block_number(position: u64) -> io::Result<u32> {
    u32::try_from(position / BLOCK).map_err(|_| io::ErrorKind::FileTooLarge.into())
}
