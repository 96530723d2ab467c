//! The registers with which a vCPU enters a 64-bit kernel (Linux `Documentation/arch/x86/boot.rst`, 64-bit protocol).

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Null, unused, 64-bit code, data, 64-bit task state.
const GDT_ENTRIES: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PAGE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const DIRECTORIES: u64 = 4;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, no fixed ranges, write-back by default.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// SYSENTER_CS/ESP/EIP, STAR, LSTAR, CSTAR, SYSCALL_MASK, KERNEL_GS_BASE, TSC: zero as after a reset.
const ZERO_MSRS: [u32; 9] = [
    0x174,
    0x175,
    0x176,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0x10,
];

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 7 << 8;
const APIC_MODE_NMI: u32 = 4 << 8;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// KVM refused a set of registers.
    #[error("KVM refused a vCPU's {what}: {source}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM refused one model-specific register.
    #[error("KVM refused the model-specific register {0:#x}")]
    Msr(u32),
    /// The tables do not fit into guest memory.
    #[error("the boot page tables do not fit into guest memory")]
    Memory,
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> RegsError {
    move |source| RegsError::Kvm { what, source }
}

/// Writes the descriptor table and page tables that map the first 4 GiB one to one, once per machine.
///
/// # Errors
/// [`RegsError::Memory`].
pub fn write_boot_tables(memory: &GuestMemoryMmap) -> Result<(), RegsError> {
    let mut tables = Vec::with_capacity((2 + DIRECTORIES as usize) * 512);
    let base = layout::PAGE_TABLES.raw_value();
    let mut table = |entries: &[u64]| {
        tables.extend_from_slice(entries);
        tables.resize(tables.len().next_multiple_of(512), 0);
    };
    table(&[(base + PAGE) | PRESENT_WRITABLE]);
    let directories: Vec<u64> = (0..DIRECTORIES)
        .map(|i| (base + (2 + i) * PAGE) | PRESENT_WRITABLE)
        .collect();
    table(&directories);
    let pages: Vec<u64> = (0..DIRECTORIES * 512)
        .map(|i| (i << 21) | PRESENT_WRITABLE | LARGE)
        .collect();
    table(&pages);
    let write = |values: &[u64], at: GuestAddress| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        memory
            .write_slice(&bytes, at)
            .map_err(|_| RegsError::Memory)
    };
    write(&tables, layout::PAGE_TABLES)?;
    write(&GDT_ENTRIES, layout::GDT)
}

/// Sets a vCPU up for its start. `entry` is where the boot processor enters the kernel; the others
/// (`None`) wait for it to wake them.
///
/// # Errors
/// [`RegsError`] if KVM refuses.
pub fn set_up(vcpu: &VcpuFd, entry: Option<GuestAddress>) -> Result<(), RegsError> {
    set_msrs(vcpu)?;
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(kvm("floating point state"))?;
    set_local_interrupts(vcpu)?;
    let Some(entry) = entry else { return Ok(()) };
    enter_long_mode(vcpu)?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry.raw_value(),
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE.raw_value(),
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("general registers"))
}

/// Puts a vCPU in 64-bit mode on the tables of [`write_boot_tables`].
///
/// # Errors
/// [`RegsError::Kvm`].
pub fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("system registers"))?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(kvm("system registers"))
}

fn long_mode(sregs: &mut kvm_sregs) {
    let data = segment(DATA, 3, 0, 1);
    sregs.cs = segment(CODE, 0xb, 1, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK, 0xb, 0, 0);
    sregs.tr.s = 0;
    sregs.gdt.base = layout::GDT.raw_value();
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = layout::PAGE_TABLES.raw_value();
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = (sregs.cr0 | CR0_PE | CR0_ET | CR0_PG) & !(3 << 29);
    sregs.efer |= EFER_LME | EFER_LMA;
}

fn segment(selector: u16, kind: u8, long: u8, default_32: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: default_32,
        s: 1,
        l: long,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let mut entries: Vec<_> = ZERO_MSRS.iter().map(|msr| entry(*msr, 0)).collect();
    entries.push(entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING));
    entries.push(entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK));
    let msrs = Msrs::from_entries(&entries).map_err(|_| RegsError::Memory)?;
    let set = vcpu
        .set_msrs(&msrs)
        .map_err(kvm("model-specific registers"))?;
    match entries.get(set) {
        Some(refused) => Err(RegsError::Msr(refused.index)),
        None => Ok(()),
    }
}

/// LINT0 takes the interrupts of an 8259, LINT1 the NMI, as firmware leaves them.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let mut lapic = vcpu.get_lapic().map_err(kvm("local APIC"))?;
    for (offset, mode) in [
        (APIC_LVT_LINT0, APIC_MODE_EXTINT),
        (APIC_LVT_LINT1, APIC_MODE_NMI),
    ] {
        let register = &mut lapic.regs[offset..offset + 4];
        let old = u32::from_le_bytes([
            register[0] as u8,
            register[1] as u8,
            register[2] as u8,
            register[3] as u8,
        ]);
        let new = (old & !0x700) | mode;
        for (byte, value) in register.iter_mut().zip(new.to_le_bytes()) {
            *byte = value as std::ffi::c_char;
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm("local APIC"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_four_gib_are_mapped_one_to_one() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_boot_tables(&memory).unwrap();
        let read = |table: u64, index: u64| -> u64 {
            memory
                .read_obj(GuestAddress((table & !0xfff) + index * 8))
                .unwrap()
        };
        for address in [0u64, 0x10_0000, 0x3fff_ffff, 0xffe0_0000] {
            let pdpt = read(layout::PAGE_TABLES.0, 0);
            let directory = read(pdpt, address >> 30);
            let page = read(directory, (address >> 21) & 511);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!(page & 0x83, 0x83);
        }
        const { assert!(layout::PAGE_TABLES.0 + 6 * PAGE <= layout::CMDLINE.0) };
    }
}
