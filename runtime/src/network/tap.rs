//! A tap beside the interface that CNI made, and a redirect of all frames between the two, so that any CNI
//! plugin works: what arrives at one device leaves through the other.

use std::fs::OpenOptions;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use futures::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, LinkUnspec};

use super::{Interface, NetworkError, Route, netns};

/// The tap's name in the pod's network namespace.
const TAP: &str = "tap0";
/// The ingress qdisc's handle, as a filter's parent.
const INGRESS: u32 = 0xffff_0000;
/// `ETH_P_ALL` in network byte order.
const ALL_PROTOCOLS: u16 = (nix::libc::ETH_P_ALL as u16).to_be();
/// The main routing table.
const MAIN_TABLE: u32 = 254;

nix::ioctl_write_int!(tun_set_iff, b'T', 202);

/// Makes the tap. It lives as long as its descriptor, which is the VMM's side.
pub async fn open(id: &str, path: PathBuf) -> Result<OwnedFd, NetworkError> {
    netns::inside(id, "make a tap", path, open_tap).await
}

/// Reads the CNI interface's properties and, for a `guest`, joins it to the tap.
pub async fn attach(
    id: &str,
    path: PathBuf,
    interface: String,
    guest: bool,
) -> Result<(Interface, Vec<Route>), NetworkError> {
    let step = if guest {
        "attach a tap to the CNI interface"
    } else {
        "read the CNI interface"
    };
    netns::inside(id, step, path, move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(join(&interface, guest))
    })
    .await
}

fn open_tap() -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|e| io::Error::other(format!("/dev/net/tun: {e}")))?;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from as nix::libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (nix::libc::IFF_TAP | nix::libc::IFF_NO_PI | nix::libc::IFF_VNET_HDR) as i16;
    // SAFETY: TUNSETIFF reads an ifreq, which lives until the call returns.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request as nix::libc::c_ulong) }?;
    Ok(file.into())
}

async fn join(name: &str, guest: bool) -> io::Result<(Interface, Vec<Route>)> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let result = join_with(&handle, name, guest)
        .await
        .map_err(io::Error::other);
    connection.abort();
    result
}

async fn join_with(
    handle: &Handle,
    name: &str,
    guest: bool,
) -> Result<(Interface, Vec<Route>), String> {
    let lo = link(handle, "lo").await?.index;
    up(handle, lo, None).await?;
    let cni = link(handle, name).await?;
    if guest {
        let tap = link(handle, TAP).await?.index;
        up(handle, tap, Some(cni.mtu)).await?;
        for (from, to) in [(cni.index, tap), (tap, cni.index)] {
            redirect(handle, from, to).await?;
        }
    }
    let addresses = addresses(handle, cni.index).await?;
    let routes = routes(handle, cni.index).await?;
    let interface = Interface {
        name: name.to_owned(),
        mac: cni.mac,
        mtu: cni.mtu,
        addresses,
    };
    Ok((interface, routes))
}

struct Link {
    index: u32,
    mac: String,
    mtu: u32,
}

async fn link(handle: &Handle, name: &str) -> Result<Link, String> {
    let message = handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await
        .map_err(|e| format!("device {name}: {e}"))?
        .ok_or_else(|| format!("there is no device {name}"))?;
    let mut link = Link {
        index: message.header.index,
        mac: String::new(),
        mtu: 1500,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::Address(mac) => {
                let bytes: Vec<_> = mac.iter().map(|b| format!("{b:02x}")).collect();
                link.mac = bytes.join(":");
            }
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            _ => {}
        }
    }
    Ok(link)
}

async fn up(handle: &Handle, index: u32, mtu: Option<u32>) -> Result<(), String> {
    let mut change = LinkUnspec::new_with_index(index).up();
    if let Some(mtu) = mtu {
        change = change.mtu(mtu);
    }
    handle
        .link()
        .set(change.build())
        .execute()
        .await
        .map_err(|e| format!("device {index} cannot be brought up: {e}"))
}

async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), String> {
    let index = i32::try_from(from).map_err(|e| e.to_string())?;
    handle
        .qdisc()
        .add(index)
        .ingress()
        .execute()
        .await
        .map_err(|e| {
            format!("no ingress queue on device {from} (kernel module sch_ingress): {e}")
        })?;
    handle
        .traffic_filter(index)
        .add()
        .parent(INGRESS)
        .protocol(ALL_PROTOCOLS)
        .redirect(to)
        .map_err(|e| e.to_string())?
        .execute()
        .await
        .map_err(|e| {
            format!("no redirect on device {from} (kernel modules cls_u32, act_mirred): {e}")
        })
}

async fn addresses(handle: &Handle, index: u32) -> Result<Vec<(IpAddr, u8)>, String> {
    let mut found = Vec::new();
    let mut stream = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    while let Some(message) = stream.try_next().await.map_err(|e| e.to_string())? {
        let ip = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let ip = ip.or_else(|| {
            message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            })
        });
        // The guest makes its own link-local address from the same MAC.
        if let Some(ip) = ip
            && !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
        {
            found.push((ip, message.header.prefix_len));
        }
    }
    // IPv4 first, as CNI plugins list them; otherwise in the kernel's order.
    found.sort_by_key(|(ip, _)| ip.is_ipv6());
    Ok(found)
}

async fn routes(handle: &Handle, index: u32) -> Result<Vec<Route>, String> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut query = RouteMessage::default();
        query.header.address_family = family;
        let mut stream = handle.route().get(query).execute();
        while let Some(message) = stream.try_next().await.map_err(|e| e.to_string())? {
            if let Some(route) = route(&message, family, index) {
                found.push(route);
            }
        }
    }
    // On-link routes before those whose gateway they make reachable.
    found.sort_by_key(|route| route.gateway.is_some());
    Ok(found)
}

/// The route, if somebody configured it for this interface; those the kernel makes from addresses the guest's
/// kernel makes too.
fn route(message: &RouteMessage, family: AddressFamily, index: u32) -> Option<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut device = None;
    let mut gateway = None;
    let mut priority = 0;
    let mut destination: IpAddr = if family == AddressFamily::Inet6 {
        IpAddr::from([0u8; 16])
    } else {
        IpAddr::from([0u8; 4])
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(t) => table = *t,
            RouteAttribute::Oif(i) => device = Some(*i),
            RouteAttribute::Priority(p) => priority = *p,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => gateway = Some(IpAddr::V4(*ip)),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => gateway = Some(IpAddr::V6(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = IpAddr::V4(*ip),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = IpAddr::V6(*ip),
            _ => {}
        }
    }
    let configured = device == Some(index)
        && table == MAIN_TABLE
        && header.kind == RouteType::Unicast
        && header.protocol != RouteProtocol::Kernel;
    configured.then_some(Route {
        destination: (destination, header.destination_prefix_length),
        gateway,
        priority,
    })
}
