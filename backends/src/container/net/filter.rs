//! Rules for the machines of one state directory: one table of nftables, loaded by nft(8) whole or not at all.

use super::range::Net;
use crate::container::programs;
use std::io::{self, Write};
use std::process::{Command, Stdio};

/// What no machine reaches, whatever the host's routes say (IANA's special-purpose registry): private networks, shared
/// (carrier's) addresses, link-local ones with the clouds' metadata services, benchmarking, multicast, reserved.
const CLOSED: &[&str] = &[
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
];

/// What the rules are made of.
#[derive(Debug)]
pub(super) struct Rules<'a> {
    /// Names the table.
    pub(super) instance: &'a str,
    /// What the names of the host's ends begin with.
    pub(super) prefix: &'a str,
    /// Where the machines are.
    pub(super) range: Net,
    /// The networks that the host is in.
    pub(super) neighbours: &'a [Net],
    /// Interfaces that forward because of us: for others than our machines they are to go on not to.
    pub(super) opened: &'a [String],
}

impl Rules<'_> {
    /// As nft -f takes it. IPv6 is closed: machines have no such address.
    ///
    /// Where a rule accepts, the host's own rules still decide: a packet passes when all tables let it.
    pub(super) fn text(&self) -> String {
        let Self { instance, prefix, range, .. } = self;
        let closed: Vec<String> =
            CLOSED.iter().map(|c| (*c).to_owned()).chain(self.neighbours.iter().map(Net::to_string)).collect();
        let closed = closed.join(", ");
        let opened: String = self
            .opened
            .iter()
            .map(|name| format!("  iifname \"{name}\" oifname != \"mfs*\" ct state new ct status & dnat == 0 drop\n"))
            .collect();
        let table = format!("inet machinefs_{instance}");
        format!(
            "table {table}\ndelete table {table}\ntable {table} {{\n\
             set closed {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {closed} }} }}\n\
             chain input {{ type filter hook input priority -10; policy accept;\n  \
               iifname != \"{prefix}*\" accept\n  \
               meta nfproto ipv4 ct state established,related accept\n  \
               meta nfproto ipv4 reject with icmp type admin-prohibited\n  \
               drop\n}}\n\
             chain forward {{ type filter hook forward priority -10; policy accept;\n  \
               oifname \"{prefix}*\" meta nfproto ipv4 ct state established,related accept\n  \
               oifname \"{prefix}*\" drop\n  \
               iifname \"{prefix}*\" jump out\n\
             {opened}}}\n\
             chain out {{\n  \
               meta nfproto != ipv4 drop\n  \
               oifname \"mfs*\" drop\n  \
               ip saddr != {range} drop\n  \
               ct state invalid drop\n  \
               ip daddr @closed reject with icmp type admin-prohibited\n  \
               fib daddr type != unicast drop\n  \
               tcp flags syn tcp option maxseg size set rt mtu\n\
             }}\n\
             chain postrouting {{ type nat hook postrouting priority 100; policy accept;\n  \
               ip saddr {range} oifname != \"mfs*\" masquerade\n}}\n\
             }}\n"
        )
    }

    /// Puts them in place of those that are there.
    pub(super) fn load(&self) -> io::Result<()> {
        nft(&self.text())
    }
}

/// Removes the table; success when it is not there.
pub(super) fn remove(instance: &str) -> io::Result<()> {
    let table = format!("inet machinefs_{instance}");
    nft(&format!("table {table}\ndelete table {table}\n"))
}

fn nft(commands: &str) -> io::Result<()> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("nft: {e}"));
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        // Debian has it in /usr/sbin, which not every PATH names.
        .env("PATH", programs::path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(named)?;
    // What nft does not read it has refused, and says so.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(commands.as_bytes()));
    let output = child.wait_with_output().map_err(named)?;
    if !output.status.success() {
        return Err(io::Error::other(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim())));
    }
    written.map_err(named)
}
