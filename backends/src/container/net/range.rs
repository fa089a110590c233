//! Which addresses machines have: a range that nothing on the host uses, chosen once and written down.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;

/// Addresses with a common beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Net {
    address: Ipv4Addr,
    length: u8,
}

impl Net {
    pub(super) fn new(address: Ipv4Addr, length: u8) -> Self {
        let length = length.min(32);
        Self { address: Ipv4Addr::from_bits(address.to_bits() & mask(length)), length }
    }

    /// Is it all addresses (a default route's)?
    pub(super) fn is_all(self) -> bool {
        self.length == 0
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        let mask = mask(self.length.min(other.length));
        self.address.to_bits() & mask == other.address.to_bits() & mask
    }

    /// The address of that number in it.
    pub(super) fn at(self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | (number & !mask(self.length)))
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

fn mask(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)
}

/// A range has room for the gateway and for each of [`SLOTS`](crate::container::userns::SLOTS) machines.
const LENGTH: u8 = 17;

/// The gateway's number in a range, which is the same address on the host's end of every pair of interfaces.
const GATEWAY: u32 = 1;

/// The number of the machine of slot 0.
const FIRST: u32 = 16;

/// The host's end.
pub(super) fn gateway(range: Net) -> Ipv4Addr {
    range.at(GATEWAY)
}

/// The machine's end.
pub(super) fn machine(range: Net, slot: u32) -> Ipv4Addr {
    range.at(FIRST + slot)
}

/// A range that overlaps none of `used`: private ones (RFC 1918), tried from `seed` on, so that two daemons begin with
/// different ones. Those that many routers and containers use come last.
pub(super) fn choose(used: &[Net], seed: u32) -> Option<Net> {
    let ten = (64..240_u32).flat_map(|second| [0, 128].map(|third| (10 << 24) | (second << 16) | (third << 8)));
    let ten: Vec<u32> = ten.collect();
    let start = seed as usize % ten.len();
    let turned = ten.iter().cycle().skip(start).take(ten.len()).copied();
    let twelve = (20..32_u32).flat_map(|second| [0, 128].map(|third| (172 << 24) | (second << 16) | (third << 8)));
    let mut all = turned.chain(twelve).map(|bits| Net::new(Ipv4Addr::from_bits(bits), LENGTH));
    all.find(|range| used.iter().all(|net| !net.overlaps(*range)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Net {
        let (address, length) = text.split_once('/').unwrap();
        Net::new(address.parse().unwrap(), length.parse().unwrap())
    }

    #[test]
    fn a_range_collides_with_nothing() {
        let free = choose(&[], 7).unwrap();
        assert_eq!(choose(&[], 7), Some(free));
        assert_ne!(choose(&[free], 7), Some(free));
        assert_ne!(choose(&[Net::new(free.at(77), 32)], 7), Some(free), "one address in it is enough");
        let elsewhere = choose(&[net("10.0.0.0/8")], 7).unwrap();
        assert!(net("172.16.0.0/12").overlaps(elsewhere));
        assert_eq!(choose(&[net("10.0.0.0/8"), net("172.16.0.0/12")], 7), None);
        assert_eq!(choose(&[net("0.0.0.0/0")], 7), None, "callers leave default routes out");
    }

    #[test]
    fn every_slot_has_its_own_address_in_the_range() {
        let range = net("10.64.128.0/17");
        let last = machine(range, crate::container::userns::SLOTS - 1);
        assert!(range.overlaps(Net::new(last, 32)));
        assert_eq!(gateway(range).to_string(), "10.64.128.1");
        assert_eq!(machine(range, 0).to_string(), "10.64.128.16");
        assert_eq!(last.to_string(), "10.64.192.15");
    }
}
