//! Templates: machines that were booted once, of which each pod is a clone.
//!
//! When the agent of a machine that is to be a template has told that it is settled, the vCPUs and devices are parked, the
//! memory is written to a file ([`Image`]) and the rest to a second one ([`MachineState`]), and the process ends
//! ([`Making`]). A clone maps the memory privately: a page is shared until it is written. It begins where
//! the template ended, so its agent listens at once.
//!
//! What the two have in common is what the template was booted with: kernel, agent, command line, memory, vCPUs and
//! devices. A clone of a template that grows has more of memory and vCPUs: its kernel knows of the vCPUs that wait to be
//! woken, and the memory is behind a device ([`crate::virtio::mem`]). The disks and the network device of a template have nothing behind them that matters: the guest has not
//! looked at them. A parked device has served all that it took from its rings, so a ring's own used index says
//! where it was, and needs no place in the state.
//!
//! A pod's machine can be written down in the same way while it runs ([`save`]), with all that its devices have behind them, and
//! goes on in another process later.

mod image;
mod making;
mod memory;
mod saving;
mod serial;
mod vcpu;

use std::fs::File;
use std::io;

use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

pub use image::Image;
pub use making::Making;
pub use memory::Overlay;
pub use saving::save;
pub use serial::SerialPort;
pub use vcpu::{Saver, VcpuState};

use crate::transport::mmio::WindowState;

/// The version of the state's format. A state of another version is refused; the daemon then makes a new template.
const FORMAT: u32 = 1;
/// The longest state: what 32 vCPUs need, several times.
const LONGEST: u64 = 16 << 20;

/// Why a template cannot be made or cloned.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// KVM.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// The files.
    #[error("the saved machine's {what} cannot be used: {source}")]
    File {
        /// Which.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// There is nothing to save.
    #[error("the machine does not run, so it cannot be saved")]
    NotRunning,
    /// The state is not one, or not of this machine.
    #[error(
        "the saved machine's state does not fit: {0}; templates are made anew when they are removed, a snapshot is of no use here"
    )]
    State(String),
}

pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> TemplateError {
    move |source| TemplateError::Kvm { what, source }
}

fn file(what: &'static str) -> impl Fn(io::Error) -> TemplateError {
    move |source| TemplateError::File { what, source }
}

/// All of a parked machine that is not in its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// See [`FORMAT`].
    pub format: u32,
    /// The vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// Both PICs and the I/O APIC (KVM API, KVM_GET_IRQCHIP).
    pub chips: Vec<kvm_irqchip>,
    /// The paravirtual clock.
    pub clock: kvm_clock_data,
    /// COM1.
    pub serial: SerialPort,
    /// The virtio-mmio windows, in order.
    pub windows: Vec<WindowState>,
}

impl MachineState {
    /// A state of the current format.
    pub fn new(
        vcpus: Vec<VcpuState>,
        (chips, clock): (Vec<kvm_irqchip>, kvm_clock_data),
        serial: SerialPort,
        windows: Vec<WindowState>,
    ) -> Self {
        Self {
            format: FORMAT,
            vcpus,
            chips,
            clock,
            serial,
            windows,
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`TemplateError::File`].
    pub fn write(&self, to: &mut impl io::Write) -> Result<(), TemplateError> {
        serde_json::to_writer(io::BufWriter::new(to), self)
            .map_err(|error| file("state")(error.into()))
    }

    /// Reads one of a machine with so many vCPUs and devices.
    ///
    /// # Errors
    /// [`TemplateError`] where it cannot be read or is not of such a machine.
    pub fn read(from: &File, vcpus: usize, windows: usize) -> Result<Self, TemplateError> {
        let length = from.metadata().map_err(file("state"))?.len();
        if length > LONGEST {
            return Err(TemplateError::State(format!("it has {length} bytes")));
        }
        let mut from = from;
        let mut text = Vec::with_capacity(length as usize);
        io::Seek::rewind(&mut from).map_err(file("state"))?;
        io::Read::read_to_end(&mut io::Read::take(from, LONGEST), &mut text)
            .map_err(file("state"))?;
        let state: Self =
            serde_json::from_slice(&text).map_err(|e| TemplateError::State(e.to_string()))?;
        if state.format != FORMAT {
            let other = state.format;
            return Err(TemplateError::State(format!(
                "its format is {other}, this VMM's is {FORMAT}"
            )));
        }
        if (state.vcpus.len(), state.windows.len()) != (vcpus, windows) {
            return Err(TemplateError::State(format!(
                "it is of a machine with {} vCPUs and {} devices, and this one has {vcpus} and {windows}",
                state.vcpus.len(),
                state.windows.len()
            )));
        }
        Ok(state)
    }
}
