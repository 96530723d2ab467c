//! The blocks of the device's memory, and which of them the guest has in use.

use std::ops::Range;

/// Memory from a guest-physical address on, in blocks.
#[derive(Debug)]
pub struct Blocks {
    start: u64,
    /// The bytes of a block.
    size: u64,
    plugged: Vec<bool>,
}

impl Blocks {
    /// `bytes` of memory from `start` on, in blocks of `size` bytes; what is no whole block is left out.
    pub fn new(start: u64, bytes: u64, size: u64, plugged: bool) -> Self {
        // At most 2^40 bytes of memory in blocks of at least a page.
        let count = (bytes / size) as usize;
        Self {
            start,
            size,
            plugged: vec![plugged; count],
        }
    }

    /// The first address.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of a block.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> u64 {
        self.plugged.len() as u64 * self.size
    }

    /// Bytes of those that are in use.
    pub fn plugged_bytes(&self) -> u64 {
        self.plugged.iter().filter(|there| **there).count() as u64 * self.size
    }

    /// The blocks from `address` on; `None` where not all of them are there, or it is no block's address.
    pub fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start)?;
        if !offset.is_multiple_of(self.size) || count == 0 {
            return None;
        }
        let first = usize::try_from(offset / self.size).ok()?;
        let end = first.checked_add(count.into())?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    /// All blocks.
    pub fn all(&self) -> Range<usize> {
        0..self.plugged.len()
    }

    /// Whether all of these are in use, or none; `None`: some are.
    pub fn state(&self, range: Range<usize>) -> Option<bool> {
        let blocks = &self.plugged[range];
        let first = *blocks.first()?;
        blocks.iter().all(|other| *other == first).then_some(first)
    }

    /// Notes that these are in use, or not.
    pub fn set(&mut self, range: Range<usize>, plugged: bool) {
        self.plugged[range].fill(plugged);
    }

    /// Where these are: an address and bytes.
    pub fn place(&self, range: &Range<usize>) -> (u64, u64) {
        let (first, count) = (range.start as u64, range.len() as u64);
        (self.start + first * self.size, count * self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_of_whole_blocks_that_are_there() {
        let blocks = Blocks::new(0x10_0000, 0x4_8000, 0x1_0000, false);
        assert_eq!(blocks.bytes(), 0x4_0000);
        assert_eq!(blocks.range(0x10_0000, 4), Some(0..4));
        assert_eq!(blocks.range(0x13_0000, 1), Some(3..4));
        assert_eq!(
            blocks.place(&blocks.range(0x11_0000, 2).unwrap()),
            (0x11_0000, 0x2_0000)
        );
        for (address, count) in [
            (0x10_0000, 5),
            (0x10_0000, 0),
            (0x10_0000, u16::MAX),
            (0x14_0000, 1),
            (0x10_8000, 1),
            (0xf_0000, 1),
            (0, 1),
            (u64::MAX, 1),
            (!0xffff, u16::MAX),
        ] {
            assert_eq!(blocks.range(address, count), None, "{address:#x}, {count}");
        }
    }

    #[test]
    fn what_is_in_use_is_known() {
        let mut blocks = Blocks::new(0, 4 << 16, 1 << 16, false);
        assert_eq!(blocks.state(0..4), Some(false));
        blocks.set(1..3, true);
        assert_eq!(blocks.plugged_bytes(), 2 << 16);
        assert_eq!(blocks.state(1..3), Some(true));
        assert_eq!(blocks.state(0..2), None);
        assert_eq!(blocks.state(0..0), None);
        assert_eq!(
            Blocks::new(0, 4 << 16, 1 << 16, true).plugged_bytes(),
            4 << 16
        );
    }
}
