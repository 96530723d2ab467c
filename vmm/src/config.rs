//! The daemon's [`VmConfig`], checked, with the descriptors it names in hand.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use caisson_vmm_protocol::{
    ChannelError, DiskConfig, FdIndex, Frame, GrowthConfig, JailConfig, NetConfig,
    PROTOCOL_VERSION, RateLimit, ShareConfig, TemplateConfig, TemplateRole, VmConfig, VsockConfig,
};

use crate::arch::layout::{self, MemorySize};

/// The most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 32;
/// The least and the most guest memory, in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 64..=1 << 20;
/// The smallest MTU that virtio-net may tell (virtio 1.2 §5.1.4.1).
const MIN_MTU: u16 = 68;
/// The longest virtio-fs tag (virtio 1.2 §5.11.4).
const MAX_TAG: usize = 36;
/// The longest serial of a disk (virtio 1.2 §5.2.6).
const MAX_SERIAL: usize = 20;
/// The longest machine name: as long as any ID that Kubernetes gives.
const MAX_ID: usize = 253;
/// Context IDs below this one are reserved (virtio 1.2 §5.10.4).
const FIRST_GUEST_CID: u32 = 3;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The daemon speaks another version of the protocol.
    #[error(
        "the daemon speaks control protocol {0}, this VMM speaks {PROTOCOL_VERSION}; install both from one release"
    )]
    Version(u32),
    /// A value is out of its range.
    #[error("{field} is {value}, which is not {allowed}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it was.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// There are more devices than windows for them.
    #[error("{0} devices are more than the {max} that a machine has room for", max = layout::VIRTIO_MMIO_COUNT)]
    TooManyDevices(usize),
    /// A descriptor is missing.
    #[error(transparent)]
    Descriptor(#[from] ChannelError),
}

/// A block device.
pub struct Disk {
    /// The serial, 1 to 20 printable ASCII bytes.
    pub serial: String,
    /// The image.
    pub file: File,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// A network device.
pub struct Net {
    /// The tap; a socket in the machine of a template that is made.
    pub tap: OwnedFd,
    /// `/dev/vhost-net`, where the host's kernel is to serve the device.
    pub vhost: Option<OwnedFd>,
    /// The guest's MAC address: unicast, not zero.
    pub mac: [u8; 6],
    /// The MTU that the guest is told.
    pub mtu: u16,
}

/// A virtio-fs share.
pub struct Share {
    /// The tag, 1 to 36 bytes without zero.
    pub tag: String,
    /// The root directory.
    pub root: OwnedFd,
}

/// A vsock device.
pub struct Vsock {
    /// The guest's context ID.
    pub cid: u32,
    /// Where host clients connect.
    pub listener: Option<UnixListener>,
}

/// A layer with its place.
pub struct PlacedLayer {
    /// Its name.
    pub name: String,
    /// Its EROFS image.
    pub file: OwnedFd,
    /// The first byte of its place.
    pub offset: u64,
}

/// A template's files, or those of a machine that was saved.
pub struct Template {
    /// Whether it is made or used.
    pub role: TemplateRole,
    /// Its memory.
    pub memory: File,
    /// Everything else.
    pub state: File,
    /// What the machine grows from, if it does.
    pub growth: Option<GrowthConfig>,
}

/// A machine to build. Every value is within its limits.
pub struct MachineConfig {
    /// The machine's name.
    pub id: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory.
    pub memory: MemorySize,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel.
    pub kernel: File,
    /// The initramfs.
    pub initramfs: Option<File>,
    /// The kernel command line.
    pub cmdline: String,
    /// Where console output goes.
    pub console: File,
    /// The most bytes of console output.
    pub console_limit: u64,
    /// Where later control clients connect.
    pub control_listener: Option<UnixListener>,
    /// What gets the exit reason.
    pub exit_file: Option<File>,
    /// Block devices.
    pub disks: Vec<Disk>,
    /// The serial of the disk of layers, if there is to be one.
    pub layers: Option<String>,
    /// The layers that are there from the start.
    pub placed_layers: Vec<PlacedLayer>,
    /// Network devices.
    pub nets: Vec<Net>,
    /// The most that each disk does.
    pub disk_rate: RateLimit,
    /// The most that each network device does in each direction.
    pub net_rate: RateLimit,
    /// The share.
    pub share: Option<Share>,
    /// The vsock device.
    pub vsock: Option<Vsock>,
    /// Whom to become.
    pub jail: Option<JailConfig>,
    /// The template that this machine is or begins as.
    pub template: Option<Template>,
}

impl MachineConfig {
    /// Checks a configuration and takes the descriptors that came with it.
    ///
    /// # Errors
    /// [`ConfigError`] names the first field that is wrong.
    pub fn new<T>(config: VmConfig, frame: &mut Frame<T>) -> Result<Self, ConfigError> {
        check_name(config.version, &config.id)?;
        range(
            "vcpus",
            config.vcpus,
            (1..=MAX_VCPUS).contains(&config.vcpus),
            "1 to 32",
        )?;
        let memory_ok = MEMORY_MIB.contains(&config.memory_mib);
        range("memory_mib", config.memory_mib, memory_ok, "64 to 1048576")?;
        let growth = config.template.as_ref().and_then(|it| it.growth);
        let size = memory_size(&config, growth)?;
        let count = config.disks.len()
            + usize::from(config.layers.is_some())
            + config.nets.len()
            + usize::from(config.share.is_some())
            + usize::from(config.vsock.is_some())
            + usize::from(growth.is_some())
            + 2;
        check(count <= layout::VIRTIO_MMIO_COUNT, || {
            ConfigError::TooManyDevices(count)
        })?;
        let by_kernel = config.nets.iter().any(|net| net.vhost.is_some());
        range(
            "nets.vhost",
            "beside a limit in net_rate",
            !by_kernel || config.net_rate == RateLimit::default(),
            "possible: the host's kernel keeps to none",
        )?;
        if let Some(jail) = &config.jail {
            check_jail(jail)?;
        }
        if let Some(serial) = &config.layers {
            check_serial("layers", serial)?;
        }
        let mut fds = Fds(frame);
        Ok(Self {
            vcpus: config.vcpus,
            memory: size,
            kvm: fds.take(config.kvm)?,
            kernel: fds.take(config.kernel)?.into(),
            initramfs: fds.optional(config.initramfs)?.map(File::from),
            cmdline: config.cmdline,
            console: fds.take(config.console)?.into(),
            console_limit: config.console_limit,
            control_listener: fds
                .optional(config.control_listener)?
                .map(UnixListener::from),
            exit_file: fds.optional(config.exit_file)?.map(File::from),
            disks: config
                .disks
                .into_iter()
                .map(|disk| fds.disk(disk))
                .collect::<Result<_, _>>()?,
            layers: config.layers,
            placed_layers: config
                .placed_layers
                .into_iter()
                .map(|layer| fds.layer(layer))
                .collect::<Result<_, _>>()?,
            nets: config
                .nets
                .into_iter()
                .map(|net| fds.net(net))
                .collect::<Result<_, _>>()?,
            share: config.share.map(|share| fds.share(share)).transpose()?,
            vsock: config.vsock.map(|vsock| fds.vsock(vsock)).transpose()?,
            disk_rate: config.disk_rate,
            net_rate: config.net_rate,
            jail: config.jail,
            template: config.template.map(|it| fds.template(it)).transpose()?,
            id: config.id,
        })
    }
}

/// What of a machine's memory is there from the start, and what is added.
fn memory_size(config: &VmConfig, growth: Option<GrowthConfig>) -> Result<MemorySize, ConfigError> {
    let all = u64::from(config.memory_mib) << 20;
    let Some(growth) = growth else {
        return Ok(MemorySize {
            first: all,
            added: 0,
        });
    };
    let vcpus = 1..=config.vcpus;
    range(
        "template.growth.vcpus",
        growth.vcpus,
        vcpus.contains(&growth.vcpus),
        "1 to the machine's vcpus",
    )?;
    let most = config.vcpus..=MAX_VCPUS;
    range(
        "template.growth.most_vcpus",
        growth.most_vcpus,
        most.contains(&growth.most_vcpus),
        "the machine's vcpus to 32",
    )?;
    let first = u64::from(growth.memory_mib) << 20;
    let ok = MEMORY_MIB.contains(&growth.memory_mib) && first <= layout::MMIO_HOLE.min(all);
    range(
        "template.growth.memory_mib",
        growth.memory_mib,
        ok,
        "64 to 3072 and to the machine's memory_mib",
    )?;
    let added = all - first;
    let ok = added <= layout::ADDED_MOST && added.is_multiple_of(layout::ADDED_BLOCK);
    range(
        "memory_mib",
        config.memory_mib,
        ok,
        "that of its growth plus a multiple of 4 up to 262144",
    )?;
    // What is made into a template has nothing yet that was added.
    let role = config.template.as_ref().map(|template| template.role);
    let making = role == Some(TemplateRole::Make);
    let grown = added > 0 || growth.vcpus < config.vcpus;
    range(
        "template.growth",
        "less than the machine",
        !(making && grown),
        "all of a template to be made",
    )?;
    Ok(MemorySize { first, added })
}

/// The sender's version and the pod's name.
pub(crate) fn check_name(version: u32, id: &str) -> Result<(), ConfigError> {
    check(version == PROTOCOL_VERSION, || {
        ConfigError::Version(version)
    })?;
    let ok = !id.is_empty() && id.len() <= MAX_ID && id.bytes().all(|b| b.is_ascii_graphic());
    range("id", id, ok, "1 to 253 printable characters")
}

/// Who the process becomes.
pub(crate) fn check_jail(jail: &JailConfig) -> Result<(), ConfigError> {
    range(
        "jail.uid",
        jail.uid,
        is_user(jail.uid),
        "an unprivileged user ID",
    )?;
    range(
        "jail.gid",
        jail.gid,
        is_user(jail.gid),
        "an unprivileged group ID",
    )
}

fn check_serial(field: &'static str, serial: &str) -> Result<(), ConfigError> {
    let ok =
        (1..=MAX_SERIAL).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_graphic());
    range(field, serial, ok, "1 to 20 printable ASCII characters")
}

/// Takes descriptors out of the frame that they came with.
pub(crate) struct Fds<'a, T>(pub &'a mut Frame<T>);

impl<T> Fds<'_, T> {
    pub(crate) fn take(&mut self, index: FdIndex) -> Result<OwnedFd, ConfigError> {
        Ok(self.0.take_fd(index)?)
    }

    pub(crate) fn optional(
        &mut self,
        index: Option<FdIndex>,
    ) -> Result<Option<OwnedFd>, ConfigError> {
        index.map(|index| self.take(index)).transpose()
    }

    fn disk(&mut self, disk: DiskConfig) -> Result<Disk, ConfigError> {
        check_serial("disks.serial", &disk.serial)?;
        Ok(Disk {
            file: self.take(disk.file)?.into(),
            serial: disk.serial,
            read_only: disk.read_only,
        })
    }

    fn layer(
        &mut self,
        layer: caisson_vmm_protocol::PlacedLayer,
    ) -> Result<PlacedLayer, ConfigError> {
        Ok(PlacedLayer {
            file: self.take(layer.file)?,
            name: layer.name,
            offset: layer.offset,
        })
    }

    fn net(&mut self, net: NetConfig) -> Result<Net, ConfigError> {
        range("nets.mtu", net.mtu, net.mtu >= MIN_MTU, "68 to 65535")?;
        let mac = parse_mac(&net.mac).ok_or_else(|| ConfigError::Value {
            field: "nets.mac",
            value: net.mac.clone(),
            allowed: "a unicast MAC address such as 02:00:00:00:00:01",
        })?;
        Ok(Net {
            tap: self.take(net.tap)?,
            vhost: self.optional(net.vhost)?,
            mac,
            mtu: net.mtu,
        })
    }

    fn share(&mut self, share: ShareConfig) -> Result<Share, ConfigError> {
        let ok = (1..=MAX_TAG).contains(&share.tag.len()) && !share.tag.contains('\0');
        range("share.tag", &share.tag, ok, "1 to 36 bytes")?;
        Ok(Share {
            root: self.take(share.root)?,
            tag: share.tag,
        })
    }

    fn template(&mut self, template: TemplateConfig) -> Result<Template, ConfigError> {
        Ok(Template {
            role: template.role,
            memory: self.take(template.memory)?.into(),
            state: self.take(template.state)?.into(),
            growth: template.growth,
        })
    }

    fn vsock(&mut self, vsock: VsockConfig) -> Result<Vsock, ConfigError> {
        let ok = (FIRST_GUEST_CID..u32::MAX).contains(&vsock.cid);
        range("vsock.cid", vsock.cid, ok, "3 to 4294967294")?;
        Ok(Vsock {
            cid: vsock.cid,
            listener: self.optional(vsock.listener)?.map(UnixListener::from),
        })
    }
}

fn check(ok: bool, error: impl FnOnce() -> ConfigError) -> Result<(), ConfigError> {
    if ok { Ok(()) } else { Err(error()) }
}

fn range(
    field: &'static str,
    value: impl ToString,
    ok: bool,
    allowed: &'static str,
) -> Result<(), ConfigError> {
    check(ok, || ConfigError::Value {
        field,
        value: value.to_string(),
        allowed,
    })
}

/// -1 means "leave as it is" to the system calls that change the identity.
fn is_user(id: u32) -> bool {
    id != 0 && id != u32::MAX
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let multicast = mac[0] & 1 != 0;
    (parts.next().is_none() && !multicast && mac != [0; 6]).then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses() {
        assert_eq!(
            parse_mac("02:00:00:ab:CD:01"),
            Some([2, 0, 0, 0xab, 0xcd, 1])
        );
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "zz:00:00:00:00:01",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_a_machine_grows_from_is_within_it() {
        let machine = |vcpus, memory_mib, role, growth| {
            let index = FdIndex(0);
            let config = VmConfig {
                vcpus,
                memory_mib,
                template: Some(TemplateConfig {
                    role,
                    memory: index,
                    state: index,
                    growth: Some(growth),
                }),
                ..VmConfig::bare("pod", index, index, index)
            };
            memory_size(&config, Some(growth)).map_err(|error| error.to_string())
        };
        let (make, clone) = (TemplateRole::Make, TemplateRole::Clone);
        let from = GrowthConfig {
            vcpus: 1,
            memory_mib: 128,
            most_vcpus: 4,
        };
        let size = machine(4, 132, clone, from).unwrap();
        assert_eq!((size.first, size.added), (128 << 20, 4 << 20));
        assert_eq!(machine(1, 128, make, from).unwrap().added, 0);
        let (more, less, none) = (
            GrowthConfig { vcpus: 2, ..from },
            GrowthConfig {
                memory_mib: 32,
                ..from
            },
            GrowthConfig { vcpus: 0, ..from },
        );
        let above = GrowthConfig {
            memory_mib: 3073,
            ..from
        };
        let many = GrowthConfig {
            most_vcpus: 33,
            ..from
        };
        for (vcpus, memory_mib, role, growth, field) in [
            (1, 256, clone, more, "template.growth.vcpus"),
            (1, 256, clone, none, "template.growth.vcpus"),
            (5, 256, clone, from, "template.growth.most_vcpus"),
            (1, 256, clone, many, "template.growth.most_vcpus"),
            (1, 256, clone, less, "template.growth.memory_mib"),
            (1, 124, clone, from, "template.growth.memory_mib"),
            (1, 8192, clone, above, "template.growth.memory_mib"),
            (1, 130, clone, from, "memory_mib is 130"),
            (1, 128 + (256 << 10) + 4, clone, from, "memory_mib is"),
            (2, 128, make, from, "template.growth is"),
            (1, 132, make, from, "template.growth is"),
        ] {
            let error = machine(vcpus, memory_mib, role, growth).unwrap_err();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn ids_that_mean_something_else_are_no_users() {
        assert!(is_user(100_000));
        assert!(!is_user(0));
        assert!(!is_user(u32::MAX));
    }
}
