//! From a checked configuration to a running machine.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use caisson_vmm_protocol::Event;
use vm_superio::Serial;

use crate::arch::acpi::{self, AcpiError, MmioDevice};
use crate::arch::kernel::{self, KernelError};
use crate::arch::layout;
use crate::config::MachineConfig;
use crate::control::Events;
use crate::jail::{Jail, JailError};
use crate::logs::{Dial, LogManager};
use crate::pod::{Pod, Running};
use crate::threads::{self, ConfineError};
use crate::timeline::Timeline;
use crate::transport::mmio::MmioTransport;
use crate::virtio::blk::{Block, Layers};
use crate::virtio::fs::{Fs, ShareRoot};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockConnector};
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
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The filters.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// A device.
    #[error("the {name} cannot be made: {source}")]
    Device {
        /// Which.
        name: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file server that a guest talks to never runs with the host's files around it.
    #[error("a share needs a jail: state jail.uid and jail.gid")]
    UnjailedShare,
    /// Threads and descriptors.
    #[error("the {what} could not be started: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn device<E: std::error::Error + Send + Sync + 'static>(name: &str) -> impl Fn(E) -> BootError {
    let name = name.to_owned();
    move |source| BootError::Device {
        name: name.clone(),
        source: Box::new(source),
    }
}

fn start(what: &'static str) -> impl Fn(io::Error) -> BootError {
    move |source| BootError::Start { what, source }
}

/// Builds the machine and starts its vCPUs.
///
/// The order matters. Whatever needs the host as the daemon sees it (the share's root, `/proc`, a tap's
/// settings) comes before the jail. The jail comes before the first thread, because a namespace or an
/// identity is changed for the calling thread alone, and before the guest's memory, which a fork would
/// copy. Everything that a guest can influence comes after it. The devices must be known before the ACPI
/// tables that name them, and the vCPUs run last.
///
/// # Errors
/// [`BootError`] says in one sentence what failed. Nothing is left running.
pub fn build_and_boot(
    mut config: MachineConfig,
    ending: &Arc<Ending>,
    events: &Arc<Events>,
    timeline: &mut Timeline,
) -> Result<Running, BootError> {
    let jail = timeline.measure("prepare jail", || prepare_jail(&config))?;
    let mut devices = timeline.measure("create devices", || create_devices(&mut config, events))?;
    let landlock = timeline.measure("enter jail", || match (jail, &config.jail) {
        (Some(jail), Some(identity)) => {
            let landlock = jail.enter(identity)?;
            threads::confine()?;
            Ok(landlock)
        }
        _ => Ok::<_, BootError>(0),
    })?;
    if let Some(mut share) = devices.share.take() {
        share.open_root().map_err(device("share"))?;
        devices.all.push(Box::new(share));
    }

    let vm = timeline.measure("create vm", || KvmVm::new(config.kvm, config.memory))?;
    let kernel = timeline.measure("load kernel", || {
        kernel::load_kernel(vm.memory(), &mut config.kernel)
    })?;
    let initramfs = timeline.measure("load initramfs", || {
        let file = config.initramfs.as_mut();
        file.map(|file| kernel::load_initramfs(vm.memory(), &kernel, file))
            .transpose()
    })?;
    let (windows, places) =
        timeline.measure("attach devices", || attach(&vm, devices.all, ending))?;
    timeline.measure("write tables", || -> Result<(), BootError> {
        let rsdp = acpi::write_tables(vm.memory(), config.vcpus, &places)?;
        kernel::write_boot_params(vm.memory(), &kernel, initramfs, &config.cmdline, rsdp)?;
        Ok(())
    })?;
    let vcpus = timeline.measure("create vcpus", || {
        vm.create_vcpus(config.vcpus, kernel.entry)
    })?;
    let serial = Serial::new(
        SerialLine(vm.interrupt_line(layout::SERIAL_GSI)?),
        Console::new(config.console, config.console_limit).map_err(start("console"))?,
    );
    let bus = Arc::new(Bus::new(serial, windows, Arc::clone(ending)));
    let vcpus = timeline.measure("start vcpus", || {
        Vcpus::start(vcpus, &bus, ending).map_err(start("vCPU threads"))
    })?;
    let logs = devices.connector.clone().map(|connector| {
        let events = Arc::clone(events);
        LogManager::new(connector, Arc::new(move |event| events.publish(event)))
    });
    Ok(Running {
        pod: Pod::Machine(Machine::new(vm, vcpus, bus, Arc::clone(ending))),
        logs,
        layers: devices.layers,
        landlock,
        connector: devices
            .connector
            .map(|connector| Arc::new(connector) as Arc<dyn Dial>),
    })
}

fn prepare_jail(config: &MachineConfig) -> Result<Option<Jail>, JailError> {
    let share = config.share.as_ref().map(|share| share.root.as_fd());
    config
        .jail
        .as_ref()
        .map(|_| Jail::prepare(share))
        .transpose()
}

struct Devices {
    all: Vec<Box<dyn VirtioDevice>>,
    /// Its root is opened in the jail, and then it is one of all.
    share: Option<Fs>,
    layers: Option<Arc<Layers>>,
    connector: Option<VsockConnector>,
}

/// Makes the devices, in the order in which the guest sees them.
fn create_devices(config: &mut MachineConfig, events: &Arc<Events>) -> Result<Devices, BootError> {
    let mut all: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for disk in config.disks.drain(..) {
        let device = Block::new(disk.file.into(), &disk.serial, disk.read_only)
            .map_err(device(&format!("disk {}", disk.serial)))?;
        all.push(Box::new(device.limited(config.disk_rate)));
    }
    let mut layers = None;
    if let Some(serial) = config.layers.take() {
        let shared = Arc::new(Layers::default());
        let device = Block::of_layers(Arc::clone(&shared), &serial)
            .map_err(device(&format!("disk {serial}")))?;
        all.push(Box::new(device.limited(config.disk_rate)));
        layers = Some(shared);
    }
    for net in config.nets.drain(..) {
        let device = Net::new(net.tap, net.mac, net.mtu).map_err(device("network device"))?;
        all.push(Box::new(device.limited(config.net_rate)));
    }
    let mut connector = None;
    if let Some(vsock) = config.vsock.take() {
        let events = Arc::clone(events);
        let ready = Arc::new(move || events.publish(Event::AgentReady));
        let listener = vsock.listener.map(OwnedFd::from);
        let vsock = Vsock::new(vsock.cid, listener, ready).map_err(device("vsock device"))?;
        connector = Some(vsock.connector());
        all.push(Box::new(vsock));
    }
    all.push(Box::new(Rng::new()));
    // Taking the share closes its descriptor, which would be a way out of the jail.
    let share = config.share.take().map(|share| match config.jail {
        Some(_) => Fs::new(&share.tag, ShareRoot::Pivoted).map_err(device("share")),
        None => Err(BootError::UnjailedShare),
    });
    Ok(Devices {
        all,
        share: share.transpose()?,
        layers,
        connector,
    })
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
