//! The files of /etc that a machine gets with its disk: its names, and where its name server is.

use crate::{MachineSpec, Network};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::path::Path;

/// The first line of a resolv.conf(5) of ours.
const MARK: &str = "# Made by machinefs at every start, as long as this line is here.\n";

pub(super) fn hostname(name: &str) -> String {
    format!("{name}\n")
}

pub(super) fn hosts(name: &str) -> String {
    format!("127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n")
}

/// Is this content of a file in the machine what it was made with?
pub(super) fn is_generated(path: &[u8], content: &[u8], name: &str) -> bool {
    match path {
        b"/etc/hostname" => content == hostname(name).as_bytes(),
        b"/etc/hosts" => content == hosts(name).as_bytes(),
        b"/etc/resolv.conf" => content.starts_with(MARK.as_bytes()),
        _ => false,
    }
}

/// Writes the machine's resolv.conf into the upper directory of its root, before a start: where there is none, or one
/// that was made here and is unchanged. `owner`: the machine's root on the host.
pub(super) fn resolv_conf(
    spec: &MachineSpec,
    upper: &Path,
    server: Option<Ipv4Addr>,
    owner: Option<u32>,
) -> io::Result<()> {
    const MOST: u64 = 4096;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(upper, flags, Mode::empty())?;
    // The guest may have put a link there.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let etc = match openat2(&top, "etc", flags, Mode::empty(), resolve) {
        Ok(etc) => etc,
        // An image without /etc has no programs that would read it.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let open = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let text = match (spec.network, server) {
        (Network::Outgoing, Some(server)) => format!("{MARK}nameserver {server}\n"),
        _ => MARK.to_owned(),
    };
    let mut file = match openat2(&etc, "resolv.conf", open, Mode::empty(), resolve) {
        Ok(fd) => {
            let mut file = File::from(fd);
            let mut old = Vec::new();
            if !file.metadata()?.is_file() {
                return Ok(());
            }
            (&mut file).take(MOST).read_to_end(&mut old)?;
            if !old.starts_with(MARK.as_bytes()) || old == text.as_bytes() {
                return Ok(());
            }
            file.set_len(0)?;
            io::Seek::rewind(&mut file)?;
            file
        }
        Err(Errno::NOENT) if spec.network == Network::None => return Ok(()),
        Err(Errno::NOENT) => {
            let create = open | OFlags::CREATE | OFlags::EXCL;
            let file = File::from(openat2(&etc, "resolv.conf", create, Mode::from_raw_mode(0o644), resolve)?);
            file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
            if let Some(owner) = owner {
                std::os::unix::fs::fchown(&file, Some(owner), Some(owner))?;
            }
            file
        }
        // Removed by the guest (a device of overlay's), or a link of its own.
        Err(Errno::LOOP | Errno::NXIO | Errno::ACCESS | Errno::PERM | Errno::NODEV) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    file.write_all(text.as_bytes())
}
