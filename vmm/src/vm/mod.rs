//! The running machine: KVM's side of it, the vCPU threads, and what they reach.

mod bus;
mod console;
mod ending;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod kvm;
pub(crate) mod memory;
mod vcpu;

pub use bus::{Bus, SerialLine};
pub use console::Console;
pub use ending::Ending;
pub use kvm::{Content, KvmError, KvmVm, RestoreError};
pub use vcpu::Vcpus;

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use caisson_vmm_protocol::{GrowthConfig, VmState};
use vm_memory::{GuestMemory, GuestMemoryRegion};

use crate::template::{self, MachineState, Saver, TemplateError};

/// How large a machine is.
#[derive(Clone, Copy, Debug)]
pub struct MachineSize {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// MiB of memory.
    pub memory_mib: u32,
    /// What it has grown from, if it has.
    pub growth: Option<GrowthConfig>,
}

/// A machine whose vCPUs have been started.
pub struct Machine {
    vcpus: Vcpus,
    bus: Arc<Bus>,
    ending: Arc<Ending>,
    saver: Mutex<Saver>,
    state: Mutex<VmState>,
    growth: Option<GrowthConfig>,
    /// Keeps the VM and the guest's memory for as long as the machine runs.
    vm: KvmVm,
}

impl Machine {
    /// A running machine, whose vCPUs `saver` can read, and what it has grown from.
    pub fn new(
        vm: KvmVm,
        vcpus: Vcpus,
        bus: Arc<Bus>,
        ending: Arc<Ending>,
        saver: Saver,
        growth: Option<GrowthConfig>,
    ) -> Self {
        Self {
            vcpus,
            bus,
            ending,
            saver: Mutex::new(saver),
            state: Mutex::new(VmState::Running),
            growth,
            vm,
        }
    }

    /// What it is doing.
    pub fn state(&self) -> VmState {
        if self.ending.reason().is_some() {
            return VmState::Exited;
        }
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the machine's end is told.
    pub fn ending(&self) -> &Arc<Ending> {
        &self.ending
    }

    /// Parks the vCPUs, then the devices. Pausing twice is the same as once.
    pub fn pause(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state == VmState::Running {
            self.vcpus.pause();
            self.bus.pause();
            *state = VmState::Paused;
        }
    }

    /// Lets the devices, then the vCPUs go on.
    pub fn resume(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state == VmState::Paused {
            self.bus.resume();
            self.vcpus.resume();
            *state = VmState::Running;
        }
    }

    /// Parks the machine and says all of it that is not in its memory.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn save(&self) -> Result<MachineState, TemplateError> {
        self.pause();
        let mut saver = self.saver.lock().unwrap_or_else(PoisonError::into_inner);
        let vcpus = saver.save(|exit| vcpu::serve(exit, &self.bus))?;
        let (serial, windows) = self.bus.save();
        Ok(MachineState::new(vcpus, self.vm.save()?, serial, windows))
    }

    /// Parks the machine and writes all of it (see [`template::save`]). It stays parked; where it cannot be written, it goes
    /// on.
    ///
    /// # Errors
    /// [`TemplateError`]; also for a machine that does not run.
    pub fn write(&self, to: &mut impl Write) -> Result<(), TemplateError> {
        if self.state() != VmState::Running {
            return Err(TemplateError::NotRunning);
        }
        let written = self
            .save()
            .and_then(|state| template::save(self.vm.memory(), &state, to));
        if written.is_err() {
            self.resume();
        }
        written
    }

    /// How large it is.
    pub fn size(&self) -> MachineSize {
        let bytes: u64 = self.vm.memory().iter().map(|region| region.len()).sum();
        MachineSize {
            // Both were checked when the machine was made.
            vcpus: self.vcpus.count() as u8,
            memory_mib: (bytes >> 20) as u32,
            growth: self.growth,
        }
    }

    /// Ends the vCPUs and the devices, after the machine's end was told.
    pub fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != VmState::Exited {
            self.vcpus.stop();
            self.bus.stop();
            *state = VmState::Exited;
        }
    }
}

#[cfg(test)]
mod kvm_tests;
