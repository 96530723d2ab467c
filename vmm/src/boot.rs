//! From a checked configuration to a running machine.

use std::io;
use std::sync::Arc;

use vm_superio::Serial;

use crate::arch::acpi::{self, AcpiError, MmioDevice};
use crate::arch::kernel::{self, KernelError};
use crate::arch::layout;
use crate::config::MachineConfig;
use crate::timeline::Timeline;
use crate::transport::mmio::MmioTransport;
use crate::virtio::{Memory, VirtioDevice};
use crate::vm::{Bus, Console, Ending, KvmError, KvmVm, Machine, SerialLine, Vcpus};

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel or initramfs.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Threads and descriptors.
    #[error("the {what} could not be started: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn start(what: &'static str) -> impl Fn(io::Error) -> BootError {
    move |source| BootError::Start { what, source }
}

/// Builds the machine and starts its vCPUs.
///
/// The order matters. Whatever needs the host as the daemon sees it (the share's root, `/proc`) comes
/// before the jail; the jail comes before the first thread, because a namespace or an identity is
/// changed for the calling thread alone; and no byte that a guest has written is looked at before it.
/// The devices must be known before the ACPI tables that name them, and the vCPUs run last.
///
/// # Errors
/// [`BootError`] says in one sentence what failed. Nothing is left running.
pub fn build_and_boot(
    config: MachineConfig,
    ending: &Arc<Ending>,
    timeline: &mut Timeline,
) -> Result<Machine, BootError> {
    let mut config = config;
    let vm = timeline.measure("create vm", || KvmVm::new(config.kvm, config.memory))?;
    let kernel = timeline.measure("load kernel", || {
        kernel::load_kernel(vm.memory(), &mut config.kernel)
    })?;
    let initramfs = timeline.measure("load initramfs", || {
        let file = config.initramfs.as_mut();
        file.map(|file| kernel::load_initramfs(vm.memory(), &kernel, file))
            .transpose()
    })?;
    let devices: Vec<Box<dyn VirtioDevice>> = Vec::new();

    let (windows, places) = timeline.measure("attach devices", || attach(&vm, devices, ending))?;
    timeline.measure("write tables", || -> Result<(), BootError> {
        let rsdp = acpi::write_tables(vm.memory(), config.vcpus, &places)?;
        kernel::write_boot_params(vm.memory(), &kernel, initramfs, &config.cmdline, rsdp)?;
        Ok(())
    })?;
    let vcpus = timeline.measure("create vcpus", || vm.create_vcpus(config.vcpus, &kernel))?;
    let serial = Serial::new(
        SerialLine(vm.interrupt_line(layout::SERIAL_GSI)?),
        Console::new(config.console, config.console_limit).map_err(start("console"))?,
    );
    let bus = Arc::new(Bus::new(serial, windows, Arc::clone(ending)));
    let vcpus = timeline.measure("start vcpus", || {
        Vcpus::start(vcpus, &bus, ending).map_err(start("vCPU threads"))
    })?;
    Ok(Machine::new(vm, vcpus, bus, Arc::clone(ending)))
}

/// Puts each device behind a window and connects its events to KVM.
fn attach(
    vm: &KvmVm,
    devices: Vec<Box<dyn VirtioDevice>>,
    ending: &Arc<Ending>,
) -> Result<(Vec<MmioTransport>, Vec<MmioDevice>), BootError> {
    let memory = Memory::new(vm.memory().clone());
    let mut windows = Vec::with_capacity(devices.len());
    let mut places = Vec::with_capacity(devices.len());
    for (index, device) in devices.into_iter().enumerate() {
        let place = MmioDevice {
            address: layout::device_address(index),
            gsi: layout::device_gsi(index),
        };
        let line = vm.interrupt_line(place.gsi)?;
        let transport = MmioTransport::new(device, memory.clone(), line, ending.failure_sink())
            .map_err(start("virtio transport"))?;
        vm.connect_notifications(&transport, place.address)?;
        windows.push(transport);
        places.push(place);
    }
    Ok((windows, places))
}
