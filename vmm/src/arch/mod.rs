//! What an x86-64 machine looks like to the guest: memory map, tables, registers, the Linux boot protocol.

pub mod acpi;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod regs;
