//! Name/value blocks of SPDY frames: their form, and the compression that one connection keeps from block to block
//! (SPDY protocol, draft 3.1, section 2.6.10).

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::ProtocolError;
use super::dictionary::DICTIONARY;

/// The most bytes of a block, inflated.
const MAX_BLOCK: usize = 64 << 10;
/// The most names of a block.
const MAX_NAMES: usize = 128;
/// The window of the compressor: 2 KiB hold the dictionary, and keep a connection small.
const WINDOW_BITS: u8 = 11;

/// The headers of a stream, in order, with names in lower case.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// Headers from pairs of name and value.
    pub fn new<N: AsRef<str>, V: Into<String>>(pairs: impl IntoIterator<Item = (N, V)>) -> Self {
        let lower = |(name, value): (N, V)| (name.as_ref().to_ascii_lowercase(), value.into());
        Self(pairs.into_iter().map(lower).collect())
    }

    /// The value of a header; empty where it is missing.
    pub fn get(&self, name: &str) -> &str {
        self.0
            .iter()
            .find(|(have, _)| have.eq_ignore_ascii_case(name))
            .map_or("", |(_, value)| value)
    }

    fn encode(&self) -> Vec<u8> {
        let mut block = Vec::new();
        // Our own headers: a few short ones.
        let mut put = |bytes: &[u8]| {
            block.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
            block.extend_from_slice(bytes);
        };
        for (name, value) in &self.0 {
            put(name.as_bytes());
            put(value.as_bytes());
        }
        let mut all = (self.0.len() as u32).to_be_bytes().to_vec();
        all.append(&mut block);
        all
    }

    fn decode(mut block: &[u8]) -> Result<Self, ProtocolError> {
        let count = length(&mut block)?;
        if count > MAX_NAMES {
            return Err(ProtocolError::Headers("more than 128 names"));
        }
        let mut pairs: Vec<(String, String)> = Vec::with_capacity(count);
        for _ in 0..count {
            let name = text(&mut block)?;
            let value = text(&mut block)?;
            if name.is_empty() {
                return Err(ProtocolError::Headers("an empty name"));
            }
            if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
                return Err(ProtocolError::Headers("a name in upper case"));
            }
            if pairs.iter().any(|(have, _)| *have == name) {
                return Err(ProtocolError::Headers("a name given twice"));
            }
            pairs.push((name, value));
        }
        if !block.is_empty() {
            return Err(ProtocolError::Headers("bytes behind the last header"));
        }
        Ok(Self(pairs))
    }
}

fn length(block: &mut &[u8]) -> Result<usize, ProtocolError> {
    let (bytes, rest) = block
        .split_first_chunk::<4>()
        .ok_or(ProtocolError::Headers("a block that is cut off"))?;
    *block = rest;
    // A length over the block's is found by its user.
    Ok(u32::from_be_bytes(*bytes) as usize)
}

fn text(block: &mut &[u8]) -> Result<String, ProtocolError> {
    let length = length(block)?;
    let (bytes, rest) = block
        .split_at_checked(length)
        .ok_or(ProtocolError::Headers("a block that is cut off"))?;
    *block = rest;
    String::from_utf8(bytes.to_vec()).map_err(|_| ProtocolError::Headers("text that is not UTF-8"))
}

/// Compresses the blocks of one direction.
pub struct Deflater(Compress);

impl Deflater {
    /// A compressor at the beginning of a connection.
    ///
    /// # Errors
    /// The compression library refuses the dictionary.
    pub fn new() -> Result<Self, ProtocolError> {
        let mut compress =
            Compress::new_with_window_bits(Compression::default(), true, WINDOW_BITS);
        compress
            .set_dictionary(&DICTIONARY)
            .map_err(|_| ProtocolError::Headers("no compressor"))?;
        Ok(Self(compress))
    }

    /// One block, compressed.
    ///
    /// # Errors
    /// The compression library fails.
    pub fn block(&mut self, headers: &Headers) -> Result<Vec<u8>, ProtocolError> {
        self.pack(&headers.encode())
    }

    /// The bytes of a block, compressed.
    pub(crate) fn pack(&mut self, plain: &[u8]) -> Result<Vec<u8>, ProtocolError> {
        let mut packed = Vec::with_capacity(plain.len() + 64);
        let begin = self.0.total_in();
        loop {
            // Within the block's length.
            let done = (self.0.total_in() - begin) as usize;
            let status = self
                .0
                .compress_vec(&plain[done..], &mut packed, FlushCompress::Sync);
            status.map_err(|_| ProtocolError::Headers("a block that cannot be compressed"))?;
            let taken = (self.0.total_in() - begin) as usize == plain.len();
            if taken && packed.len() < packed.capacity() {
                return Ok(packed);
            }
            packed.reserve(256);
        }
    }
}

/// Inflates the blocks of one direction. After an error it cannot be used any more.
pub struct Inflater(Decompress);

impl Default for Inflater {
    /// A decompressor at the beginning of a connection.
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Inflater {
    /// One block, inflated to at most 64 KiB.
    ///
    /// # Errors
    /// It is not a continuation of the stream, too large, or malformed.
    pub fn block(&mut self, packed: &[u8]) -> Result<Headers, ProtocolError> {
        let mut plain = Vec::with_capacity(1024);
        let begin = self.0.total_in();
        loop {
            // Within the frame's length.
            let done = (self.0.total_in() - begin) as usize;
            let result = self
                .0
                .decompress_vec(&packed[done..], &mut plain, FlushDecompress::Sync);
            match result {
                Ok(Status::StreamEnd) => {
                    return Err(ProtocolError::Headers("a compressed stream that ends"));
                }
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| ProtocolError::Headers("another dictionary than SPDY's"))?;
                    continue;
                }
                Err(_) => {
                    return Err(ProtocolError::Headers("a block that cannot be inflated"));
                }
            }
            let taken = (self.0.total_in() - begin) as usize == packed.len();
            if taken && plain.len() < plain.capacity() {
                return Headers::decode(&plain);
            }
            if plain.len() >= MAX_BLOCK {
                return Err(ProtocolError::Headers("a block of more than 64 KiB"));
            }
            if plain.len() == plain.capacity() {
                plain.reserve(plain.capacity().min(MAX_BLOCK - plain.len()));
            } else {
                // There is room for output and input is left, yet nothing moves.
                return Err(ProtocolError::Headers("a block that is cut off"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: usize) -> Headers {
        Headers::new([
            ("streamType".to_owned(), "error".to_owned()),
            ("port".to_owned(), n.to_string()),
        ])
    }

    #[test]
    fn blocks_pass_one_after_the_other() {
        let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::default());
        for n in 0..1000 {
            let block = deflater.block(&sample(n)).unwrap();
            assert_eq!(inflater.block(&block).unwrap(), sample(n));
        }
        let long = Headers::new([("a", "x".repeat(60_000))]);
        let block = deflater.block(&long).unwrap();
        assert_eq!(inflater.block(&block).unwrap(), long);
        assert_eq!(
            inflater
                .block(&deflater.block(&Headers::default()).unwrap())
                .unwrap()
                .get("a"),
            ""
        );
    }

    #[test]
    fn names_are_found_whatever_their_case() {
        assert_eq!(sample(7).get("StreamType"), "error");
        assert_eq!(sample(7).get("requestID"), "");
    }

    /// Two blocks of one connection, made with zlib and the dictionary of the protocol's draft.
    #[test]
    fn blocks_of_another_implementation_are_read() {
        let first = b"\x78\xf9\xe3\xc6\xa7\xc2\x02\x25\x3a\x70\x3a\x2b\x29\x4a\x4d\xcc\x85\x16\x25\xac\xa9\xa0\x80\x86\x14\xcb\x45\xe0\x1c\x60\x61\x60\x61\x00\xa4\x39\x8b\x20\xd1\x98\x09\x4a\xde\x8c\x06\x00\x00\x00\x00\xff\xff";
        let second = b"\xc2\xaa\x19\x54\x0e\x25\x12\xd6\x0b\x00\x00\x00\xff\xff";
        let mut inflater = Inflater::default();
        for (block, kind) in [(&first[..], "error"), (&second[..], "data")] {
            let pairs = [("streamtype", kind), ("port", "8080"), ("requestid", "0")];
            assert_eq!(inflater.block(block).unwrap(), Headers::new(pairs));
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_inflated() {
        let mut compress = Compress::new(Compression::best(), true);
        compress.set_dictionary(&DICTIONARY).unwrap();
        let mut plain = 1u32.to_be_bytes().to_vec();
        plain.extend(1u32.to_be_bytes());
        plain.push(b'a');
        plain.extend((8u32 << 20).to_be_bytes());
        plain.resize(8 << 20, b'x');
        let mut packed = Vec::with_capacity(256 << 10);
        compress
            .compress_vec(&plain, &mut packed, FlushCompress::Sync)
            .unwrap();
        assert!(packed.len() < 200_000);
        assert!(Inflater::default().block(&packed).is_err());
    }

    #[test]
    fn malformed_blocks_are_refused() {
        let block = |plain: &[u8]| {
            let mut compress = Compress::new(Compression::best(), true);
            compress.set_dictionary(&DICTIONARY).unwrap();
            let mut packed = Vec::with_capacity(4096);
            compress
                .compress_vec(plain, &mut packed, FlushCompress::Sync)
                .unwrap();
            Inflater::default().block(&packed)
        };
        let pair = |name: &str, value: &str| {
            let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
            bytes.extend(name.bytes());
            bytes.extend((value.len() as u32).to_be_bytes());
            bytes.extend(value.bytes());
            bytes
        };
        let all =
            |count: u32, pairs: &[Vec<u8>]| [count.to_be_bytes().to_vec(), pairs.concat()].concat();
        block(&all(1, &[pair("a", "b")])).unwrap();
        for (plain, why) in [
            (vec![], "empty"),
            (all(0xffff_ffff, &[]), "count"),
            (all(2, &[pair("a", "b")]), "fewer than said"),
            (all(1, &[pair("a", "b"), pair("c", "d")]), "more than said"),
            (all(2, &[pair("a", "b"), pair("a", "d")]), "twice"),
            (all(1, &[pair("A", "b")]), "upper case"),
            (all(1, &[pair("", "b")]), "no name"),
            (all(1, &[0xffff_fff0u32.to_be_bytes().to_vec()]), "length"),
        ] {
            assert!(block(&plain).is_err(), "{why}");
        }
        assert!(Inflater::default().block(b"").is_err());
        assert!(
            Inflater::default()
                .block(b"\x78\xbb\xe3\xc6\xa7\xc2")
                .is_err()
        );
        assert!(Inflater::default().block(&[0xff; 64]).is_err());
        // Without the preset dictionary.
        let mut packed = Vec::with_capacity(100);
        Compress::new(Compression::best(), true)
            .compress_vec(
                &all(1, &[pair("a", "b")]),
                &mut packed,
                FlushCompress::Finish,
            )
            .unwrap();
        assert!(Inflater::default().block(&packed).is_err());
    }
}
