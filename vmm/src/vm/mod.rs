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

use std::sync::Arc;
use std::sync::{Mutex, PoisonError};

use caisson_vmm_protocol::VmState;

use crate::template::{MachineState, Saver, TemplateError};

/// A machine whose vCPUs have been started.
pub struct Machine {
    vcpus: Vcpus,
    bus: Arc<Bus>,
    ending: Arc<Ending>,
    state: Mutex<VmState>,
    /// Keeps the VM and the guest's memory for as long as the machine runs.
    vm: KvmVm,
}

impl Machine {
    /// A running machine.
    pub fn new(vm: KvmVm, vcpus: Vcpus, bus: Arc<Bus>, ending: Arc<Ending>) -> Self {
        Self {
            vcpus,
            bus,
            ending,
            state: Mutex::new(VmState::Running),
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
    pub fn save(&self, saver: &mut Saver) -> Result<MachineState, TemplateError> {
        self.pause();
        let vcpus = saver.save()?;
        let (serial, windows) = self.bus.save();
        Ok(MachineState::new(vcpus, self.vm.save()?, serial, windows))
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
