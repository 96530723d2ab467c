//! A `SetupSandboxRequest`, checked. Nothing of the guest is touched before the whole request is sound.

use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use caisson_proto::agent::{self, SetupSandboxRequest};

use super::{Cidr, SandboxError, sysctl};
use crate::disks::SERIAL_MAX;
use crate::engine::spec::IdMapping;

const INTERFACES_MAX: usize = 32;
const ADDRESSES_MAX: usize = 64;
const ROUTES_MAX: usize = 4096;
const MOUNTS_MAX: usize = 64;
const SYSCTLS_MAX: usize = 256;
const DNS_MAX: usize = 64;
const ENTROPY_MAX: usize = 512;
/// As many as the guest's kernel can have.
const VCPUS: std::ops::RangeInclusive<u32> = 1..=64;
const ADDED_MAX: u64 = 1 << 40;
/// virtio 1.2 §5.11.4: a tag is a field of 36 bytes.
const TAG_MAX: usize = 36;

/// What to make of the guest.
#[derive(Debug, Default)]
pub struct Plan {
    /// Empty: leave it.
    pub hostname: String,
    /// Name servers, in order.
    pub dns_servers: Vec<IpAddr>,
    /// Search domains.
    pub dns_searches: Vec<String>,
    /// Resolver options, such as `ndots:5`.
    pub dns_options: Vec<String>,
    /// Network devices by MAC.
    pub interfaces: Vec<Interface>,
    /// Routes, in order.
    pub routes: Vec<Route>,
    /// Virtio-fs mounts.
    pub shared_mounts: Vec<SharedMount>,
    /// Where writable layers go.
    pub scratch: Scratch,
    /// (path below `/proc/sys`, value).
    pub sysctls: Vec<(PathBuf, String)>,
    /// Nanoseconds since 1970.
    pub unix_time_ns: Option<i64>,
    /// For the kernel's pool.
    pub entropy: Vec<u8>,
    /// Whether containers can share a PID namespace.
    pub shared_pid_namespace: bool,
    /// The IDs of the pod's user namespace; `None`: it has none.
    pub user_ids: Option<UserIds>,
    /// What the guest has more than when it booted; `None`: nothing.
    pub growth: Option<Growth>,
}

/// What a guest has that its kernel did not boot with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Growth {
    /// All CPUs that are to run.
    pub vcpus: u32,
    /// Bytes of memory, beside those of the boot.
    pub added_bytes: u64,
}

/// The IDs of a pod's user namespace.
#[derive(Clone, Copy, Debug, Default)]
pub struct UserIds {
    /// Of users.
    pub uids: IdMapping,
    /// Of groups.
    pub gids: IdMapping,
}

/// A network device.
#[derive(Debug)]
pub struct Interface {
    /// Which one: the MAC that it has.
    pub current_mac: [u8; 6],
    /// The MAC that it is to have.
    pub mac: [u8; 6],
    /// Its name in the pod.
    pub name: String,
    /// `None`: leave it.
    pub mtu: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<Cidr>,
}

/// A route.
#[derive(Debug)]
pub struct Route {
    /// A prefix of length 0 is the default route.
    pub destination: Cidr,
    /// `None`: on link.
    pub gateway: Option<IpAddr>,
    /// The interface's name.
    pub device: String,
    /// Metric; `None`: the kernel's choice.
    pub priority: Option<u32>,
    /// `None`: the device's.
    pub mtu: Option<u32>,
}

/// A virtio-fs mount.
#[derive(Debug)]
pub struct SharedMount {
    /// The device's tag.
    pub tag: String,
    /// Mount point.
    pub path: PathBuf,
    /// Mount read-only.
    pub read_only: bool,
}

/// Where writable layers go.
#[derive(Debug)]
pub enum Scratch {
    /// An ext4 file system on the virtio-blk device with this serial.
    Disk(String),
    /// The guest's memory, at most so many bytes; 0 is half of it.
    Tmpfs(u64),
}

impl Default for Scratch {
    fn default() -> Self {
        Self::Tmpfs(0)
    }
}

impl TryFrom<SetupSandboxRequest> for Plan {
    type Error = SandboxError;

    fn try_from(request: SetupSandboxRequest) -> Result<Self, SandboxError> {
        bounded(
            "dns",
            request.dns_servers.len() + request.dns_searches.len() + request.dns_options.len(),
            DNS_MAX,
        )?;
        bounded("interfaces", request.interfaces.len(), INTERFACES_MAX)?;
        bounded("routes", request.routes.len(), ROUTES_MAX)?;
        bounded("shared_mounts", request.shared_mounts.len(), MOUNTS_MAX)?;
        bounded("sysctls", request.sysctls.len(), SYSCTLS_MAX)?;
        bounded("entropy", request.entropy.len(), ENTROPY_MAX)?;
        if request.unix_time_ns < 0 {
            return Err(SandboxError::invalid("unix_time_ns", "is before 1970"));
        }
        let mut sysctls = Vec::new();
        for (key, value) in request.sysctls {
            let path = sysctl::path(&key).ok_or_else(|| {
                SandboxError::invalid("sysctls", format!("{key:?} is not the name of a sysctl"))
            })?;
            if value.len() > 4096 || value.contains(['\0', '\n']) {
                return Err(SandboxError::invalid(
                    "sysctls",
                    format!("the value of {key} is not one line of at most 4096 bytes"),
                ));
            }
            sysctls.push((path, value));
        }
        // A map has no order; net.ipv4.conf.all must come before what refines it.
        sysctls.sort();
        Ok(Self {
            hostname: hostname(request.hostname)?,
            dns_servers: request
                .dns_servers
                .iter()
                .map(|server| {
                    server.parse().map_err(|_| {
                        SandboxError::invalid(
                            "dns_servers",
                            format!("{server:?} is not an IP address"),
                        )
                    })
                })
                .collect::<Result<_, _>>()?,
            dns_searches: words("dns_searches", request.dns_searches)?,
            dns_options: words("dns_options", request.dns_options)?,
            interfaces: interfaces(request.interfaces)?,
            routes: request
                .routes
                .into_iter()
                .map(route)
                .collect::<Result<_, _>>()?,
            shared_mounts: request
                .shared_mounts
                .into_iter()
                .map(shared_mount)
                .collect::<Result<_, _>>()?,
            scratch: scratch(request.scratch.unwrap_or_default())?,
            sysctls,
            unix_time_ns: (request.unix_time_ns != 0).then_some(request.unix_time_ns),
            entropy: request.entropy,
            shared_pid_namespace: request.shared_pid_namespace,
            user_ids: request.user_namespace.map(user_ids).transpose()?,
            growth: request.growth.map(growth).transpose()?,
        })
    }
}

fn growth(growth: agent::Growth) -> Result<Growth, SandboxError> {
    let agent::Growth { vcpus, added_bytes } = growth;
    if !VCPUS.contains(&vcpus) || added_bytes > ADDED_MAX {
        return Err(SandboxError::invalid(
            "growth",
            format!(
                "{vcpus} CPUs and {added_bytes} bytes more are not 1 to 64 CPUs and at most 2^40 bytes"
            ),
        ));
    }
    Ok(Growth { vcpus, added_bytes })
}

fn bounded(field: &'static str, count: usize, max: usize) -> Result<(), SandboxError> {
    if count > max {
        return Err(SandboxError::invalid(
            field,
            format!("has {count} entries, at most {max} are taken"),
        ));
    }
    Ok(())
}

fn hostname(name: String) -> Result<String, SandboxError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if name.len() > 64 || !name.bytes().all(allowed) {
        return Err(SandboxError::invalid(
            "hostname",
            format!("{name:?} is not a host name of at most 64 characters"),
        ));
    }
    Ok(name)
}

/// Entries of resolv.conf: one word each, so that none can add a line.
fn words(field: &'static str, words: Vec<String>) -> Result<Vec<String>, SandboxError> {
    for word in &words {
        if word.is_empty() || word.len() > 255 || !word.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(SandboxError::invalid(
                field,
                format!("{word:?} is not one word of at most 255 characters"),
            ));
        }
    }
    Ok(words)
}

fn interface_name(field: &'static str, name: &str) -> Result<(), SandboxError> {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    if name.is_empty()
        || name.len() > 15
        || matches!(name, "." | ".." | "lo")
        || !name.bytes().all(allowed)
    {
        return Err(SandboxError::invalid(
            field,
            format!("{name:?} is not an interface name of 1 to 15 characters"),
        ));
    }
    Ok(())
}

fn mtu(field: &'static str, mtu: u32) -> Result<Option<u32>, SandboxError> {
    match mtu {
        0 => Ok(None),
        68..=65535 => Ok(Some(mtu)),
        _ => Err(SandboxError::invalid(
            field,
            format!("MTU {mtu} is not between 68 and 65535"),
        )),
    }
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn interfaces(
    requested: Vec<caisson_proto::agent::Interface>,
) -> Result<Vec<Interface>, SandboxError> {
    let mut interfaces: Vec<Interface> = Vec::new();
    for requested in requested {
        let parsed = |text: &str| {
            mac(text).ok_or_else(|| {
                SandboxError::invalid("interfaces", format!("{text:?} is not a MAC address"))
            })
        };
        let mac = parsed(&requested.mac)?;
        let current_mac = match requested.current_mac.as_str() {
            "" => mac,
            current => parsed(current)?,
        };
        interface_name("interfaces", &requested.name)?;
        bounded("interfaces", requested.addresses.len(), ADDRESSES_MAX)?;
        if interfaces.iter().any(|other| {
            other.mac == mac || other.current_mac == current_mac || other.name == requested.name
        }) {
            return Err(SandboxError::invalid(
                "interfaces",
                format!("{} or its MAC is there twice", requested.name),
            ));
        }
        let addresses = requested
            .addresses
            .iter()
            .map(|address| Cidr::parse(address));
        interfaces.push(Interface {
            current_mac,
            mac,
            mtu: mtu("interfaces", requested.mtu)?,
            addresses: addresses
                .collect::<Result<_, _>>()
                .map_err(|reason| SandboxError::invalid("interfaces", reason))?,
            name: requested.name,
        });
    }
    Ok(interfaces)
}

fn route(route: caisson_proto::agent::Route) -> Result<Route, SandboxError> {
    let invalid = |reason| SandboxError::invalid("routes", reason);
    let destination = Cidr::parse(&route.destination).map_err(invalid)?;
    let gateway = match route.gateway.as_str() {
        "" => None,
        gateway => Some(
            gateway
                .parse::<IpAddr>()
                .map_err(|_| invalid(format!("gateway {gateway:?} is not an IP address")))?,
        ),
    };
    if gateway.is_some_and(|gateway| gateway.is_ipv4() != destination.address.is_ipv4()) {
        return Err(invalid(format!(
            "{} and its gateway are of two families",
            route.destination
        )));
    }
    if route.device != "lo" {
        interface_name("routes", &route.device)?;
    }
    Ok(Route {
        destination,
        gateway,
        device: route.device,
        priority: (route.priority != 0).then_some(route.priority),
        mtu: mtu("routes", route.mtu)?,
    })
}

fn user_ids(namespace: caisson_proto::agent::UserNamespace) -> Result<UserIds, SandboxError> {
    let range = |range: Option<caisson_proto::agent::IdRange>| {
        let range = range.unwrap_or_default();
        // The last ID of all means none.
        let end = range.first.checked_add(range.length);
        if range.length == 0 || end.is_none() {
            return Err(SandboxError::invalid(
                "user_namespace",
                format!(
                    "{} IDs from {} on are no range of IDs",
                    range.length, range.first
                ),
            ));
        }
        Ok(IdMapping {
            container_id: 0,
            host_id: range.first,
            size: range.length,
        })
    };
    Ok(UserIds {
        uids: range(namespace.uids)?,
        gids: range(namespace.gids)?,
    })
}

fn shared_mount(mount: caisson_proto::agent::SharedMount) -> Result<SharedMount, SandboxError> {
    let invalid = |reason| SandboxError::invalid("shared_mounts", reason);
    if mount.tag.is_empty()
        || mount.tag.len() > TAG_MAX
        || !mount.tag.bytes().all(|byte| byte.is_ascii_graphic())
    {
        return Err(invalid(format!(
            "{:?} is not a tag of 1 to {TAG_MAX} characters",
            mount.tag
        )));
    }
    let path = Path::new(&mount.path);
    // Below one of these only, so that a mount cannot hide what the agent itself needs.
    let allowed = ["/run/caisson", "/mnt"]
        .iter()
        .any(|base| path.starts_with(base) && path != Path::new(base));
    let plain = path
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !allowed || !plain || mount.path.len() > 1024 || mount.path.contains('\0') {
        return Err(invalid(format!(
            "{:?} is not a path below /run/caisson or /mnt",
            mount.path
        )));
    }
    Ok(SharedMount {
        tag: mount.tag,
        path: path.components().collect(),
        read_only: mount.read_only,
    })
}

fn scratch(scratch: caisson_proto::agent::Scratch) -> Result<Scratch, SandboxError> {
    let serial = scratch.disk_serial;
    if serial.is_empty() {
        return Ok(Scratch::Tmpfs(scratch.tmpfs_size_bytes));
    }
    if serial.len() > SERIAL_MAX || !serial.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(SandboxError::invalid(
            "scratch",
            format!("{serial:?} is not a serial of at most {SERIAL_MAX} characters"),
        ));
    }
    Ok(Scratch::Disk(serial))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(request: SetupSandboxRequest) -> String {
        Plan::try_from(request).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_request_is_a_plan() {
        let plan = Plan::try_from(SetupSandboxRequest::default()).unwrap();
        assert!(matches!(plan.scratch, Scratch::Tmpfs(0)));
        assert_eq!(plan.unix_time_ns, None);
    }

    #[test]
    fn growth_has_bounds() {
        let of = |vcpus, added_bytes| SetupSandboxRequest {
            growth: Some(agent::Growth { vcpus, added_bytes }),
            ..Default::default()
        };
        let plan = Plan::try_from(of(2, 384 << 20)).unwrap();
        let grown = Growth {
            vcpus: 2,
            added_bytes: 384 << 20,
        };
        assert_eq!(plan.growth, Some(grown));
        for wrong in [of(0, 0), of(65, 0), of(1, u64::MAX)] {
            assert!(error(wrong).contains("growth"));
        }
    }

    #[test]
    fn a_whole_request() {
        let plan = Plan::try_from(SetupSandboxRequest {
            hostname: "web-0".into(),
            dns_servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            interfaces: vec![agent::Interface {
                mac: "02:00:00:00:00:AB".into(),
                name: "eth0".into(),
                mtu: 1450,
                addresses: vec!["10.1.2.3/24".into(), "fd00::3/64".into()],
                current_mac: String::new(),
            }],
            routes: vec![agent::Route {
                destination: "0.0.0.0/0".into(),
                gateway: "10.1.2.1".into(),
                device: "eth0".into(),
                ..Default::default()
            }],
            shared_mounts: vec![agent::SharedMount {
                tag: "share".into(),
                path: "/run/caisson/shared/".into(),
                read_only: true,
            }],
            scratch: Some(agent::Scratch {
                disk_serial: "scratch".into(),
                tmpfs_size_bytes: 0,
            }),
            sysctls: [("net.ipv4.ip_unprivileged_port_start".into(), "0".into())].into(),
            ..Default::default()
        })
        .unwrap();
        assert_eq!(plan.interfaces[0].mac, [2, 0, 0, 0, 0, 0xab]);
        assert_eq!(plan.shared_mounts[0].path, Path::new("/run/caisson/shared"));
        assert_eq!(
            plan.sysctls[0].0,
            Path::new("net/ipv4/ip_unprivileged_port_start")
        );
    }

    #[test]
    fn each_wrong_field_is_named() {
        let interface = |mac: &str, name: &str, address: &str, mtu| SetupSandboxRequest {
            interfaces: vec![agent::Interface {
                mac: mac.into(),
                name: name.into(),
                mtu,
                addresses: vec![address.into()],
                current_mac: String::new(),
            }],
            ..Default::default()
        };
        for request in [
            interface("02:00:00:00:00", "eth0", "10.0.0.1/8", 0),
            interface("02:00:00:00:00:0g", "eth0", "10.0.0.1/8", 0),
            interface("02:00:00:00:00:01:02", "eth0", "10.0.0.1/8", 0),
            interface("02:00:00:00:00:01", "../etc", "10.0.0.1/8", 0),
            interface("02:00:00:00:00:01", "a-name-of-16-chr", "10.0.0.1/8", 0),
            interface("02:00:00:00:00:01", "eth0", "10.0.0.1", 0),
            interface("02:00:00:00:00:01", "eth0", "10.0.0.1/33", 0),
            interface("02:00:00:00:00:01", "eth0", "10.0.0.1/+8", 0),
            interface("02:00:00:00:00:01", "eth0", "10.0.0.1/8", 20),
        ] {
            assert!(error(request).starts_with("interfaces: "));
        }
        let mount = |path: &str| SetupSandboxRequest {
            shared_mounts: vec![agent::SharedMount {
                tag: "t".into(),
                path: path.into(),
                read_only: false,
            }],
            ..Default::default()
        };
        for path in [
            "",
            "run/caisson/x",
            "/",
            "/proc",
            "/run/caisson",
            "/run/caisson/../../etc",
            "/run/caissonx/a",
        ] {
            assert!(error(mount(path)).starts_with("shared_mounts: "), "{path}");
        }
        let ids = |first, length| Some(agent::IdRange { first, length });
        for (uids, gids) in [
            (ids(1000, 10), None),
            (ids(1000, 10), ids(1000, 0)),
            (ids(u32::MAX, 1), ids(1000, 10)),
        ] {
            let namespace = SetupSandboxRequest {
                user_namespace: Some(agent::UserNamespace { uids, gids }),
                ..Default::default()
            };
            assert!(error(namespace).starts_with("user_namespace: "));
        }
        assert!(
            error(SetupSandboxRequest {
                hostname: "a b".into(),
                ..Default::default()
            })
            .starts_with("hostname: ")
        );
        assert!(
            error(SetupSandboxRequest {
                dns_searches: vec!["a\nnameserver 6.6.6.6".into()],
                ..Default::default()
            })
            .starts_with("dns_searches: ")
        );
        assert!(
            error(SetupSandboxRequest {
                entropy: vec![0; 513],
                ..Default::default()
            })
            .starts_with("entropy: ")
        );
        assert!(
            error(SetupSandboxRequest {
                sysctls: [("../../etc/passwd".into(), "x".into())].into(),
                ..Default::default()
            })
            .starts_with("sysctls: ")
        );
    }
}
