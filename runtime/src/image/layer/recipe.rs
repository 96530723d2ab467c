//! How to make a layer's tar stream again from its EROFS image, byte for byte.
//!
//! An image keeps what a tar stream means, not how it was written: the order of its entries, their headers, their padding. The
//! recipe keeps that, so that an image can be saved with the same layers, hence the same ID. It is a zstd stream of
//! parts: bytes of the stream as they are, or a range of the EROFS image. Only the data of files that have blocks of
//! their own is taken from there.
//!
//! ```text
//! 1, length (4 bytes), bytes       bytes as they are
//! 2, offset (8), length (8)        a range of the image
//! 0                                the end
//! ```

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;

/// Most bytes that are kept as they are in one part.
const MAX_PART: usize = 64 << 10;

const END: u8 = 0;
const BYTES: u8 = 1;
const RANGE: u8 = 2;

/// Writes a recipe while the tar stream is read.
pub(super) struct Recorder(RefCell<State>);

struct State {
    encoder: zstd::stream::write::Encoder<'static, BufWriter<File>>,
    pending: Vec<u8>,
    /// How much of what follows is in the image, and noted already.
    noted: u64,
}

impl Recorder {
    /// Writes to the empty file `to`.
    pub(super) fn new(to: File) -> io::Result<Self> {
        let mut encoder = zstd::stream::write::Encoder::new(BufWriter::new(to), 1)?;
        encoder.include_checksum(true)?;
        Ok(Self(RefCell::new(State {
            encoder,
            pending: Vec::new(),
            noted: 0,
        })))
    }

    /// Says that the next `length` bytes of the stream go to `offset` in the image.
    pub(super) fn range(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        state.flush()?;
        let encoder = &mut state.encoder;
        encoder.write_all(&[RANGE])?;
        encoder.write_all(&offset.to_le_bytes())?;
        encoder.write_all(&length.to_le_bytes())?;
        state.noted = length;
        Ok(())
    }

    /// Takes bytes of the stream as they pass.
    pub(super) fn passed(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        let skip = bytes
            .len()
            .min(usize::try_from(state.noted).unwrap_or(usize::MAX));
        state.noted -= skip as u64;
        for part in bytes[skip..].chunks(MAX_PART) {
            if state.pending.len() + part.len() > MAX_PART {
                state.flush()?;
            }
            state.pending.extend_from_slice(part);
        }
        Ok(())
    }

    /// Ends the recipe. The file is complete and not yet synced.
    pub(super) fn finish(self) -> io::Result<File> {
        let mut state = self.0.into_inner();
        state.flush()?;
        state.encoder.write_all(&[END])?;
        let writer = state.encoder.finish()?;
        writer.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

impl State {
    fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        // At most MAX_PART.
        let length = self.pending.len() as u32;
        self.encoder.write_all(&[BYTES])?;
        self.encoder.write_all(&length.to_le_bytes())?;
        self.encoder.write_all(&self.pending)?;
        self.pending.clear();
        Ok(())
    }
}

/// Reads the tar stream again.
pub(crate) struct Again {
    recipe: Box<dyn Read + Send>,
    image: File,
    part: Part,
}

enum Part {
    /// Bytes of the recipe itself that are left.
    Bytes(u64),
    /// Where in the image, and how much is left.
    Range(u64, u64),
    End,
}

impl Again {
    /// From a recipe, and the image that belongs to it. That both are as they were is for the reader to find out, by the
    /// stream's digest.
    pub(crate) fn new(recipe: File, image: File) -> io::Result<Self> {
        let decoder = zstd::stream::read::Decoder::new(recipe)?;
        Ok(Self {
            recipe: Box::new(decoder),
            image,
            part: Part::Bytes(0),
        })
    }

    /// Bytes that are left in all. It reads the recipe to its end, and nothing of the image.
    pub(crate) fn length(mut self) -> io::Result<u64> {
        let mut total = 0u64;
        loop {
            let count = match self.part {
                Part::Bytes(count) => {
                    let passed = io::copy(&mut (&mut self.recipe).take(count), &mut io::sink())?;
                    if passed != count {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    count
                }
                Part::Range(_, count) => count,
                Part::End => return Ok(total),
            };
            total = total.checked_add(count).ok_or(io::ErrorKind::InvalidData)?;
            self.advance()?;
        }
    }

    fn number<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.recipe.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn advance(&mut self) -> io::Result<()> {
        self.part = match self.number::<1>()? {
            [END] => Part::End,
            [BYTES] => Part::Bytes(u32::from_le_bytes(self.number()?).into()),
            [RANGE] => {
                let offset = u64::from_le_bytes(self.number()?);
                Part::Range(offset, u64::from_le_bytes(self.number()?))
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        Ok(())
    }
}

impl Read for Again {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = |left: u64| {
            buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX))
        };
        loop {
            match self.part {
                Part::Bytes(0) | Part::Range(_, 0) => self.advance()?,
                Part::End => return Ok(0),
                Part::Bytes(left) => {
                    let want = most(left);
                    self.recipe.read_exact(&mut buffer[..want])?;
                    self.part = Part::Bytes(left - want as u64);
                    return Ok(want);
                }
                Part::Range(offset, left) => {
                    let want = most(left);
                    self.image.read_exact_at(&mut buffer[..want], offset)?;
                    self.part = Part::Range(offset + want as u64, left - want as u64);
                    return Ok(want);
                }
            }
            if buffer.is_empty() {
                return Ok(0);
            }
        }
    }
}
