//! Where everything is in guest-physical memory and on the I/O bus.

use caisson_vmm_protocol::GrowthConfig;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// The global descriptor table that the boot processor starts with.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// The boot parameters ("zero page").
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The stack pointer at the kernel's entry; the kernel sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the boot processor: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The most bytes of a command line, its final zero included (`COMMAND_LINE_SIZE` of x86 Linux).
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory; from here to 1 MiB a PC has firmware.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables, in what would be the firmware's area.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// Where extended memory begins. Kernels are loaded at or above it.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);

/// Begin of the hole below 4 GiB that is not memory.
pub const MMIO_HOLE: u64 = 0xc000_0000;
/// End of that hole; memory goes on here.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// Where memory is that a guest takes in use after its boot: behind that of the largest template that grows.
pub const ADDED: GuestAddress = GuestAddress(MMIO_HOLE_END);
/// The most of it, in bytes.
pub const ADDED_MOST: u64 = (GrowthConfig::MOST_MIB as u64) << 20;
/// It comes in blocks of so many bytes.
pub const ADDED_BLOCK: u64 = (GrowthConfig::BLOCK_MIB as u64) << 20;
/// The first virtio-mmio window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// The size of one virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The most virtio-mmio windows.
pub const VIRTIO_MMIO_COUNT: usize = 128;
/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The page that KVM needs for its identity map on Intel processors.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages that KVM needs for a task state segment on Intel processors.
pub const KVM_TSS: usize = 0xfffb_d000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of the 16550's ports.
pub const SERIAL_PORTS: u16 = 8;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The pvpanic port.
pub const PVPANIC_PORT: u16 = 0x505;
/// The ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The ACPI reset register.
pub const RESET_PORT: u16 = 0x602;
/// What is written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The i8042's command port, for kernels that reset by it.
pub const I8042_PORT: u16 = 0x64;
/// The command that pulses the processor's reset line.
pub const I8042_RESET: u8 = 0xfe;

/// The first interrupt line for virtio devices.
pub const FIRST_DEVICE_GSI: u32 = 5;
/// The last pin of the I/O APIC.
pub const LAST_DEVICE_GSI: u32 = 23;

/// How much memory a machine has, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemorySize {
    /// What the guest finds when it boots.
    pub first: u64,
    /// What it takes in use afterwards, at [`ADDED`]. Where there is some, the first part ends below the hole.
    pub added: u64,
}

impl MemorySize {
    /// All of it.
    pub fn all(self) -> u64 {
        self.first + self.added
    }

    /// It as ranges of address and length, around the hole below 4 GiB.
    pub fn ranges(self) -> Vec<(GuestAddress, usize)> {
        let low = self.first.min(MMIO_HOLE);
        let high = (self.first - low) + self.added;
        let mut ranges = vec![(GuestAddress(0), low as usize)];
        if high > 0 {
            ranges.push((GuestAddress(MMIO_HOLE_END), high as usize));
        }
        ranges
    }
}

/// The end of memory below the hole.
pub fn low_memory_end(memory: &GuestMemoryMmap) -> u64 {
    use vm_memory::{GuestMemory, GuestMemoryRegion};
    memory.iter().next().map_or(0, |region| region.len())
}

/// The interrupt line of the virtio device in this window. Lines are shared when they run out.
pub fn device_gsi(window: usize) -> u32 {
    let lines = LAST_DEVICE_GSI - FIRST_DEVICE_GSI + 1;
    FIRST_DEVICE_GSI + (window as u32 % lines)
}

/// The address of this virtio-mmio window.
pub fn device_address(window: usize) -> u64 {
    VIRTIO_MMIO + window as u64 * VIRTIO_MMIO_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_round_the_hole() {
        let ranges = |first, added| MemorySize { first, added }.ranges();
        assert_eq!(ranges(64 << 20, 0), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(
            ranges(4 << 30, 0),
            [
                (GuestAddress(0), 3 << 30),
                (GuestAddress(MMIO_HOLE_END), 1 << 30)
            ]
        );
        assert_eq!(
            ranges(64 << 20, 8 << 20),
            [(GuestAddress(0), 64 << 20), (ADDED, 8 << 20)]
        );
    }

    #[test]
    fn lines_are_shared_only_when_they_run_out() {
        assert_eq!(device_gsi(0), 5);
        assert_eq!(device_gsi(18), 23);
        assert_eq!(device_gsi(19), 5);
        assert!(device_address(VIRTIO_MMIO_COUNT) <= u64::from(IOAPIC));
    }
}
