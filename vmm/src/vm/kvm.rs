//! KVM's side of a machine: the VM, its memory, its interrupt controllers and its eventfds.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MEM_READONLY, kvm_clock_data, kvm_irqchip, kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory;
use crate::arch::cpuid::{Cpuid, CpuidError};
use crate::arch::layout::{self, MemorySize};
use crate::arch::regs::{self, RegsError};
use crate::template::{MachineState, Overlay, Saver, TemplateError, kvm};
use crate::transport::Registers;
use crate::transport::mmio::{HEARD_OF_QUEUES, MmioTransport, QUEUE_NOTIFY};

/// What a machine cannot do without.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "an interrupt controller in the kernel"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::UserMemory, "user memory regions"),
    (Cap::ReadonlyMem, "memory that a guest only reads"),
    (Cap::ImmediateExit, "immediate exit"),
];

/// What is in a machine's memory before anything is put there.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Nothing; the memory is this process's own.
    Nothing,
    /// What a template left in this file, which stays as it is.
    Template(&'a File),
    /// A copy of what a saved machine left in this file.
    Copy(&'a File),
}

/// Why KVM cannot give us a machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The descriptor is not `/dev/kvm`, or of a kernel that speaks another interface.
    #[error("the KVM device speaks API version {0}, not 12; hand over /dev/kvm")]
    Api(i32),
    /// KVM lacks something.
    #[error("this host's KVM has no {0}; use a newer kernel")]
    Missing(&'static str),
    /// An ioctl failed.
    #[error("KVM refused to {what}: {source}")]
    Ioctl {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// The guest's memory cannot be mapped.
    #[error("{mib} MiB of guest memory cannot be mapped: {source}")]
    Memory {
        /// The size.
        mib: u64,
        /// What the system said.
        source: io::Error,
    },
    /// An eventfd could not be made.
    #[error("no eventfd could be made: {0}")]
    Event(#[from] io::Error),
    /// A vCPU's registers.
    #[error(transparent)]
    Regs(#[from] RegsError),
    /// The vCPUs' CPUID.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
}

/// Why the vCPUs of a clone cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// As of any machine.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// They cannot have their state.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Ioctl { what, source }
}

/// A VM with memory and interrupt controllers.
pub struct KvmVm {
    // Dropped in this order: the VM before the memory that it maps.
    vm: VmFd,
    kvm: Kvm,
    memory: GuestMemoryMmap,
    /// The windows that the guest reads by itself, behind `memory` in KVM's slots.
    windows: Vec<Arc<Registers>>,
}

impl KvmVm {
    /// Makes a VM with so much memory.
    ///
    /// # Errors
    /// [`KvmError`] says what KVM lacks or refused.
    pub fn new(device: OwnedFd, size: MemorySize, content: Content<'_>) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is ours and is given away; nobody else closes it.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::Api(version));
        }
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Missing(name));
            }
        }
        let vm = create(&kvm)?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(ioctl("set the identity map's address"))?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(ioctl("set the task state segment's address"))?;
        vm.create_irq_chip()
            .map_err(ioctl("make interrupt controllers"))?;
        let memory = map(&vm, size, content)?;
        Ok(Self {
            vm,
            kvm,
            memory,
            windows: Vec::new(),
        })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// An event that raises this interrupt line.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn interrupt_line(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let line = EventFd::new(EFD_NONBLOCK)?;
        self.vm
            .register_irqfd(&line, gsi)
            .map_err(ioctl("connect an interrupt line"))?;
        Ok(line)
    }

    /// Lets the guest read a window, the driver's notifications reach the device, and what need not reach it go nowhere,
    /// all without an exit to this process.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn connect(&mut self, transport: &MmioTransport, window: u64) -> Result<(), KvmError> {
        let registers = transport.registers();
        let region = kvm_userspace_memory_region {
            slot: (self.memory.num_regions() + self.windows.len()) as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: window,
            memory_size: layout::VIRTIO_MMIO_SIZE,
            userspace_addr: registers.address(),
        };
        // SAFETY: the page is ours, has this length, and lives as long as the VM: see `KvmVm`.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(ioctl("let the guest read a device's registers"))?;
        self.windows.push(Arc::clone(registers));
        let at = IoEventAddress::Mmio(window + QUEUE_NOTIFY);
        for (index, event) in transport.notify_events().enumerate() {
            self.vm
                .register_ioevent(event, &at, index as u32)
                .map_err(ioctl("connect a queue's notification"))?;
        }
        // Nobody waits for this event.
        let (register, value) = HEARD_OF_QUEUES;
        let at = IoEventAddress::Mmio(window + register);
        self.vm
            .register_ioevent(&EventFd::new(EFD_NONBLOCK)?, &at, value)
            .map_err(ioctl("connect a driver's acknowledgement"))
    }

    /// Makes the vCPUs, of which the guest is told that there may be `most`. The first one will begin at `entry`, the others
    /// wait to be woken by it.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn create_vcpus(
        &self,
        count: u8,
        most: u8,
        entry: GuestAddress,
    ) -> Result<Vec<VcpuFd>, KvmError> {
        let cpuid = Cpuid::new(&self.kvm, most)?;
        regs::write_boot_tables(&self.memory)?;
        (0..count)
            .map(|id| {
                let vcpu = self.create_vcpu(id, &cpuid)?;
                set_features(&vcpu, &cpuid)?;
                regs::set_up(&vcpu, (id == 0).then_some(entry))?;
                Ok(vcpu)
            })
            .collect()
    }

    fn create_vcpu(&self, id: u8, cpuid: &Cpuid) -> Result<VcpuFd, KvmError> {
        let vcpu = self
            .vm
            .create_vcpu(id.into())
            .map_err(ioctl("make a vCPU"))?;
        vcpu.set_cpuid2(&cpuid.for_vcpu(id)?)
            .map_err(ioctl("take a vCPU's CPUID"))?;
        Ok(vcpu)
    }

    /// Makes the vCPUs of a clone, which go on where its template's were, and what they share of KVM. Those that the template
    /// did not have wait to be woken. `most` is as it was.
    ///
    /// # Errors
    /// [`KvmError`] and [`TemplateError`].
    pub fn restore_vcpus(
        &self,
        state: &MachineState,
        count: u8,
        most: u8,
    ) -> Result<Vec<VcpuFd>, RestoreError> {
        let cpuid = Cpuid::new(&self.kvm, most).map_err(KvmError::from)?;
        let vcpus = (0..count)
            .map(|id| self.create_vcpu(id, &cpuid))
            .collect::<Result<Vec<_>, _>>()?;
        for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
            state.put(vcpu)?;
        }
        for vcpu in vcpus.iter().skip(state.vcpus.len()) {
            set_features(vcpu, &cpuid)?;
            regs::set_up(vcpu, None).map_err(KvmError::from)?;
            // KVM then counts it among those whose time stamp counters agree, and the guest's clock is one for all.
            if let Some(first) = state.vcpus.first() {
                first.put_time(vcpu)?;
            }
        }
        for chip in &state.chips {
            self.vm
                .set_irqchip(chip)
                .map_err(kvm("take an interrupt controller's state"))?;
        }
        // What KVM says with the time, such as when it was read, it does not take.
        let clock = kvm_clock_data {
            clock: state.clock.clock,
            ..Default::default()
        };
        self.vm.set_clock(&clock).map_err(kvm("set the clock"))?;
        Ok(vcpus)
    }

    /// What can read these vCPUs when they are parked.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn saver(&self, vcpus: &[VcpuFd]) -> Result<Saver, TemplateError> {
        let copies = vcpus.iter().map(|vcpu| {
            // SAFETY: the descriptor is open: it is that of a vCPU which is borrowed.
            let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
            let copy = fd.try_clone_to_owned().map_err(kvm_ioctls::Error::from)?;
            // SAFETY: the copy is a vCPU's of this VM, and is given away.
            unsafe { self.vm.create_vcpu_from_rawfd(copy.into_raw_fd()) }
        });
        let copies: Result<_, _> = copies.collect();
        Saver::new(&self.kvm, copies.map_err(kvm("share a vCPU"))?)
    }

    /// The interrupt controllers and the clock. The vCPUs and devices are parked.
    ///
    /// # Errors
    /// [`TemplateError::Kvm`].
    pub fn save(&self) -> Result<(Vec<kvm_irqchip>, kvm_clock_data), TemplateError> {
        let chips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        let chips = chips
            .into_iter()
            .map(|chip_id| {
                let mut chip = kvm_irqchip {
                    chip_id,
                    ..Default::default()
                };
                self.vm
                    .get_irqchip(&mut chip)
                    .map_err(kvm("tell an interrupt controller's state"))?;
                Ok(chip)
            })
            .collect::<Result<_, _>>()?;
        let clock = self.vm.get_clock().map_err(kvm("tell the clock"))?;
        Ok((chips, clock))
    }
}

/// Turns all extended states on. A processor comes out of reset with x87 alone; but where XSETBV is not
/// intercepted (KVM on an emulated processor), KVM would go on telling the guest the size of that.
fn set_features(vcpu: &VcpuFd, cpuid: &Cpuid) -> Result<(), KvmError> {
    let Some(xcr0) = cpuid.extended_states() else {
        return Ok(());
    };
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = xcr0;
    vcpu.set_xcrs(&xcrs)
        .map_err(ioctl("turn a vCPU's extended states on"))
}

fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            // A signal in the middle of it; Linux says try again.
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(ioctl("make a VM")),
        }
    }
}

fn map(vm: &VmFd, size: MemorySize, content: Content<'_>) -> Result<GuestMemoryMmap, KvmError> {
    let ranges = size.ranges();
    let memory = match content {
        Content::Nothing => memory::map(&ranges),
        Content::Template(file) => memory::map(&ranges).and_then(|memory| {
            // What is added to a clone its template did not have.
            Overlay::new(file, size.first)?.lay(&memory)?;
            Ok(memory)
        }),
        Content::Copy(file) => memory::map(&ranges).and_then(|memory| {
            Overlay::new(file, size.all())?.fill(&memory)?;
            Ok(memory)
        }),
    };
    let memory = memory.map_err(|source| KvmError::Memory {
        mib: size.all() >> 20,
        source,
    })?;
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is ours, has this length, and lives as long as the VM: see `KvmVm`.
        unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("take the guest's memory"))?;
    }
    Ok(memory)
}
