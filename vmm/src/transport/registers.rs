//! The registers that a guest reads: a page of this process, which the guest sees in the place of a device's window.
//!
//! KVM lets the guest read such a page without an exit, and gives what the guest writes to the device as ever
//! (`KVM_MEM_READONLY`, KVM API §4.35). A driver reads a register at every interrupt, so this is an exit to this process less for
//! each. It also means that nobody is asked when the guest reads: a register's value is in the page before
//! the driver can know that it has changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio as reg;

use crate::arch::layout;

/// The size of the page, which is that of a window, in bytes.
const SIZE: usize = layout::VIRTIO_MMIO_SIZE as usize;
/// Where a device's configuration space begins in its window (virtio 1.2 §4.2.2), in bytes.
pub const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;

/// One window's registers as the guest reads them, little-endian whatever the host is.
#[repr(C, align(4096))]
pub struct Registers([AtomicU32; SIZE / 4]);

impl Registers {
    /// Registers that are zero, and a configuration space. What of it does not fit into the window nobody can read.
    pub fn new(config: &[u8]) -> Arc<Self> {
        let registers = Arc::new(Self([const { AtomicU32::new(0) }; SIZE / 4]));
        registers.set_config(0, config);
        registers
    }

    /// Where the page is in this process.
    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// What the driver reads of a register: its offset in the window, in bytes.
    pub fn get(&self, register: u32) -> u32 {
        u32::from_le(self.word(register).load(Ordering::SeqCst))
    }

    /// Sets a register.
    pub fn set(&self, register: u32, value: u32) {
        self.word(register).store(value.to_le(), Ordering::SeqCst);
    }

    /// Sets bits of a register that several threads change.
    pub fn add(&self, register: u32, bits: u32) {
        self.word(register).fetch_or(bits.to_le(), Ordering::SeqCst);
    }

    /// Takes bits of a register back.
    pub fn remove(&self, register: u32, bits: u32) {
        let keep = (!bits).to_le();
        self.word(register).fetch_and(keep, Ordering::SeqCst);
    }

    /// Changes bytes of the configuration space. A driver never sees a part of four that are aligned; one that reads more
    /// of them looks at the generation.
    pub fn set_config(&self, offset: u64, bytes: &[u8]) {
        let begin = usize::try_from(CONFIG.saturating_add(offset)).unwrap_or(SIZE);
        let places = (begin..SIZE).zip(bytes);
        let mut places = places.peekable();
        while let Some(&(at, _)) = places.peek() {
            let word = &self.0[at / 4];
            let mut new = word.load(Ordering::SeqCst).to_ne_bytes();
            while let Some((same, byte)) = places.next_if(|(other, _)| other / 4 == at / 4) {
                new[same % 4] = *byte;
            }
            word.store(u32::from_ne_bytes(new), Ordering::SeqCst);
        }
    }

    /// Reads as the guest does. Beyond the window there are zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let begin = usize::try_from(offset).map_or(SIZE, |offset| offset.min(SIZE));
        for (at, byte) in (begin..).zip(data) {
            let word = self.0.get(at / 4).map(|word| word.load(Ordering::SeqCst));
            *byte = word.map_or(0, |word| word.to_ne_bytes()[at % 4]);
        }
    }

    /// A register, which is one of the specification's: they are all in the page.
    fn word(&self, register: u32) -> &AtomicU32 {
        &self.0[register as usize / 4]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_little_endian_words_of_a_page() {
        let registers = Registers::new(&[]);
        assert_eq!(registers.address() % SIZE as u64, 0);
        assert_eq!(size_of::<Registers>(), SIZE);
        registers.set(0x10, 0x0102_0304);
        let mut data = [9; 6];
        registers.read(0x10, &mut data);
        assert_eq!(data, [4, 3, 2, 1, 0, 0]);
        registers.add(0x10, 0x10);
        registers.remove(0x10, 0x04);
        assert_eq!(registers.get(0x10), 0x0102_0310);
    }

    #[test]
    fn the_configuration_space_is_read_at_any_width_and_ends_in_zeros() {
        let registers = Registers::new(&[1, 2, 3, 4, 5]);
        let read = |offset| {
            let mut data = [9; 4];
            registers.read(CONFIG + offset, &mut data);
            data
        };
        assert_eq!(read(1), [2, 3, 4, 5]);
        assert_eq!(read(3), [4, 5, 0, 0]);
        registers.set_config(2, &[7, 8, 9]);
        assert_eq!((read(0), read(4)), ([1, 2, 7, 8], [9, 0, 0, 0]));
        // Neither the window's end nor an absurd offset is passed.
        registers.set_config(SIZE as u64 - CONFIG - 1, &[6, 6]);
        registers.set_config(u64::MAX, &[6]);
        assert_eq!(read(SIZE as u64 - CONFIG - 2), [0, 6, 0, 0]);
        assert_eq!(read(u64::MAX - CONFIG), [0; 4]);
        assert_eq!(registers.get(0), 0);
    }
}
