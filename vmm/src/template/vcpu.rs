//! A vCPU's registers, all of them, in the order in which KVM wants them back.

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};

use super::{TemplateError, kvm};

/// The time stamp counter.
const MSR_TSC: u32 = 0x10;
/// The time stamp counter's deadline: it means nothing before the counter and the local APIC are there.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The registers of one vCPU (KVM API §4).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    mp: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// Reads vCPUs whose threads are parked.
pub struct Saver {
    vcpus: Vec<VcpuFd>,
    /// The model-specific registers that this host can save.
    msrs: Vec<u32>,
}

impl Saver {
    /// A saver that has descriptors of its own of these vCPUs.
    ///
    /// # Errors
    /// [`TemplateError::Kvm`].
    pub fn new(kvm_device: &Kvm, vcpus: Vec<VcpuFd>) -> Result<Self, TemplateError> {
        let list = kvm_device.get_msr_index_list();
        let list = list.map_err(kvm("name the registers that can be saved"))?;
        Ok(Self {
            vcpus,
            msrs: list.as_slice().to_vec(),
        })
    }

    /// The state of all, in order. `serve` serves what is left of an access, and says whether it was one.
    ///
    /// # Errors
    /// [`TemplateError`]; also where a vCPU has more to do than to finish its last access.
    pub fn save(
        &mut self,
        serve: impl Fn(VcpuExit<'_>) -> bool,
    ) -> Result<Vec<VcpuState>, TemplateError> {
        let msrs = &self.msrs;
        self.vcpus
            .iter_mut()
            .map(|vcpu| {
                finish_access(vcpu, &serve)?;
                VcpuState::of(vcpu, msrs)
            })
            .collect()
    }
}

/// An access that left the guest is complete only when KVM is entered again, and the registers are old until then
/// (KVM API §5, `KVM_EXIT_MMIO`). One of several parts leaves it again for each.
fn finish_access(
    vcpu: &mut VcpuFd,
    serve: impl Fn(VcpuExit<'_>) -> bool,
) -> Result<(), TemplateError> {
    vcpu.set_kvm_immediate_exit(1);
    let left = loop {
        match vcpu.run() {
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => break Ok(()),
            Err(error) => break Err(kvm("finish a vCPU's last access")(error)),
            Ok(VcpuExit::Intr) => break Ok(()),
            Ok(exit) => {
                let what = format!("{exit:?}");
                if !serve(exit) {
                    break Err(TemplateError::State(format!(
                        "a vCPU was in the middle of {what}"
                    )));
                }
            }
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    left
}

impl VcpuState {
    fn of(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, TemplateError> {
        // In this order: reading the multiprocessing state takes pending INIT and SIPI into account, and events come last.
        Ok(Self {
            mp: vcpu.get_mp_state().map_err(kvm("tell a vCPU's state"))?,
            regs: vcpu.get_regs().map_err(kvm("tell a vCPU's registers"))?,
            sregs: vcpu
                .get_sregs()
                .map_err(kvm("tell a vCPU's special registers"))?,
            xsave: vcpu
                .get_xsave()
                .map_err(kvm("tell a vCPU's extended state"))?,
            xcrs: vcpu
                .get_xcrs()
                .map_err(kvm("tell a vCPU's extended control registers"))?,
            debug: vcpu
                .get_debug_regs()
                .map_err(kvm("tell a vCPU's debug registers"))?,
            lapic: vcpu.get_lapic().map_err(kvm("tell a vCPU's local APIC"))?,
            msrs: read_msrs(vcpu, msrs)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(kvm("tell a vCPU's pending events"))?,
        })
    }

    /// Gives a new vCPU, which has its CPUID already, this state.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn put(&self, vcpu: &VcpuFd) -> Result<(), TemplateError> {
        vcpu.set_mp_state(self.mp)
            .map_err(kvm("take a vCPU's state"))?;
        vcpu.set_regs(&self.regs)
            .map_err(kvm("take a vCPU's registers"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(kvm("take a vCPU's special registers"))?;
        // Before the extended state, which has only what they turn on.
        vcpu.set_xcrs(&self.xcrs)
            .map_err(kvm("take a vCPU's extended control registers"))?;
        // SAFETY: the machine has no features whose state is larger than `kvm_xsave`: those need a permission for guests
        // (arch_prctl(2), ARCH_REQ_XCOMP_GUEST_PERM) that this process never asks for.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm("take a vCPU's extended state"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(kvm("take a vCPU's debug registers"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(kvm("take a vCPU's local APIC"))?;
        let (deadline, msrs): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .copied()
            .partition(|msr| msr.index == MSR_TSC_DEADLINE);
        write_msrs(vcpu, &msrs)?;
        write_msrs(vcpu, &deadline)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(kvm("take a vCPU's pending events"))
    }

    /// Gives a new vCPU the time stamp counter that this one had.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn put_time(&self, vcpu: &VcpuFd) -> Result<(), TemplateError> {
        let time: Vec<_> = self
            .msrs
            .iter()
            .copied()
            .filter(|msr| msr.index == MSR_TSC)
            .collect();
        write_msrs(vcpu, &time)
    }
}

/// Reads those that this vCPU has: the host names some that it has not.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, TemplateError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = part
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = wrapped(&entries)?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(kvm("tell a vCPU's model-specific registers"))?;
        found.extend_from_slice(&msrs.as_slice()[..read.min(part.len())]);
        // KVM stops at the first that there is not.
        let skip = usize::from(read < part.len());
        rest = &rest[(read + skip).min(rest.len())..];
    }
    Ok(found)
}

fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), TemplateError> {
    for part in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let written = vcpu
            .set_msrs(&wrapped(part)?)
            .map_err(kvm("take a vCPU's model-specific registers"))?;
        if let Some(refused) = part.get(written) {
            return Err(TemplateError::State(format!(
                "KVM does not take the register {:#x} back",
                refused.index
            )));
        }
    }
    Ok(())
}

fn wrapped(entries: &[kvm_msr_entry]) -> Result<Msrs, TemplateError> {
    Msrs::from_entries(entries).map_err(|error| TemplateError::State(format!("{error:?}")))
}
