//! The few rtnetlink requests (rtnetlink(7)) that configure a pod's interfaces.
//!
//! Written out here because the general crate parses every message there is, which would add a quarter to the
//! binary; these requests only build messages, and read one acknowledgement each.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use super::Cidr;

const ACKNOWLEDGED_CREATE: u16 =
    (libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
const ACKNOWLEDGED: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
/// linux/if_addr.h: no duplicate address detection, which would hold a new address back for a second.
const IFA_F_NODAD: u8 = 0x02;
/// linux/rtnetlink.h: the route's metric for packet sizes, in an RTA_METRICS.
const RTAX_MTU: u16 = 2;
const HEADER: usize = 16;

/// A request under construction.
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self { bytes }
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// A connection to the kernel's routing tables.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Renames an interface that is down.
    pub fn rename(&mut self, index: u32, name: &str) -> io::Result<()> {
        let name = [name.as_bytes(), b"\0"].concat();
        self.request(link(index, 0, 0).attribute(libc::IFLA_IFNAME, &name))
    }

    /// Moves an interface to another network namespace.
    pub fn move_to(&mut self, index: u32, namespace: BorrowedFd<'_>) -> io::Result<()> {
        let descriptor = namespace.as_raw_fd().to_ne_bytes();
        self.request(link(index, 0, 0).attribute(libc::IFLA_NET_NS_FD, &descriptor))
    }

    /// Sets the MAC of an interface that is down.
    pub fn set_address(&mut self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        self.request(link(index, 0, 0).attribute(libc::IFLA_ADDRESS, &mac))
    }

    /// Sets an interface's MTU.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        self.request(link(index, 0, 0).attribute(libc::IFLA_MTU, &mtu.to_ne_bytes()))
    }

    /// Brings an interface up.
    pub fn set_up(&mut self, index: u32) -> io::Result<()> {
        let up = libc::IFF_UP as u32;
        self.request(link(index, up, up))
    }

    /// Takes an interface down; its routes go.
    pub fn set_down(&mut self, index: u32) -> io::Result<()> {
        self.request(link(index, 0, libc::IFF_UP as u32))
    }

    /// Removes an address. One that is gone is not an error: those of IPv6 go when the interface goes down.
    pub fn remove_address(&mut self, index: u32, cidr: Cidr) -> io::Result<()> {
        let message = Message::new(libc::RTM_DELADDR, ACKNOWLEDGED)
            .raw(&[family(cidr.address), cidr.prefix, 0, 0])
            .raw(&index.to_ne_bytes())
            .attribute(libc::IFA_LOCAL, &octets(cidr.address))
            .attribute(libc::IFA_ADDRESS, &octets(cidr.address));
        match self.request(message) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            other => other,
        }
    }

    /// Adds an address.
    pub fn add_address(&mut self, index: u32, cidr: Cidr) -> io::Result<()> {
        let address = octets(cidr.address);
        let flags = if cidr.address.is_ipv6() {
            IFA_F_NODAD
        } else {
            0
        };
        // struct ifaddrmsg: family, prefix length, flags, scope (0: universe), index
        let mut message = Message::new(libc::RTM_NEWADDR, ACKNOWLEDGED_CREATE)
            .raw(&[family(cidr.address), cidr.prefix, flags, 0])
            .raw(&index.to_ne_bytes())
            .attribute(libc::IFA_LOCAL, &address)
            .attribute(libc::IFA_ADDRESS, &address);
        if let (IpAddr::V4(address), 0..=30) = (cidr.address, cidr.prefix) {
            let host_bits = u32::MAX.checked_shr(u32::from(cidr.prefix)).unwrap_or(0);
            let broadcast = u32::from(address) | host_bits;
            message = message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        self.request(message)
    }

    /// Adds a route to the main table.
    pub fn add_route(
        &mut self,
        index: u32,
        destination: Cidr,
        gateway: Option<IpAddr>,
        priority: Option<u32>,
        mtu: Option<u32>,
    ) -> io::Result<()> {
        let scope = match gateway {
            None if destination.address.is_ipv4() => libc::RT_SCOPE_LINK,
            _ => libc::RT_SCOPE_UNIVERSE,
        };
        // struct rtmsg: family, destination length, source length, TOS, table, protocol, scope, type, flags
        let mut message = Message::new(libc::RTM_NEWROUTE, ACKNOWLEDGED_CREATE)
            .raw(&[
                family(destination.address),
                destination.prefix,
                0,
                0,
                libc::RT_TABLE_MAIN,
                libc::RTPROT_BOOT,
                scope,
                libc::RTN_UNICAST,
            ])
            .raw(&0u32.to_ne_bytes())
            .attribute(libc::RTA_OIF, &index.to_ne_bytes());
        if destination.prefix > 0 {
            message = message.attribute(libc::RTA_DST, &octets(destination.address));
        }
        if let Some(gateway) = gateway {
            message = message.attribute(libc::RTA_GATEWAY, &octets(gateway));
        }
        if let Some(priority) = priority {
            message = message.attribute(libc::RTA_PRIORITY, &priority.to_ne_bytes());
        }
        if let Some(mtu) = mtu {
            let mut metric = Vec::from(8u16.to_ne_bytes());
            metric.extend_from_slice(&RTAX_MTU.to_ne_bytes());
            metric.extend_from_slice(&mtu.to_ne_bytes());
            message = message.attribute(libc::RTA_METRICS, &metric);
        }
        self.request(message)
    }

    /// Sends a request and waits for its acknowledgement.
    fn request(&mut self, message: Message) -> io::Result<()> {
        self.sequence += 1;
        let bytes = message.finish(self.sequence);
        sendto(
            self.socket.as_raw_fd(),
            &bytes,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )?;
        let mut answer = [0; 4096];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            if let Some(result) = acknowledgement(&answer[..length], self.sequence) {
                return result;
            }
        }
    }
}

/// The result in an NLMSG_ERROR of this sequence number; `None` for anything else.
fn acknowledgement(answer: &[u8], sequence: u32) -> Option<io::Result<()>> {
    let word = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    if i32::from(kind) != libc::NLMSG_ERROR || word(8)? != sequence {
        return None;
    }
    Some(match word(HEADER)? as i32 {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
    })
}

fn link(index: u32, flags: u32, changed: u32) -> Message {
    // struct ifinfomsg: family and padding, type, index, flags, change mask
    Message::new(libc::RTM_NEWLINK, ACKNOWLEDGED)
        .raw(&[0; 4])
        .raw(&index.to_ne_bytes())
        .raw(&flags.to_ne_bytes())
        .raw(&changed.to_ne_bytes())
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_aligned_and_carry_their_length() {
        let bytes = link(3, 1, 1)
            .attribute(libc::IFLA_IFNAME, b"eth0\0")
            .finish(9);
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(bytes[..4], 44u32.to_ne_bytes());
        assert_eq!(bytes[8..12], 9u32.to_ne_bytes());
        assert_eq!(bytes[32..36], [9, 0, libc::IFLA_IFNAME as u8, 0]);
    }

    #[test]
    fn acknowledgements() {
        let mut answer = vec![0; 36];
        answer[4] = libc::NLMSG_ERROR as u8;
        answer[8..12].copy_from_slice(&5u32.to_ne_bytes());
        assert!(acknowledgement(&answer, 5).unwrap().is_ok());
        assert!(acknowledgement(&answer, 6).is_none());
        answer[16..20].copy_from_slice(&(-libc::EEXIST).to_ne_bytes());
        let error = acknowledgement(&answer, 5).unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        assert!(acknowledgement(&answer[..10], 5).is_none());
    }
}
