//! The ACPI tables (ACPI 6.5): a hardware-reduced machine whose devices are all in the DSDT.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;

const OEM: [u8; 6] = *b"CAISSN";
const OEM_TABLE: [u8; 8] = *b"CAISSNVM";
const OEM_REVISION: u32 = 1;
/// IAPC_BOOT_ARCH (ACPI 6.5 §5.2.9.3): there is no VGA and no CMOS clock.
const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;
/// The type that the guest writes to the sleep control register for S5.
pub const S5_TYPE: u8 = 5;

/// A virtio-mmio device that the DSDT declares.
#[derive(Clone, Copy, Debug)]
pub struct MmioDevice {
    /// Its window's address.
    pub address: u64,
    /// Its interrupt line.
    pub gsi: u32,
}

/// The tables do not fit where they belong.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables of {0} bytes do not fit below 1 MiB; give the pod fewer devices")]
pub struct AcpiError(usize);

/// Writes all tables and returns the address of the root pointer (RSDP). `vcpus` are all that there may ever be: a kernel that
/// is to begin with fewer is told so by its command line.
///
/// # Errors
/// [`AcpiError`] if there are more devices than the tables have room for.
pub fn write_tables(
    memory: &GuestMemoryMmap,
    vcpus: u8,
    devices: &[MmioDevice],
) -> Result<GuestAddress, AcpiError> {
    let mut image = vec![0; Rsdp::len().next_multiple_of(16)];
    let place = |image: &mut Vec<u8>, table: &[u8]| {
        let address = layout::ACPI_TABLES.raw_value() + image.len() as u64;
        image.extend_from_slice(table);
        image.resize(image.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(&mut image, dsdt(devices).as_slice());
    let fadt = place(&mut image, &bytes(&fadt(dsdt)));
    let madt = place(&mut image, &bytes(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&mut image, &bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    image[..rsdp.len()].copy_from_slice(&rsdp);

    let room = layout::HIGH_RAM.unchecked_offset_from(layout::ACPI_TABLES);
    if image.len() as u64 > room {
        return Err(AcpiError(image.len()));
    }
    memory
        .write_slice(&image, layout::ACPI_TABLES)
        .map_err(|_| AcpiError(image.len()))?;
    Ok(layout::ACPI_TABLES)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address.into(),
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"CAISSON\0").into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, controller);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, layout::IOAPIC, 0));
    madt
}

fn dsdt(devices: &[MmioDevice]) -> Sdt {
    let mut body = Vec::new();
    let (s5, zero) = (S5_TYPE, aml::ZERO);
    Name::new("_S5_".into(), &Package::new(vec![&s5, &zero])).to_aml_bytes(&mut body);

    let mut children = Vec::new();
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(
                        layout::SERIAL_PORT,
                        layout::SERIAL_PORT,
                        0,
                        layout::SERIAL_PORTS as u8,
                    ),
                    &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut children);
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(
                    layout::PVPANIC_PORT,
                    layout::PVPANIC_PORT,
                    1,
                    1,
                )]),
            ),
        ],
    )
    .to_aml_bytes(&mut children);
    for (index, device) in devices.iter().enumerate() {
        virtio_mmio(index, device, &mut children);
    }
    body.extend(Scope::raw("_SB_".into(), children));

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// A virtio-mmio device as Linux's `virtio_mmio` driver finds it.
fn virtio_mmio(index: usize, device: &MmioDevice, out: &mut Vec<u8>) {
    let name = format!("V{index:03X}");
    // The windows are all below 4 GiB, see `layout`.
    let address = device.address as u32;
    Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, address, layout::VIRTIO_MMIO_SIZE as u32),
                    &Interrupt::new(true, true, false, true, device.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    fn read(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
        let mut table = vec![0; length];
        memory
            .read_slice(&mut table, GuestAddress(address))
            .unwrap();
        table
    }

    fn table(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
        let head = read(memory, address, 36);
        let length = u32::from_le_bytes(head[4..8].try_into().unwrap());
        read(memory, address, length as usize)
    }

    fn sum(table: &[u8]) -> u8 {
        table.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reachable_and_its_checksum_is_right() {
        let memory = memory();
        let devices: Vec<_> = (0..layout::VIRTIO_MMIO_COUNT)
            .map(|window| MmioDevice {
                address: layout::device_address(window),
                gsi: layout::device_gsi(window),
            })
            .collect();
        let rsdp = write_tables(&memory, 32, &devices).unwrap();
        let rsdp = read(&memory, rsdp.raw_value(), 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(
            &memory,
            u64::from_le_bytes(rsdp[24..32].try_into().unwrap()),
        );
        assert_eq!((&xsdt[..4], sum(&xsdt)), (b"XSDT".as_slice(), 0));
        let mut seen = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&table), 0);
            seen.push(String::from_utf8(table[..4].to_vec()).unwrap());
        }
        assert_eq!(seen, ["FACP", "APIC"]);
    }

    #[test]
    fn too_many_devices_are_an_error() {
        let device = MmioDevice {
            address: layout::VIRTIO_MMIO,
            gsi: 5,
        };
        assert!(write_tables(&memory(), 1, &vec![device; 4000]).is_err());
    }
}
