//! The network `outgoing`: a machine reaches the internet and nothing near.
//!
//! As root: a pair of interfaces, one end in the machine's network namespace, routed and masqueraded by the host, with
//! [`filter`]'s rules between. The machine's name server is the daemon ([`dns`]). What a machine has follows from its
//! slot, and the pair goes with its network namespace, so nothing of it has to be written down; what is the state
//! directory's (range of addresses, table of rules, forwarding) is, in `network.json`, before it is made, and it is
//! removed with the last pair.
//!
//! An ordinary user's machines have a program beside them that does it with the user's own sockets: [`user`].

mod dns;
mod filter;
mod link;
mod range;
pub(super) mod user;

use super::disk::write_whole;
use super::programs;
use link::{Netlink, Route};
use range::Net;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The machine's end.
const INNER: &str = "eth0";

/// The networks of a state directory's machines, as root.
#[derive(Debug)]
pub(super) struct Networks {
    dir: PathBuf,
    instance: String,
    /// The host's resolv.conf(5).
    servers: Arc<PathBuf>,
    /// What is written down is changed by one thread at a time; other processes do not.
    state: Mutex<()>,
}

/// `network.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    range: Net,
    /// Interfaces whose forwarding was off and is on for our machines.
    opened: Vec<String>,
}

/// While it lives, the rules and the range stay.
#[derive(Debug)]
pub(super) struct Ready {
    _lock: File,
    range: Net,
    mtu: u32,
}

fn told<T>(what: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| io::Error::new(e.kind(), format!("{what}: {e}")))
}

impl Networks {
    pub(super) fn new(state_dir: &Path, instance: &str, servers: PathBuf) -> Self {
        Self { dir: state_dir.into(), instance: instance.into(), servers: Arc::new(servers), state: Mutex::new(()) }
    }

    /// What the names of the host's ends begin with. A name has 15 bytes: `mfs`, eight for the state directory, four.
    fn prefix(&self) -> String {
        format!("mfs{}", self.instance)
    }

    fn outer(&self, slot: u32) -> String {
        format!("{}{slot:04x}", self.prefix())
    }

    fn lock(&self) -> io::Result<File> {
        File::options().create(true).truncate(false).write(true).open(self.dir.join("network.lock"))
    }

    fn recorded(&self) -> io::Result<Option<State>> {
        match fs::read(self.dir.join("network.json")) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn record(&self, state: &State) -> io::Result<()> {
        write_whole(&self.dir.join("network.json"), &serde_json::to_vec(state)?, true)
    }

    /// Has the host ready for a machine: range, forwarding, rules. Safe to repeat; takes some milliseconds.
    pub(super) fn prepare(&self) -> io::Result<Ready> {
        let _state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = self.lock()?;
        lock.lock_shared()?;
        let mut kernel = told("rtnetlink", Netlink::open())?;
        let (routes, interfaces) = (kernel.routes()?, kernel.interfaces()?);
        let prefix = self.prefix();
        let ours =
            |index: &Option<u32>| interfaces.iter().any(|(n, i, _)| Some(*i) == *index && n.starts_with(&prefix));
        let in_use = interfaces.iter().any(|(name, ..)| name.starts_with(&prefix));
        let others: Vec<Route> = routes.into_iter().filter(|r| !ours(&r.interface)).collect();
        let old = self.recorded()?;
        let used: Vec<Net> = others.iter().map(|r| r.to).filter(|n| !n.is_all()).chain(self.resolvers()).collect();
        let range = match &old {
            // What machines that run have cannot be changed.
            Some(state) if in_use || used.iter().all(|net| !net.overlaps(state.range)) => state.range,
            _ => {
                let seed = u32::from_str_radix(&self.instance, 16).unwrap_or(0);
                range::choose(&used, seed).ok_or_else(|| {
                    let text = "no private range of addresses is free: the host has routes to all of 10.0.0.0/8 and 172.16.0.0/12";
                    io::Error::new(io::ErrorKind::AddrNotAvailable, text)
                })?
            }
        };
        let way = others.iter().filter(|r| r.to.is_all()).min_by_key(|r| r.priority);
        let way = way.and_then(|r| interfaces.iter().find(|(_, index, _)| Some(*index) == r.interface));
        let mut opened = old.map(|s| s.opened).unwrap_or_default();
        let forwards = read_setting("ip_forward") == "1";
        if forwards {
            // Somebody made a router of the host meanwhile: it is not ours any more to switch off.
            opened.clear();
        } else if let Some((name, ..)) = way
            && read_setting(&format!("conf/{name}/forwarding")) == "0"
            && !opened.contains(name)
        {
            opened.push(name.clone());
        }
        let state = State { range, opened };
        self.record(&state)?;
        let mut neighbours: Vec<Net> = others.iter().filter(|r| r.is_direct && !r.to.is_all()).map(|r| r.to).collect();
        neighbours.dedup();
        let rules = filter::Rules {
            instance: &self.instance,
            prefix: &prefix,
            range,
            neighbours: &neighbours,
            opened: &state.opened,
        };
        rules.load()?;
        // After the rules, which keep it to our machines.
        for name in &state.opened {
            told("forwarding", write_setting(&format!("conf/{name}/forwarding"), "1"))?;
        }
        Ok(Ready { _lock: lock, range, mtu: way.map_or(1500, |(_, _, mtu)| (*mtu).clamp(576, 65535)) })
    }

    /// The host's name servers: a range must not hide them.
    fn resolvers(&self) -> Vec<Net> {
        let text = fs::read_to_string(self.servers.as_path()).unwrap_or_default();
        let words = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
        words.filter_map(|w| w.trim().parse::<Ipv4Addr>().ok()).map(|a| Net::new(a, 32)).collect()
    }

    /// Connects a machine. `netns` is its network namespace, `users` the first number of its users and how many they
    /// are, `pidfd` its init. The answer: its address.
    pub(super) fn connect(
        &self,
        ready: &Ready,
        slot: u32,
        netns: BorrowedFd<'_>,
        users: (u32, u32),
        pidfd: BorrowedFd<'_>,
    ) -> io::Result<Ipv4Addr> {
        let name = self.outer(slot);
        let (host, machine) = (range::gateway(ready.range), range::machine(ready.range, slot));
        let mut kernel = Netlink::open()?;
        kernel.remove(&name)?;
        told("making a pair of interfaces", kernel.add_pair(&name, INNER, netns, ready.mtu))?;
        let index = link::index(&name)?.ok_or(io::ErrorKind::NotFound)?;
        // No IPv6 on it, before it is up and the kernel gives it an address.
        let six = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        if Path::new(&six).exists() {
            told(&six, fs::write(&six, "1"))?;
        }
        for (key, value) in
            [("rp_filter", "1"), ("forwarding", "1"), ("send_redirects", "0"), ("accept_redirects", "0")]
        {
            told(key, write_setting(&format!("conf/{name}/{key}"), value))?;
        }
        told("the host's address", kernel.address(index, host, machine))?;
        kernel.up(index)?;
        let sockets = inside(netns, move || {
            let mut kernel = Netlink::open()?;
            let index = link::index(INNER)?.ok_or(io::ErrorKind::NotFound)?;
            if Path::new("/proc/sys/net/ipv6/conf").exists() {
                fs::write(format!("/proc/sys/net/ipv6/conf/{INNER}/disable_ipv6"), "1")?;
            }
            told("the machine's address", kernel.address(index, machine, host))?;
            kernel.up(index)?;
            told("the machine's route", kernel.default_route(index, host))?;
            // ping(8) without CAP_NET_RAW, for all of the machine's groups (icmp(7)). Not every kernel lets us.
            drop(write_setting("ping_group_range", &format!("{} {}", users.0, users.0 + users.1 - 1)));
            dns::Sockets::bind()
        })?;
        self.answer(sockets, pidfd)?;
        Ok(machine)
    }

    /// Goes on with the name service of a machine that runs: the sockets ended with the daemon before us.
    pub(super) fn adopt(&self, netns: BorrowedFd<'_>, pidfd: BorrowedFd<'_>) -> io::Result<()> {
        match inside(netns, dns::Sockets::bind) {
            // Another backend of this process has them.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Ok(()),
            other => self.answer(other?, pidfd),
        }
    }

    fn answer(&self, sockets: dns::Sockets, pidfd: BorrowedFd<'_>) -> io::Result<()> {
        let runtime = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        sockets.serve(pidfd.try_clone_to_owned()?, dns::Servers(Arc::clone(&self.servers)), &runtime)
    }

    /// Takes a machine's pair away, and with the last one what all had in common. Quick when there is none.
    pub(super) fn disconnect(&self, slot: u32) -> io::Result<()> {
        let name = self.outer(slot);
        if link::index(&name)?.is_some() {
            // The kernel would do it too, some time after the namespace's end.
            Netlink::open()?.remove(&name)?;
        }
        if self.recorded()?.is_none() {
            return Ok(());
        }
        let _state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = self.lock()?;
        // Who holds it is about to make a pair.
        if lock.try_lock().is_err() {
            return Ok(());
        }
        // Another machine's end may have come first.
        let Some(state) = self.recorded()? else { return Ok(()) };
        let prefix = self.prefix();
        if Netlink::open()?.interfaces()?.iter().any(|(name, ..)| name.starts_with(&prefix)) {
            return Ok(());
        }
        for name in &state.opened {
            // An interface that is gone took its setting with it.
            drop(write_setting(&format!("conf/{name}/forwarding"), "0"));
        }
        filter::remove(&self.instance)?;
        fs::remove_file(self.dir.join("network.json"))
    }
}

/// Runs something on a thread that is in another network namespace.
fn inside<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            rustix::thread::move_into_link_name_space(netns, Some(rustix::thread::LinkNameSpaceType::Network))?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread ended")))
    })
}

/// The network namespace of a process that is known not to have ended.
pub(super) fn namespace_of(pid: u32) -> io::Result<OwnedFd> {
    File::open(format!("/proc/{pid}/ns/net")).map(Into::into)
}

fn read_setting(key: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/ipv4/{key}")).unwrap_or_default().trim().to_owned()
}

fn write_setting(key: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/net/ipv4/{key}"), value)
}

/// What is missing for machines of root to reach out; `None`: nothing.
pub(super) fn missing() -> Option<&'static str> {
    (!programs::is_there("nft")).then_some("nft")
}

/// The name server of machines of root.
pub(super) const NAME_SERVER: Ipv4Addr = dns::ADDRESS;
