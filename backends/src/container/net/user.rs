//! The network of an ordinary user's machine: pasta(1), or slirp4netns(1), beside it, which speaks for the machine with
//! sockets of the user's own. What the user reaches the machine reaches, but for the host's loopback (and with pasta,
//! where the machine has the host's own address, the host itself): who is not root cannot filter that.

use crate::container::{process, programs};
use std::fs;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// In the arguments of the program that serves a machine: so it is found again, whatever was lost.
const MARK: &str = "network.pid";

/// How long a program may take for a thing that takes milliseconds.
const LIMIT: Duration = Duration::from_secs(10);

/// Where pasta answers for the name server; an address that nobody has (RFC 3927).
const PASTA_DNS: Ipv4Addr = Ipv4Addr::new(169, 254, 53, 53);

/// Where slirp4netns does.
const SLIRP_DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

/// What serves machines here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Pasta,
    Slirp,
}

impl Program {
    /// The better one that is installed; none works where the user may not make tap devices.
    pub(crate) fn find() -> Option<Self> {
        use rustix::fs::{Access, access};
        if access("/dev/net/tun", Access::READ_OK | Access::WRITE_OK).is_err() {
            return None;
        }
        [Self::Pasta, Self::Slirp].into_iter().find(|p| programs::is_there(p.name()))
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pasta => "pasta",
            Self::Slirp => "slirp4netns",
        }
    }

    /// Where a machine finds its name server.
    pub(crate) fn name_server(self) -> Ipv4Addr {
        match self {
            Self::Pasta => PASTA_DNS,
            Self::Slirp => SLIRP_DNS,
        }
    }

    /// What does not hold.
    pub(crate) fn warning(self) -> &'static str {
        match self {
            Self::Pasta => {
                "network=outgoing of an ordinary user's daemon is not filtered: the machine reaches private networks, \
                 other machines and metadata services as its owner does; it does not reach the host"
            }
            Self::Slirp => {
                "network=outgoing of an ordinary user's daemon is not filtered: the machine reaches private networks, \
                 other machines, metadata services and the host's own addresses (but 127.0.0.0/8) as its owner does"
            }
        }
    }

    /// Connects the machine of that init; returns when the network is there.
    pub(crate) fn start(self, dir: &Path, init: u32) -> io::Result<()> {
        let mark = dir.join(MARK);
        let mut command = Command::new(self.name());
        command.env("PATH", programs::path()).current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
        command.process_group(0);
        match self {
            Self::Pasta => {
                command.args(["--quiet", "--ipv4-only", "--config-net", "--no-map-gw", "--ns-ifname", "eth0"]);
                command.args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"]);
                command.arg("--dns-forward").arg(PASTA_DNS.to_string());
                command.arg("--pid").arg(&mark).arg(init.to_string());
                let log = fs::File::create(dir.join("network.log"))?;
                command.stderr(log);
                let mut child = command.spawn().map_err(|e| io::Error::new(e.kind(), format!("pasta: {e}")))?;
                // It goes to the background when all is set up.
                let (fd, _) = process::open_pid(child.id())?.unzip();
                if let Some(fd) = fd
                    && !process::wait_end(fd.as_fd(), LIMIT)?
                {
                    child.kill()?;
                }
                let status = child.wait()?;
                if !status.success() {
                    let said = fs::read_to_string(dir.join("network.log")).unwrap_or_default();
                    return Err(io::Error::other(format!("pasta: {status}: {}", said.trim())));
                }
                Ok(())
            }
            Self::Slirp => {
                let mut name = std::ffi::OsString::from("slirp4netns ");
                name.push(&mark);
                let (mut ready, write) = io::pipe()?;
                // Not close-on-exec in the child alone: a thread that starts another program now must not pass it on.
                let number = write.as_raw_fd();
                // SAFETY: fcntl(2) on a number that is open in the child; nothing else happens between fork and exec.
                unsafe {
                    command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
                        -1 => Err(io::Error::last_os_error()),
                        _ => Ok(()),
                    });
                }
                command.arg0(name).stderr(Stdio::null());
                command.args(["--configure", "--mtu=65520", "--disable-host-loopback", "--enable-seccomp"]);
                command.arg(format!("--ready-fd={number}")).arg(init.to_string()).arg("eth0");
                command.spawn().map_err(|e| io::Error::new(e.kind(), format!("slirp4netns: {e}")))?;
                drop(write);
                let mut word = [0];
                match ready.read(&mut word)? {
                    0 => Err(io::Error::other("slirp4netns ended")),
                    _ => Ok(()),
                }
            }
        }
    }
}

/// Ends what serves the machine of that directory.
pub(crate) fn stop(dir: &Path) -> io::Result<()> {
    for pid in serving(dir)? {
        if let Some((fd, _)) = process::open_pid(pid)?
            && is_serving(pid, &dir.join(MARK))
        {
            process::kill(fd.as_fd())?;
            process::wait_end(fd.as_fd(), LIMIT)?;
            // If this daemon started it, it is a child, and its number is kept until it is waited for.
            if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
            }
        }
    }
    for file in [MARK, "network.log"] {
        match fs::remove_file(dir.join(file)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

fn serving(dir: &Path) -> io::Result<Vec<u32>> {
    let mark: PathBuf = dir.join(MARK);
    let names = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(names.filter(|pid| is_serving(*pid, &mark)).collect())
}

fn is_serving(pid: u32, mark: &Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mark = mark.as_os_str().as_bytes();
    let first = line.split(|b| *b == 0).next().unwrap_or_default();
    let is_slirp = first.strip_prefix(b"slirp4netns ").is_some_and(|rest| rest == mark);
    // It starts itself anew by the path of the variant for this processor (pasta.avx2).
    let program = first.rsplit(|b| *b == b'/').next().unwrap_or_default();
    is_slirp || (program.starts_with(b"pasta") && line.split(|b| *b == 0).any(|a| a == mark))
}
