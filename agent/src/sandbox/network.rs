//! Interfaces and routes of the pod.

use std::io;
use std::os::fd::BorrowedFd;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::SockaddrStorage;

use super::netlink::Netlink;
use super::plan::{Interface, Route};
use super::{Cidr, Context, SandboxError};

/// Names, addresses and brings up the interfaces, then adds the routes.
pub fn configure(interfaces: &[Interface], routes: &[Route]) -> Result<(), SandboxError> {
    if interfaces.is_empty() && routes.is_empty() {
        return Ok(());
    }
    let mut netlink = Netlink::open().context(|| "open rtnetlink".into())?;
    let mut indices = Vec::new();
    for (number, interface) in interfaces.iter().enumerate() {
        let (current, index) = device(interface)?;
        // Two devices may have to swap names: first get everyone out of the way.
        if current != interface.name {
            netlink
                .rename(index, &format!("caisson-tmp{number}"))
                .context(|| format!("rename {current}"))?;
        }
        indices.push((index, current != interface.name));
    }
    for (interface, (index, renamed)) in interfaces.iter().zip(indices) {
        let name = &interface.name;
        if renamed {
            netlink
                .rename(index, name)
                .context(|| format!("name a device {name}"))?;
        }
        if interface.mac != interface.current_mac {
            netlink
                .set_address(index, interface.mac)
                .context(|| format!("set the MAC of {name}"))?;
        }
        if let Some(mtu) = interface.mtu {
            netlink
                .set_mtu(index, mtu)
                .context(|| format!("set the MTU of {name} to {mtu}"))?;
        }
        // No address by advertisement: the pod has those that CNI gave it.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0");
        netlink
            .set_up(index)
            .context(|| format!("bring {name} up"))?;
        for &address in &interface.addresses {
            netlink
                .add_address(index, address)
                .context(|| format!("add {}/{} to {name}", address.address, address.prefix))?;
        }
    }
    for route in routes {
        let index = index_of(&route.device)?;
        let destination = route.destination;
        netlink
            .add_route(index, destination, route.gateway, route.priority, route.mtu)
            .context(|| {
                format!(
                    "add the route to {}/{} on {}",
                    destination.address, destination.prefix, route.device
                )
            })?;
    }
    Ok(())
}

/// Takes the interfaces down, with all addresses and routes that they have.
pub fn clear(interfaces: &[Interface]) -> Result<(), SandboxError> {
    if interfaces.is_empty() {
        return Ok(());
    }
    let mut netlink = Netlink::open().context(|| "open rtnetlink".into())?;
    for interface in interfaces {
        let (name, index) = device(interface)?;
        netlink
            .set_down(index)
            .context(|| format!("take {name} down"))?;
        for address in addresses(&name).context(|| format!("list the addresses of {name}"))? {
            netlink
                .remove_address(index, address)
                .context(|| format!("remove {}/{} from {name}", address.address, address.prefix))?;
        }
    }
    Ok(())
}

/// The addresses of a device.
fn addresses(name: &str) -> io::Result<Vec<Cidr>> {
    let own = getifaddrs()?.filter(|entry| entry.interface_name == name);
    let addresses = own.filter_map(|entry| {
        let (address, mask) = (entry.address?, entry.netmask?);
        let v4 = |storage: &SockaddrStorage| storage.as_sockaddr_in().map(|v4| v4.ip());
        let v6 = |storage: &SockaddrStorage| storage.as_sockaddr_in6().map(|v6| v6.ip());
        if let (Some(address), Some(mask)) = (v4(&address), v4(&mask)) {
            let prefix = u32::from(mask).leading_ones() as u8;
            return Some(Cidr {
                address: address.into(),
                prefix,
            });
        }
        let (address, mask) = (v6(&address)?, v6(&mask)?);
        let prefix = u128::from(mask).leading_ones() as u8;
        Some(Cidr {
            address: address.into(),
            prefix,
        })
    });
    Ok(addresses.collect())
}

/// Moves the interfaces to another network namespace, before they are configured there.
pub fn move_to(interfaces: &[Interface], namespace: BorrowedFd<'_>) -> Result<(), SandboxError> {
    if interfaces.is_empty() {
        return Ok(());
    }
    let mut netlink = Netlink::open().context(|| "open rtnetlink".into())?;
    for interface in interfaces {
        let (name, index) = device(interface)?;
        netlink
            .move_to(index, namespace)
            .context(|| format!("move {name} to the pod's network namespace"))?;
    }
    Ok(())
}

/// The name that the interface's device has now, and its index.
fn device(interface: &Interface) -> Result<(String, u32), SandboxError> {
    let name = find(&interface.current_mac)
        .context(|| format!("find the device of {}", interface.name))?;
    let index = index_of(&name)?;
    Ok((name, index))
}

/// The name of the device with this MAC.
fn find(mac: &[u8; 6]) -> io::Result<String> {
    // Not from sysfs, which shows the network namespace it was mounted in.
    let device = getifaddrs()?.find(|entry| {
        let link = entry
            .address
            .as_ref()
            .and_then(|address| address.as_link_addr());
        link.and_then(|link| link.addr()).as_ref() == Some(mac)
    });
    device.map(|device| device.interface_name).ok_or_else(|| {
        let text = mac.map(|byte| format!("{byte:02x}")).join(":");
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("no network device has the MAC {text}"),
        )
    })
}

fn index_of(name: &str) -> Result<u32, SandboxError> {
    if_nametoindex(name).context(|| format!("find the network device {name}"))
}
