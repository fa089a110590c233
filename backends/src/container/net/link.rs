//! The kernel's network configuration, by rtnetlink(7): links, addresses, routes.

use super::range::Net;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::ffi::CString;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

/// A conversation with the kernel about the network namespace of the thread that opened it.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// A route of the host, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) to: Net,
    /// Its destinations are reached without a gateway.
    pub(super) is_direct: bool,
    pub(super) interface: Option<u32>,
    /// Metric: of several default routes the least is used.
    pub(super) priority: u32,
}

/// The number of an interface in this thread's network namespace.
pub(super) fn index(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    // SAFETY: a call with a string that lives.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            e => Err(e),
        },
        index => Ok(Some(index)),
    }
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut packet = NetlinkMessage::from(message);
        self.sequence = self.sequence.wrapping_add(1);
        packet.header.flags = NLM_F_REQUEST | flags;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut buffer = vec![0; packet.buffer_len()];
        packet.serialize(&mut buffer);
        self.socket.send(&buffer, 0).map(drop)
    }

    /// Takes answers until the last one; `each` gets those that carry something.
    fn receive(&mut self, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let length = rest.get(..4).and_then(|l| l.try_into().ok()).map_or(0, u32::from_ne_bytes) as usize;
                let one = rest.get(..length.max(16)).ok_or(io::ErrorKind::InvalidData)?;
                // A message of a kind that the crate cannot take apart is none that is asked for here.
                if let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(one)
                    && message.header.sequence_number == self.sequence
                {
                    match message.payload {
                        NetlinkPayload::Done(_) => return Ok(()),
                        NetlinkPayload::Error(e) => {
                            return if e.code.is_none() { Ok(()) } else { Err(e.to_io()) };
                        }
                        NetlinkPayload::InnerMessage(inner) => each(inner),
                        _ => {}
                    }
                }
                rest = rest.get(length.max(16).next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, flags | NLM_F_ACK)?;
        self.receive(|_| ())
    }

    /// Makes a pair of interfaces, `outer` here and `inner` in the network namespace `netns`. Both go when either
    /// namespace does.
    pub(super) fn add_pair(&mut self, outer: &str, inner: &str, netns: BorrowedFd<'_>, mtu: u32) -> io::Result<()> {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(inner.into()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::NetNsFd(netns.as_raw_fd()),
        ];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(outer.into()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Removes an interface; success when it is not there.
    pub(super) fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(name.into())];
        match self.request(RouteNetlinkMessage::DelLink(link), 0) {
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    pub(super) fn up(&mut self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.request(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Gives an interface the address `local`, with `peer` alone at its other end.
    pub(super) fn address(&mut self, index: u32, local: Ipv4Addr, peer: Ipv4Addr) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.index = index;
        message.attributes =
            vec![AddressAttribute::Local(IpAddr::V4(local)), AddressAttribute::Address(IpAddr::V4(peer))];
        self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// The default route.
    pub(super) fn default_route(&mut self, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway)), RouteAttribute::Oif(index)];
        self.request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// All IPv4 routes of all tables; the host's own addresses are among them.
    pub(super) fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        self.send(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
        let mut routes = Vec::new();
        self.receive(|answer| {
            if let RouteNetlinkMessage::NewRoute(route) = answer {
                routes.push(told(&route));
            }
        })?;
        Ok(routes)
    }

    /// Names of all interfaces, with their numbers and MTUs.
    pub(super) fn interfaces(&mut self) -> io::Result<Vec<(String, u32, u32)>> {
        self.send(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let mut all = Vec::new();
        self.receive(|answer| {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                let name = link.attributes.iter().find_map(|a| match a {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
                let mtu = link.attributes.iter().find_map(|a| match a {
                    LinkAttribute::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                all.push((name.unwrap_or_default(), link.header.index, mtu.unwrap_or(1500)));
            }
        })?;
        Ok(all)
    }
}

fn told(route: &RouteMessage) -> Route {
    let mut found = Route {
        to: Net::new(Ipv4Addr::UNSPECIFIED, route.header.destination_prefix_length),
        is_direct: route.header.kind == RouteType::Unicast,
        interface: None,
        priority: 0,
    };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(to)) => {
                found.to = Net::new(*to, route.header.destination_prefix_length);
            }
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => {
                found.is_direct = false;
            }
            RouteAttribute::Oif(index) => found.interface = Some(*index),
            RouteAttribute::Priority(priority) => found.priority = *priority,
            _ => {}
        }
    }
    found
}
