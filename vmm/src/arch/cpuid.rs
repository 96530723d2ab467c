//! What CPUID tells a vCPU: what KVM supports, with this machine's topology and without what a pod has no use for.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

const ECX_VMX: u32 = 1 << 5;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const EXTENDED_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXTENDED_ECX_SVM: u32 = 1 << 2;
const CLFLUSH_UNITS: u32 = 8;

/// Why there is no CPUID table.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not tell what it supports.
    #[error("KVM does not tell which CPUID it supports: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
    /// More leaves than KVM takes.
    #[error("the CPUID table has more entries than KVM takes")]
    TooLong,
}

/// What all vCPUs have in common.
pub struct Cpuid {
    supported: CpuId,
    tsc_deadline: bool,
    vcpus: u8,
}

impl Cpuid {
    /// Asks KVM what it supports.
    ///
    /// # Errors
    /// [`CpuidError::Kvm`].
    pub fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, CpuidError> {
        Ok(Self {
            supported: kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            vcpus,
        })
    }

    /// The table of the vCPU with this APIC ID.
    ///
    /// # Errors
    /// [`CpuidError::TooLong`].
    pub fn for_vcpu(&self, apic_id: u8) -> Result<CpuId, CpuidError> {
        let mut entries = self.supported.as_slice().to_vec();
        // The topology leaves are written anew: KVM passes the host's on.
        entries.retain(|e| !matches!(e.function, 0xb | 0x1f));
        let mut highest = 0;
        for entry in &mut entries {
            if entry.function == 0 {
                highest = entry.eax;
            }
            self.adapt(entry, apic_id);
        }
        for leaf in [0xb, 0x1f] {
            if highest >= leaf {
                entries.extend(self.topology(leaf, apic_id));
            }
        }
        CpuId::from_entries(&entries).map_err(|_| CpuidError::TooLong)
    }

    /// The extended processor states that KVM supports, as XCR0 has them; `None` without XSAVE.
    pub fn extended_states(&self) -> Option<u64> {
        self.supported
            .as_slice()
            .iter()
            .find(|entry| (entry.function, entry.index) == (0xd, 0))
            .map(|entry| u64::from(entry.edx) << 32 | u64::from(entry.eax))
            .filter(|states| *states & 1 != 0)
    }

    /// Bits of an APIC ID that number the cores of the one package.
    fn core_bits(&self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }

    fn adapt(&self, entry: &mut kvm_cpuid_entry2, apic_id: u8) {
        let (vcpus, apic_id) = (u32::from(self.vcpus), u32::from(apic_id));
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0xff)
                    | CLFLUSH_UNITS << 8
                    | (1 << self.core_bits()) << 16
                    | apic_id << 24;
                entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
                // A pod does not nest virtual machines: less of KVM is within the guest's reach.
                entry.ecx &= !ECX_VMX;
                set(&mut entry.ecx, ECX_TSC_DEADLINE, self.tsc_deadline);
                set(&mut entry.edx, EDX_HTT, vcpus > 1);
            }
            4 => {
                let level = (entry.eax >> 5) & 7;
                if entry.eax & 0x1f != 0 {
                    let sharing = if level >= 3 { vcpus - 1 } else { 0 };
                    entry.eax = (entry.eax & 0x3fff) | sharing << 14 | (vcpus - 1).min(63) << 26;
                }
            }
            // No performance counters: they tell a pod about its neighbours.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 => {
                entry.ecx &= !EXTENDED_ECX_SVM;
                set(
                    &mut entry.ecx,
                    EXTENDED_ECX_CMP_LEGACY,
                    vcpus > 1 && is_amd(&self.supported),
                );
            }
            0x8000_0008 if is_amd(&self.supported) => {
                entry.ecx = (vcpus - 1) | self.core_bits() << 12;
            }
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001d => {
                let level = (entry.eax >> 5) & 7;
                if entry.eax & 0x1f != 0 {
                    let sharing = if level >= 3 { vcpus - 1 } else { 0 };
                    entry.eax = (entry.eax & 0x3fff) | sharing << 14;
                }
            }
            0x8000_001e => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    /// Extended topology: one thread a core, all cores in one package.
    fn topology(&self, function: u32, apic_id: u8) -> [kvm_cpuid_entry2; 3] {
        let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: kind << 8 | index,
            edx: apic_id.into(),
            ..Default::default()
        };
        [
            level(0, 0, 1, 1),
            level(1, self.core_bits(), self.vcpus.into(), 2),
            level(2, 0, 0, 0),
        ]
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

fn is_amd(supported: &CpuId) -> bool {
    const AUTHENTIC_AMD: (u32, u32) = (u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"cAMD"));
    supported
        .as_slice()
        .iter()
        .any(|e| e.function == 0 && (e.ebx, e.ecx) == AUTHENTIC_AMD)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid(vcpus: u8) -> Cpuid {
        let entry = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let (auth, enti, camd) = (0x6874_7541, 0x6974_6e65, 0x444d_4163);
        let supported = CpuId::from_entries(&[
            entry(0, 0, 0x1f, auth, camd, enti),
            entry(1, 0, 0, 0xff00_0000, ECX_VMX, 0),
            entry(4, 3, 0x163, 0, 0, 0),
            entry(0xb, 0, 7, 7, 7, 7),
            entry(0x8000_0001, 0, 0, 0, ECX_VMX | EXTENDED_ECX_SVM, 0),
            entry(0x8000_000a, 0, 1, 2, 3, 4),
            entry(0x8000_001e, 0, 99, 99, 99, 0),
        ])
        .unwrap();
        Cpuid {
            supported,
            tsc_deadline: true,
            vcpus,
        }
    }

    fn leaf(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table
            .as_slice()
            .iter()
            .find(|e| (e.function, e.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn each_vcpu_has_its_apic_id_and_sees_the_topology() {
        let table = cpuid(6).for_vcpu(5).unwrap();
        let one = leaf(&table, 1, 0);
        assert_eq!(one.ebx >> 24, 5);
        assert_eq!((one.ebx >> 16) & 0xff, 8);
        assert_ne!(one.ecx & ECX_HYPERVISOR, 0);
        assert_ne!(one.edx & EDX_HTT, 0);
        for topology in [0xb, 0x1f] {
            assert_eq!(leaf(&table, topology, 0).edx, 5);
            assert_eq!(leaf(&table, topology, 1).eax, 3);
            assert_eq!(leaf(&table, topology, 1).ebx, 6);
        }
        assert_eq!(leaf(&table, 4, 3).eax >> 26, 5);
        assert_eq!(leaf(&table, 0x8000_001e, 0).eax, 5);
    }

    #[test]
    fn nested_virtualization_is_hidden() {
        let table = cpuid(1).for_vcpu(0).unwrap();
        assert_eq!(leaf(&table, 1, 0).ecx & ECX_VMX, 0);
        assert_eq!(leaf(&table, 0x8000_0001, 0).ecx & EXTENDED_ECX_SVM, 0);
        assert_eq!(leaf(&table, 0x8000_000a, 0).edx, 0);
        assert_eq!(leaf(&table, 1, 0).edx & EDX_HTT, 0);
    }
}
