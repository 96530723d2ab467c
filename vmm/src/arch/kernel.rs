//! Loading a kernel and its initramfs, and the boot parameters (Linux x86 boot protocol 2.15, 64-bit entry).

use std::fs::File;
use std::io::{Read, Seek};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
};

use super::layout;

const ELF_MAGIC: [u8; 4] = [0x7f, b'E', b'L', b'F'];
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const PROTOCOL_2_15: u16 = 0x20f;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry of a bzImage lies so far behind its load address.
const BZIMAGE_ENTRY_64: u64 = 0x200;
const BZIMAGE_LOAD: u64 = 16 << 20;
/// An initramfs must end below this, whatever the kernel says.
const INITRAMFS_MAX: u64 = 0x7fff_ffff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PAGE: u64 = 0x1000;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It is neither a 64-bit ELF nor a bzImage, or is damaged.
    #[error("the guest kernel cannot be loaded: {0}; it must be a 64-bit ELF vmlinux or a bzImage")]
    Load(#[from] linux_loader::loader::Error),
    /// The file could not be read.
    #[error("the guest kernel cannot be read: {0}")]
    Read(std::io::Error),
    /// The kernel or its entry lies where it may not.
    #[error("the guest kernel is damaged: {0}")]
    Damaged(&'static str),
    /// The initramfs could not be read.
    #[error("the initramfs cannot be read: {0}")]
    Initramfs(std::io::Error),
    /// Kernel and initramfs do not fit.
    #[error("kernel and initramfs do not fit into {0} MiB of guest memory; give the pod more")]
    Memory(u64),
    /// The command line is too long or has a zero in it.
    #[error("the kernel command line of {0} bytes is longer than {max} or has a zero byte in it", max = layout::CMDLINE_MAX - 1)]
    Cmdline(usize),
}

/// A loaded kernel.
pub struct LoadedKernel {
    /// Where the boot processor enters.
    pub entry: GuestAddress,
    /// The first address behind the kernel's image and its early heap.
    end: u64,
    result: KernelLoaderResult,
}

/// Loads the kernel into guest memory.
///
/// # Errors
/// [`KernelError`] says what is wrong with the file.
pub fn load_kernel(memory: &GuestMemoryMmap, file: &mut File) -> Result<LoadedKernel, KernelError> {
    let mut magic = [0; 4];
    file.rewind().map_err(KernelError::Read)?;
    file.read_exact(&mut magic).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => KernelError::Damaged("it is shorter than any header"),
        _ => KernelError::Read(e),
    })?;
    let kernel = if magic == ELF_MAGIC {
        let result = Elf::load(memory, None, file, Some(layout::HIGH_RAM))?;
        LoadedKernel {
            entry: result.kernel_load,
            end: result.kernel_end,
            result,
        }
    } else {
        let at = GuestAddress(BZIMAGE_LOAD);
        let result = BzImage::load(memory, Some(at), file, Some(layout::HIGH_RAM))?;
        let header = result.setup_header.unwrap_or_default();
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(KernelError::Damaged("it has no 64-bit entry point"));
        }
        // The decompressor works in place and wants so much room.
        let end = (BZIMAGE_LOAD.max(header.pref_address)).saturating_add(header.init_size.into());
        LoadedKernel {
            entry: at.unchecked_add(BZIMAGE_ENTRY_64),
            end: end.max(result.kernel_end),
            result,
        }
    };
    if kernel.entry.raw_value() >= kernel.end {
        return Err(KernelError::Damaged("its entry point is outside of it"));
    }
    if kernel.end > layout::low_memory_end(memory) {
        return Err(too_small(memory));
    }
    Ok(kernel)
}

/// Loads the initramfs at the top of low memory and returns its address and length.
///
/// # Errors
/// [`KernelError::Initramfs`], [`KernelError::Memory`].
pub fn load_initramfs(
    memory: &GuestMemoryMmap,
    kernel: &LoadedKernel,
    file: &mut File,
) -> Result<(GuestAddress, u32), KernelError> {
    let length = file.metadata().map_err(KernelError::Initramfs)?.len();
    file.rewind().map_err(KernelError::Initramfs)?;
    let limit = kernel.result.setup_header.map_or(INITRAMFS_MAX, |header| {
        u64::from(header.initrd_addr_max).min(INITRAMFS_MAX)
    });
    let top = layout::low_memory_end(memory).min(limit + 1);
    let start = top
        .checked_sub(length)
        .map(|start| start & !(PAGE - 1))
        .filter(|start| *start >= kernel.end)
        .ok_or_else(|| too_small(memory))?;
    let at = GuestAddress(start);
    // `length` is below 2 GiB here: it fits below `limit`.
    memory
        .read_exact_volatile_from(at, file, length as usize)
        .map_err(|e| KernelError::Initramfs(std::io::Error::other(e)))?;
    Ok((at, length as u32))
}

/// Writes the command line and the boot parameters.
///
/// # Errors
/// [`KernelError::Cmdline`], [`KernelError::Memory`].
pub fn write_boot_params(
    memory: &GuestMemoryMmap,
    kernel: &LoadedKernel,
    initramfs: Option<(GuestAddress, u32)>,
    cmdline: &str,
    rsdp: GuestAddress,
) -> Result<(), KernelError> {
    if cmdline.len() >= layout::CMDLINE_MAX || cmdline.contains('\0') {
        return Err(KernelError::Cmdline(cmdline.len()));
    }
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    let write = |bytes: &[u8], at| memory.write_slice(bytes, at).map_err(|_| too_small(memory));
    write(&line, layout::CMDLINE)?;

    let mut params = boot_params {
        hdr: kernel.result.setup_header.unwrap_or_default(),
        acpi_rsdp_addr: rsdp.raw_value(),
        ..Default::default()
    };
    if kernel.result.setup_header.is_none() {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.version = PROTOCOL_2_15;
        params.hdr.kernel_alignment = 0x100_0000;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE.raw_value() as u32;
    params.hdr.cmdline_size = line.len() as u32;
    if let Some((address, length)) = initramfs {
        // Below 2 GiB, see `load_initramfs`.
        params.hdr.ramdisk_image = address.raw_value() as u32;
        params.hdr.ramdisk_size = length;
    }
    let map = e820(memory);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    write(params.as_slice(), layout::ZERO_PAGE)
}

/// The memory map: conventional memory, the firmware's area, and all memory above it.
fn e820(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let entry = |addr, size, type_| boot_e820_entry { addr, size, type_ };
    let firmware = layout::HIGH_RAM.raw_value() - layout::LOW_RAM_END;
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, E820_RAM),
        entry(layout::LOW_RAM_END, firmware, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().max(layout::HIGH_RAM).raw_value();
        let end = region.last_addr().raw_value() + 1;
        if end > start {
            map.push(entry(start, end - start, E820_RAM));
        }
    }
    map
}

fn too_small(memory: &GuestMemoryMmap) -> KernelError {
    KernelError::Memory(memory.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A 64-bit ELF with one loadable segment.
    fn elf(entry: u64, address: u64, code: &[u8], memsz: u64) -> Vec<u8> {
        let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        out.resize(16, 0);
        for half in [2u16, 62] {
            out.extend(half.to_le_bytes());
        }
        out.extend(1u32.to_le_bytes());
        for word in [entry, 64, 0] {
            out.extend(word.to_le_bytes());
        }
        out.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 0, 0, 0] {
            out.extend(half.to_le_bytes());
        }
        out.extend(1u32.to_le_bytes());
        out.extend(7u32.to_le_bytes());
        for word in [120, address, address, code.len() as u64, memsz, 0x1000] {
            out.extend(word.to_le_bytes());
        }
        out.extend(code);
        out
    }

    #[test]
    fn an_elf_is_loaded_where_it_says() {
        let memory = memory();
        let kernel =
            load_kernel(&memory, &mut file(&elf(0x10_0000, 0x10_0000, b"code", 8))).unwrap();
        assert_eq!(kernel.entry, GuestAddress(0x10_0000));
        assert_eq!(kernel.end, 0x10_0008);
        let mut code = [0; 4];
        memory.read_slice(&mut code, kernel.entry).unwrap();
        assert_eq!(&code, b"code");
    }

    #[test]
    fn damaged_kernels_are_errors() {
        let memory = memory();
        let good = elf(0x10_0000, 0x10_0000, b"code", 8);
        let bad = [
            Vec::new(),
            b"\x7fELF".to_vec(),
            b"not a kernel at all".to_vec(),
            vec![0; 4096],
            good[..100].to_vec(),
            good[..good.len() - 2].to_vec(),
            elf(0x10_0000, u64::MAX - 2, b"code", 8),
            elf(0x10_0000, 0x10_0000, b"code", u64::MAX),
            elf(0x10_0000, 0x10_0000, b"code", 1 << 40),
            elf(0x1000, 0x10_0000, b"code", 8),
            elf(0x80_0000, 0x10_0000, b"code", 8),
        ];
        for (i, bytes) in bad.iter().enumerate() {
            assert!(load_kernel(&memory, &mut file(bytes)).is_err(), "case {i}");
        }
    }

    #[test]
    fn the_initramfs_is_behind_the_kernel_and_page_aligned() {
        let memory = memory();
        let kernel =
            load_kernel(&memory, &mut file(&elf(0x10_0000, 0x10_0000, b"code", 8))).unwrap();
        let (at, length) = load_initramfs(&memory, &kernel, &mut file(&[7; 5000])).unwrap();
        assert_eq!(length, 5000);
        assert_eq!(at.0 % PAGE, 0);
        assert!(at.0 + 5000 <= 64 << 20);
        let big = file(&[]);
        big.set_len(64 << 20).unwrap();
        assert!(matches!(
            load_initramfs(&memory, &kernel, &mut { big }),
            Err(KernelError::Memory(64))
        ));
    }

    #[test]
    fn a_long_command_line_is_refused() {
        let memory = memory();
        let kernel =
            load_kernel(&memory, &mut file(&elf(0x10_0000, 0x10_0000, b"code", 8))).unwrap();
        let write = |line: &str| write_boot_params(&memory, &kernel, None, line, GuestAddress(0));
        assert!(write(&"x".repeat(layout::CMDLINE_MAX - 1)).is_ok());
        assert!(write(&"x".repeat(layout::CMDLINE_MAX)).is_err());
        assert!(write("a\0b").is_err());
    }
}
