//! Facts about the guest.

use crate::server::Server;
use machinefs_protocol::message::GuestInfo;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{SystemTime, UNIX_EPOCH};

/// What the guest is.
pub fn gather(server: &Server) -> GuestInfo {
    let name = rustix::system::uname();
    GuestInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: name.release().to_string_lossy().into_owned(),
        hostname: name.nodename().to_string_lossy().into_owned(),
        os: os_name(),
        uptime_secs: server.uptime().as_secs(),
        clock_nanos: unix_nanos(),
        addresses: addresses(),
        is_init: std::process::id() == 1,
        default_user: server.jobs().default_user(),
    }
}

/// The guest's clock, nanoseconds since 1970.
pub fn unix_nanos() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// The guest's clock, milliseconds since 1970.
pub fn unix_millis() -> u64 {
    unix_nanos() / 1_000_000
}

/// `PRETTY_NAME` of os-release(5).
fn os_name() -> String {
    let text = crate::jobs::read_bounded("/etc/os-release", 64 * 1024)
        .or_else(|_| crate::jobs::read_bounded("/usr/lib/os-release", 64 * 1024))
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let value = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or_default();
    value.trim().trim_matches(['"', '\'']).chars().filter(|c| !c.is_control()).take(200).collect()
}

/// Addresses of all interfaces but loopback, without link-local ones, in no particular order.
fn addresses() -> Vec<String> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: getifaddrs sets `list` to a list that is freed below.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: `next` is an element of the list, which is not freed yet.
        let item = unsafe { &*next };
        next = item.ifa_next;
        if item.ifa_flags & libc::IFF_LOOPBACK as libc::c_uint != 0 || item.ifa_addr.is_null() {
            continue;
        }
        // SAFETY: ifa_addr points to a socket address of the type its family says.
        match i32::from(unsafe { (*item.ifa_addr).sa_family }) {
            libc::AF_INET => {
                // SAFETY: as above.
                let address = unsafe { std::ptr::read_unaligned(item.ifa_addr.cast::<libc::sockaddr_in>()) };
                found.push(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)).to_string());
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let address = unsafe { std::ptr::read_unaligned(item.ifa_addr.cast::<libc::sockaddr_in6>()) };
                let address = Ipv6Addr::from(address.sin6_addr.s6_addr);
                if !address.is_unicast_link_local() {
                    found.push(address.to_string());
                }
            }
            _ => {}
        }
    }
    // SAFETY: `list` came from getifaddrs and nothing refers to it any more.
    unsafe { libc::freeifaddrs(list) };
    found.truncate(100);
    found
}
