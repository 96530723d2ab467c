//! What a machine that is saved writes.

/// The head of a piece of a saved machine's memory ([`Request::Save`](crate::Request::Save)).
///
/// The pieces come first, each with its bytes behind its head: whole pages that are not all zero, by ascending offsets.
/// A head without length ends them. What follows, to the end of the stream, is all that is not in memory: JSON, which is for
/// the machine that is restored alone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Part {
    /// Where it is in the memory, whose regions lie one after another.
    pub offset: u64,
    /// How many bytes it has, at most [`Part::LONGEST`].
    pub length: u32,
}

impl Part {
    /// Bytes of a head.
    pub const HEAD: usize = 12;
    /// The most bytes of a piece.
    pub const LONGEST: u32 = 2 << 20;
    /// The head that ends the memory.
    pub const END: Self = Self {
        offset: 0,
        length: 0,
    };

    /// The head as it is written: both numbers in little-endian.
    pub fn to_bytes(self) -> [u8; Self::HEAD] {
        let mut bytes = [0; Self::HEAD];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// A head that was read.
    pub fn from_bytes(bytes: [u8; Self::HEAD]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        Self {
            offset: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            length: u32::from_le_bytes([i, j, k, l]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_as_it_was_written() {
        let part = Part {
            offset: 0x1234_5678_9abc_d000,
            length: Part::LONGEST,
        };
        assert_eq!(Part::from_bytes(part.to_bytes()), part);
        assert_eq!(Part::END.to_bytes(), [0; Part::HEAD]);
    }
}
