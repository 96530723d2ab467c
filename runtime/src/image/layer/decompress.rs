//! Decompression of layers, with a bound on what comes out.

use std::io::{self, BufReader, Read};

use crate::image::error::ImageError;

/// How a layer's tar stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Plain tar.
    None,
    /// RFC 1952, one or more members.
    Gzip,
    /// RFC 8878, one or more frames.
    Zstd,
}

impl Compression {
    /// Recognises the format by its first bytes, where no media type states it (`docker save` archives).
    pub(crate) fn sniff(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// A reader of the plain stream. A zstd frame may ask for a window of 128 MiB, the zstd tool's own default limit.
    pub(crate) fn reader<'a>(
        self,
        inner: impl Read + Send + 'a,
    ) -> io::Result<Box<dyn Read + Send + 'a>> {
        const BUFFER: usize = 128 << 10;
        Ok(match self {
            Self::None => Box::new(inner),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(
                BufReader::with_capacity(BUFFER, inner),
            )),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(inner)?;
                decoder.window_log_max(27)?;
                Box::new(decoder)
            }
        })
    }
}

/// Bounds of what an image's layers may unpack to.
#[derive(Debug, Clone, Copy)]
pub struct UnpackLimits {
    /// Most bytes of all layers of an image, unpacked.
    pub max_bytes: u64,
    /// Most bytes that come out for each byte that goes in, once [`UnpackLimits::FREE_BYTES`] are out.
    pub max_ratio: u64,
}

impl UnpackLimits {
    /// Up to this size the ratio is not looked at: an image may hold one large file of zeros.
    pub const FREE_BYTES: u64 = 1 << 30;

    /// Refuses `unpacked` bytes that came from `packed` bytes, if that is a decompression bomb; `image` counts all
    /// layers.
    pub(crate) fn check(
        &self,
        what: &str,
        packed: u64,
        unpacked: u64,
        image: u64,
    ) -> Result<(), ImageError> {
        if image > self.max_bytes {
            return Err(ImageError::too_large(
                what,
                format!(
                    "its image unpacks to more than {} bytes; raise images.max_unpacked_gib if it is to be trusted",
                    self.max_bytes
                ),
            ));
        }
        if unpacked > Self::FREE_BYTES && unpacked / self.max_ratio > packed {
            return Err(ImageError::too_large(
                what,
                format!(
                    "it unpacks to more than {} times its size, as a decompression bomb does",
                    self.max_ratio
                ),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_members_and_frames() {
        let mut gzip = Vec::new();
        for part in [&b"one "[..], b"two"] {
            let mut encoder = flate2::write::GzEncoder::new(&mut gzip, flate2::Compression::fast());
            io::Write::write_all(&mut encoder, part).unwrap();
            encoder.finish().unwrap();
        }
        let mut frames = zstd::encode_all(&b"one "[..], 1).unwrap();
        frames.extend(zstd::encode_all(&b"two"[..], 1).unwrap());
        for (bytes, format) in [(gzip, Compression::Gzip), (frames, Compression::Zstd)] {
            assert_eq!(Compression::sniff(&bytes), format);
            let mut text = String::new();
            format
                .reader(&bytes[..])
                .unwrap()
                .read_to_string(&mut text)
                .unwrap();
            assert_eq!(text, "one two");
            let cut = &bytes[..bytes.len() - 3];
            assert!(
                format
                    .reader(cut)
                    .unwrap()
                    .read_to_end(&mut Vec::new())
                    .is_err()
            );
        }
    }

    /// zstd:chunked puts its table of contents into frames that other readers pass over.
    #[test]
    fn skippable_frames() {
        let skippable = |data: &[u8]| {
            let mut frame = 0x184d_2a50_u32.to_le_bytes().to_vec();
            frame.extend((data.len() as u32).to_le_bytes());
            frame.extend_from_slice(data);
            frame
        };
        let frame = |text: &[u8]| zstd::encode_all(text, 3).unwrap();
        let blob = [
            frame(b"one "),
            skippable(b"between"),
            frame(b"two"),
            skippable(&[7; 100_000]),
            skippable(b""),
        ]
        .concat();
        let read = |blob: &[u8]| {
            let mut text = String::new();
            Compression::Zstd
                .reader(blob)
                .unwrap()
                .read_to_string(&mut text)
                .map(|_| text)
        };
        assert_eq!(read(&blob).unwrap(), "one two");
        assert!(
            read(&blob[..blob.len() - 50]).is_err(),
            "a frame is cut off"
        );
    }

    #[test]
    fn ratio() {
        let limits = UnpackLimits {
            max_bytes: 8 << 30,
            max_ratio: 100,
        };
        assert!(limits.check("x", 1, 1 << 30, 1 << 30).is_ok());
        assert!(limits.check("x", 1, (1 << 30) + 1, 2 << 30).is_err());
        assert!(limits.check("x", 1 << 26, 4 << 30, 4 << 30).is_ok());
        assert!(limits.check("x", 1 << 40, 1, (8 << 30) + 1).is_err());
    }
}
