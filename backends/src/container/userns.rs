//! User namespaces: which numbers of the host a machine's users are, and the namespace that id-mapped mounts take them
//! from.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;

/// How many user and group numbers a machine has.
pub(super) const RANGE: u32 = 65536;

/// Where the ranges of root's machines begin: far above what distributions hand out in /etc/subuid (from 100000 on,
/// 65536 each) and what systemd takes (up to 0x7fff_ffff it uses 524288 to 1879048191 for DynamicUser containers
/// only when asked to), and so that [`SLOTS`] of them stay below 2^31.
const BASE: u32 = 1 << 30;

/// How many machines of root can have a range of their own.
pub(super) const SLOTS: u32 = (1 << 30) / RANGE;

/// First number of the range of a slot.
pub(super) fn base(slot: u32) -> io::Result<u32> {
    if slot >= SLOTS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("uid slot {slot} is not below {SLOTS}")));
    }
    Ok(BASE + slot * RANGE)
}

/// One line of a uid_map or gid_map (user_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// First number inside.
    pub(super) inside: u32,
    /// First number outside.
    pub(super) outside: u32,
    /// How many.
    pub(super) count: u32,
}

/// What an ordinary user may map: themself as root, and their subordinate ranges above it.
#[derive(Clone, Debug)]
pub(super) struct Maps {
    pub(super) uids: Vec<Extent>,
    pub(super) gids: Vec<Extent>,
}

impl Maps {
    /// As /etc/subuid and /etc/subgid say.
    pub(super) fn of_user() -> Self {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let name = user_name(uid);
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        Self {
            uids: extents(uid, &subordinate(&read("/etc/subuid"), uid, name.as_deref())),
            gids: extents(gid, &subordinate(&read("/etc/subgid"), uid, name.as_deref())),
        }
    }

    /// Is there more than the user themself?
    pub(super) fn has_range(&self) -> bool {
        self.uids.len() > 1 && self.gids.len() > 1
    }

    /// How many users there are inside.
    pub(super) fn users(&self) -> u64 {
        self.uids.iter().map(|e| u64::from(e.count)).sum()
    }

    /// Gives these maps to the namespace of `pid`. One number needs no privilege; more need newuidmap(1).
    pub(super) fn write_to(&self, pid: u32) -> io::Result<()> {
        if !self.has_range() {
            let one = |extents: &[Extent]| extents.first().map(|e| format!("0 {} 1\n", e.outside)).unwrap_or_default();
            fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
            fs::write(format!("/proc/{pid}/gid_map"), one(&self.gids))?;
            return fs::write(format!("/proc/{pid}/uid_map"), one(&self.uids));
        }
        for (program, extents) in [("newgidmap", &self.gids), ("newuidmap", &self.uids)] {
            let mut command = Command::new(program);
            command.arg(pid.to_string());
            for extent in extents {
                command.args([extent.inside, extent.outside, extent.count].map(|n| n.to_string()));
            }
            let output = command.output().map_err(|e| io::Error::new(e.kind(), format!("{program}: {e}")))?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(io::Error::other(format!("{program}: {}", said.trim())));
            }
        }
        Ok(())
    }
}

fn extents(own: u32, ranges: &[(u32, u32)]) -> Vec<Extent> {
    let mut all = vec![Extent { inside: 0, outside: own, count: 1 }];
    let mut inside = 1_u32;
    for &(outside, count) in ranges {
        let count = count.min(RANGE.saturating_sub(inside));
        if count > 0 {
            all.push(Extent { inside, outside, count });
            inside += count;
        }
    }
    all
}

/// The ranges of a user in the text of /etc/subuid or /etc/subgid (subuid(5)): lines `name-or-number:first:count`.
fn subordinate(text: &str, uid: u32, name: Option<&str>) -> Vec<(u32, u32)> {
    let mine = |owner: &str| Some(owner) == name || owner.parse() == Ok(uid);
    let parse = |line: &str| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let first = fields.next()?.parse().ok()?;
        let count = fields.next()?.parse().ok()?;
        mine(owner).then_some((first, count))
    };
    text.lines().filter_map(parse).collect()
}

fn user_name(uid: u32) -> Option<String> {
    let text = fs::read_to_string("/etc/passwd").ok()?;
    let line = text.lines().find(|line| line.split(':').nth(2).is_some_and(|field| field.parse() == Ok(uid)))?;
    line.split(':').next().map(str::to_owned)
}

/// A descriptor of a new user namespace in which 0..65536 is `base`..`base` + 65536, for mount_setattr(2)'s
/// MOUNT_ATTR_IDMAP. Needs root.
pub(super) fn mapped(base: u32) -> io::Result<OwnedFd> {
    let map = format!("0 {base} {RANGE}\n");
    mapped_as(&map, &map)
}

/// A descriptor of a new user namespace with these maps (user_namespaces(7)). Needs root.
pub(super) fn mapped_as(users: &str, groups: &str) -> io::Result<OwnedFd> {
    let parent = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: a clone(2) with a null stack is a fork. The child calls nothing but system calls, directly, so no lock or
    // allocator of the parent's other threads is touched.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0) };
    match i32::try_from(pid) {
        // SAFETY: in the child. It waits until the parent's SIGKILL, or, as prctl(2) asks, until the parent's death, which
        // may have come before.
        Ok(0) => unsafe {
            libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
            while libc::syscall(libc::SYS_getppid) == libc::c_long::from(parent) {
                libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
            }
            libc::_exit(1)
        },
        Ok(pid) if pid > 0 => {
            let result = fs::write(format!("/proc/{pid}/uid_map"), users)
                .and_then(|()| fs::write(format!("/proc/{pid}/gid_map"), groups))
                .and_then(|()| fs::File::open(format!("/proc/{pid}/ns/user")));
            // SAFETY: the child is ours and not waited for yet, so the number is still its own.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
            result.map(Into::into)
        }
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_end_below_the_sign_bit() {
        assert_eq!(base(0).unwrap(), 1_073_741_824);
        assert_eq!(base(1).unwrap() - base(0).unwrap(), RANGE);
        assert!(base(SLOTS - 1).unwrap() <= (1 << 31) - RANGE);
        assert!(base(SLOTS).is_err());
    }

    #[test]
    fn subordinate_ranges_are_read_by_name_and_number() {
        let text = "alice:100000:65536\n1001:300000:1000\nbob:1:1\nbroken\nalice:x:1\n";
        assert_eq!(subordinate(text, 1000, Some("alice")), [(100_000, 65536)]);
        assert_eq!(subordinate(text, 1001, Some("carol")), [(300_000, 1000)]);
        let maps = extents(1000, &[(100_000, 65536), (900_000, 5)]);
        assert_eq!(maps[1], Extent { inside: 1, outside: 100_000, count: 65535 });
        assert_eq!(maps.len(), 2, "there are 65536 numbers inside, no more");
    }
}
