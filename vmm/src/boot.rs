//! From a checked configuration to a running machine.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use caisson_vmm_protocol::{Event, TemplateRole};
use kvm_ioctls::VcpuFd;
use vm_superio::Serial;
use vm_superio::serial::NoEvents;

use crate::arch::acpi::{self, AcpiError, MmioDevice};
use crate::arch::kernel::{self, KernelError};
use crate::arch::layout;
use crate::config::{MachineConfig, Template};
use crate::control::Events;
use crate::jail::{Jail, JailError};
use crate::logs::{Dial, LogManager};
use crate::pod::{Pod, Running};
use crate::template::{Image, MachineState, Making, TemplateError};
use crate::threads::{self, ConfineError};
use crate::timeline::Timeline;
use crate::transport::mmio::MmioTransport;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Block, Layers};
use crate::virtio::fs::{Fs, ShareRoot};
use crate::virtio::mem::Mem;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Knock, Vsock, VsockConnector};
use crate::virtio::{Memory, VirtioDevice};
use crate::vm::{
    Bus, Console, Content, Ending, KvmError, KvmVm, Machine, RestoreError, SerialLine, Vcpus,
};

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The vCPUs of a clone.
    #[error(transparent)]
    Restore(#[from] RestoreError),
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

/// Builds the machine and starts its vCPUs. Where it is to be a template, what makes that of it comes back, too.
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
) -> Result<(Running, Option<Making>), BootError> {
    let jail = timeline.measure("prepare jail", || prepare_jail(&config))?;
    let (tell, settled) = channel();
    let mut devices = timeline.measure("create devices", || {
        create_devices(&mut config, events, tell)
    })?;
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

    let template = config.template.take();
    let growth = template.as_ref().and_then(|template| template.growth);
    let most_vcpus = growth.map_or(config.vcpus, |growth| growth.most_vcpus);
    let mut vm = timeline.measure("create vm", || {
        let content = template.as_ref().map_or(Content::Nothing, content);
        KvmVm::new(config.kvm, config.memory, content)
    })?;
    let (mut windows, places) =
        timeline.measure("attach devices", || attach(&mut vm, devices.all, ending))?;
    let console = Console::new(config.console, config.console_limit).map_err(start("console"))?;
    let line = SerialLine(vm.interrupt_line(layout::SERIAL_GSI)?);
    let (vcpus, serial) = match &template {
        Some(template) if template.role != TemplateRole::Make => {
            let state = timeline.measure("read template", || {
                let saved = saved_vcpus(template, config.vcpus);
                MachineState::read(&template.state, saved.into(), windows.len())
            })?;
            let vcpus = timeline.measure("restore vcpus", || {
                vm.restore_vcpus(&state, config.vcpus, most_vcpus)
            })?;
            timeline.measure("restore devices", || restore(&mut windows, &state))?;
            let serial = Serial::from_state(&state.serial.0, line, NoEvents, console)
                .map_err(|error| TemplateError::State(format!("{error:?}")))?;
            // Its agent listened before it was written down.
            events.publish(Event::AgentReady);
            (vcpus, serial)
        }
        _ => {
            let vcpus = load(
                &vm,
                &mut config.kernel,
                config.initramfs.as_mut(),
                &Start {
                    cmdline: &config.cmdline,
                    vcpus: config.vcpus,
                    most_vcpus,
                    devices: &places,
                },
                timeline,
            )?;
            (vcpus, Serial::new(line, console))
        }
    };
    let making = match template {
        Some(template) if template.role == TemplateRole::Make => {
            let image = Image::new(vm.memory(), &template.memory).map_err(start("template"))?;
            Some(Making::new(image, template.state, settled))
        }
        _ => None,
    };
    let saver = vm.saver(&vcpus)?;
    let bus = Arc::new(Bus::new(serial, windows, Arc::clone(ending)));
    let vcpus = timeline.measure("start vcpus", || {
        Vcpus::start(vcpus, &bus, ending).map_err(start("vCPU threads"))
    })?;
    let logs = devices.connector.clone().map(|connector| {
        let events = Arc::clone(events);
        LogManager::new(connector, Arc::new(move |event| events.publish(event)))
    });
    let running = Running {
        pod: Pod::Machine(Machine::new(
            vm,
            vcpus,
            bus,
            Arc::clone(ending),
            saver,
            growth,
        )),
        logs,
        layers: devices.layers,
        landlock,
        connector: devices
            .connector
            .map(|connector| Arc::new(connector) as Arc<dyn Dial>),
    };
    Ok((running, making))
}

fn content(template: &Template) -> Content<'_> {
    match template.role {
        TemplateRole::Make => Content::Nothing,
        TemplateRole::Clone => Content::Template(&template.memory),
        TemplateRole::Restore => Content::Copy(&template.memory),
    }
}

/// The vCPUs in the state of a machine that is to have so many: a clone can have more than its template.
fn saved_vcpus(template: &Template, vcpus: u8) -> u8 {
    match (template.role, template.growth) {
        (TemplateRole::Clone, Some(growth)) => growth.vcpus,
        _ => vcpus,
    }
}

/// What a kernel is started with.
struct Start<'a> {
    cmdline: &'a str,
    vcpus: u8,
    /// Those that the kernel is told of.
    most_vcpus: u8,
    devices: &'a [MmioDevice],
}

/// Loads the kernel and all that it reads at its start. The vCPUs begin there.
fn load(
    vm: &KvmVm,
    kernel: &mut File,
    initramfs: Option<&mut File>,
    start: &Start<'_>,
    timeline: &mut Timeline,
) -> Result<Vec<VcpuFd>, BootError> {
    let kernel = timeline.measure("load kernel", || kernel::load_kernel(vm.memory(), kernel))?;
    let initramfs = timeline.measure("load initramfs", || {
        initramfs
            .map(|file| kernel::load_initramfs(vm.memory(), &kernel, file))
            .transpose()
    })?;
    timeline.measure("write tables", || -> Result<(), BootError> {
        let rsdp = acpi::write_tables(vm.memory(), start.most_vcpus, start.devices)?;
        kernel::write_boot_params(vm.memory(), &kernel, initramfs, start.cmdline, rsdp)?;
        Ok(())
    })?;
    let vcpus = timeline.measure("create vcpus", || {
        vm.create_vcpus(start.vcpus, start.most_vcpus, kernel.entry)
    })?;
    Ok(vcpus)
}

/// Lets the devices go on where the template's were.
fn restore(windows: &mut [MmioTransport], state: &MachineState) -> Result<(), TemplateError> {
    for (window, state) in windows.iter_mut().zip(&state.windows) {
        window.restore(state).map_err(TemplateError::State)?;
    }
    Ok(())
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
fn create_devices(
    config: &mut MachineConfig,
    events: &Arc<Events>,
    settled: Sender<()>,
) -> Result<Devices, BootError> {
    let mut all: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for disk in config.disks.drain(..) {
        let device = Block::new(disk.file.into(), &disk.serial, disk.read_only)
            .map_err(device(&format!("disk {}", disk.serial)))?;
        all.push(Box::new(device.limited(config.disk_rate)));
    }
    let mut layers = None;
    if let Some(serial) = config.layers.take() {
        let shared = Arc::new(Layers::default());
        for layer in config.placed_layers.drain(..) {
            // Before the guest runs, which knows where they are and may be reading.
            shared
                .put(&layer.name, layer.file, layer.offset)
                .map_err(device(&format!("disk {serial}")))?;
        }
        let device = Block::of_layers(Arc::clone(&shared), &serial)
            .map_err(device(&format!("disk {serial}")))?;
        all.push(Box::new(device.limited(config.disk_rate)));
        layers = Some(shared);
    }
    for net in config.nets.drain(..) {
        let made = match &config.template {
            Some(template) if template.role == TemplateRole::Make => {
                Net::unplugged(net.tap, net.mac, net.mtu)
            }
            _ => match net.vhost {
                Some(vhost) => Net::by_kernel(net.tap, vhost, net.mac, net.mtu),
                None => Net::new(net.tap, net.mac, net.mtu),
            },
        };
        let device = made.map_err(device("network device"))?;
        all.push(Box::new(device.limited(config.net_rate)));
    }
    let mut connector = None;
    if let Some(vsock) = config.vsock.take() {
        let events = Arc::clone(events);
        let knocked = Arc::new(move |knock| match knock {
            Knock::Ready => events.publish(Event::AgentReady),
            // Only who makes a template waits for it.
            Knock::Settled => drop(settled.send(())),
        });
        let listener = vsock.listener.map(OwnedFd::from);
        let restored =
            matches!(&config.template, Some(template) if template.role == TemplateRole::Restore);
        let mut vsock = Vsock::new(vsock.cid, listener, knocked).map_err(device("vsock device"))?;
        if restored {
            vsock.begin_anew();
        }
        connector = Some(vsock.connector());
        all.push(Box::new(vsock));
    }
    all.push(Box::new(Rng::new()));
    all.push(Box::new(Balloon::new()));
    if let Some(template) = &config.template
        && template.growth.is_some()
    {
        // What a machine had that is restored it has in use.
        let plugged = template.role == TemplateRole::Restore;
        all.push(Box::new(Mem::new(config.memory.added, plugged)));
    }
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
    vm: &mut KvmVm,
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
        vm.connect(&transport, place.address)?;
        windows.push(transport);
        places.push(place);
    }
    Ok((windows, places))
}
