//! Which system calls a machine may make: an allow list. What it does not name is ENOSYS, so that programs fall back as
//! they would on an older kernel; what is known and refused is EPERM.
//!
//! The starting point is what Docker's and Podman's default profiles allow. Departures:
//! - Nothing is unlocked by capabilities: a machine never has CAP_SYS_ADMIN and the like, so mounting, module loading,
//!   the clock, accounting and raw I/O are refused for good.
//! - No new namespaces (`unshare`, `setns`, `clone` with a CLONE_NEW flag; `clone3`, whose flags a filter cannot see,
//!   is ENOSYS and the C library falls back to clone). Nested containers and browser sandboxes do not work in a
//!   machine; in return the kernel code that only a namespace's root can reach stays out of reach.
//! - `syslog`: the kernel's log is the host's, and some hosts leave it open to everybody.
//! - The key ring, userfaultfd, io_uring, bpf and performance counters are out: much kernel code, little use here.
//! - `fanotify_init` is in: the kernel allows a harmless form of it to everybody, and the agent watches files with it.
//! - Sockets of the families AF_VSOCK (it reaches the hypervisor past the network namespace) and AF_ALG are refused;
//!   so 32-bit x86 has no `socketcall`, whose arguments a filter cannot see. x32 is refused whole.
//!
//! The runtime gets it twice: as the program itself ([`filter`]), which crun takes from an annotation, and as the
//! runtime-spec's section ([`profile`]), which any runtime translates and crun then passes over.

use super::bpf::{Table, Test, Verdict, program};
use serde::Serialize;
use std::collections::BTreeMap;
use std::str::FromStr;

const EPERM: u32 = libc::EPERM as u32;
const ENOSYS: u32 = libc::ENOSYS as u32;

/// All flags of clone(2) that make a namespace.
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// Calls allowed for some values of their first argument only.
const CONDITIONAL: &[(&str, &[Test])] = &[
    ("clone", &[Test::NoneOf(NAMESPACES)]),
    // Linux, 32-bit Linux, both with UNAME26, ADDR_NO_RANDOMIZE, which debuggers want; and the question.
    (
        "personality",
        &[
            Test::Equal(0),
            Test::Equal(0x8),
            Test::Equal(0x2_0000),
            Test::Equal(0x2_0008),
            Test::Equal(0x4_0000),
            Test::Equal(0xffff_ffff),
        ],
    ),
    // All families but AF_ALG (38) and AF_VSOCK (40).
    ("socket", &[Test::Less(38), Test::Equal(39), Test::Greater(40)]),
];

/// `linux.seccomp` of the runtime-spec.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Seccomp {
    default_action: &'static str,
    default_errno_ret: u32,
    architectures: &'static [&'static str],
    syscalls: Vec<Rule>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    names: Vec<&'static str>,
    action: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno_ret: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    args: Vec<Arg>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Arg {
    index: u32,
    value: u32,
    value_two: u32,
    op: &'static str,
}

/// The profile for the runtime.
pub(super) fn profile() -> Seccomp {
    let rule = |names: &'static str, errno_ret: Option<u32>| Rule {
        names: names.split_whitespace().collect(),
        action: if errno_ret.is_some() { "SCMP_ACT_ERRNO" } else { "SCMP_ACT_ALLOW" },
        errno_ret,
        args: Vec::new(),
    };
    let mut syscalls = vec![rule(ALLOWED, None), rule(REFUSED, Some(EPERM))];
    for (name, tests) in CONDITIONAL {
        for test in *tests {
            let (op, value) = match *test {
                Test::Equal(value) => ("SCMP_CMP_EQ", value),
                Test::Less(value) => ("SCMP_CMP_LT", value),
                Test::Greater(value) => ("SCMP_CMP_GT", value),
                Test::NoneOf(bits) => ("SCMP_CMP_MASKED_EQ", bits),
            };
            syscalls.push(Rule { args: vec![Arg { index: 0, value, value_two: 0, op }], ..rule(name, None) });
        }
    }
    Seccomp { default_action: "SCMP_ACT_ERRNO", default_errno_ret: ENOSYS, architectures: ARCHITECTURES, syscalls }
}

fn table<N: FromStr>(arch: u32, number: impl Fn(N) -> i32) -> Table {
    let number = |name: &str| N::from_str(name).ok().and_then(|n| u32::try_from(number(n)).ok());
    let mut verdicts = BTreeMap::new();
    verdicts.extend(ALLOWED.split_whitespace().filter_map(number).map(|n| (n, Verdict::Allow)));
    verdicts.extend(REFUSED.split_whitespace().filter_map(number).map(|n| (n, Verdict::Errno(EPERM))));
    for (name, tests) in CONDITIONAL {
        verdicts.extend(number(name).map(|n| (n, Verdict::AllowIf(0, tests.to_vec(), ENOSYS))));
    }
    Table { arch, verdicts }
}

/// The profile as a program, for this machine's kernel. `None`: not known for this architecture.
#[cfg(target_arch = "x86_64")]
pub(super) fn filter() -> Option<Vec<u8>> {
    let native = table(0xc000_003e, |n: syscalls::x86_64::Sysno| n.id());
    let compat = table(0x4000_0003, |n: syscalls::x86::Sysno| n.id());
    Some(program(&[native, compat], ENOSYS))
}

/// The profile as a program, for this machine's kernel. `None`: not known for this architecture.
#[cfg(target_arch = "aarch64")]
pub(super) fn filter() -> Option<Vec<u8>> {
    let native = table(0xc000_00b7, |n: syscalls::aarch64::Sysno| n.id());
    let compat = table(0x4000_0028, |n: syscalls::arm::Sysno| n.id());
    Some(program(&[native, compat], ENOSYS))
}

/// The profile as a program, for this machine's kernel. `None`: not known for this architecture.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn filter() -> Option<Vec<u8>> {
    None
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: &[&str] = &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"];
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: &[&str] = &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURES: &[&str] = &[];

/// Names that this architecture or this libseccomp does not know are passed over by the runtimes.
const ALLOWED: &str = "
    _llseek _newselect accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir
    chmod chown chown32 chroot clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime
    clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup
    dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
    epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64
    fallocate fanotify_init fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl
    fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs
    fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake
    futimesat get_mempolicy get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32
    geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname
    getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup
    io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat
    llistxattr lremovexattr lseek lsetxattr lsm_get_self_attr lsm_list_modules lstat lstat64 madvise
    map_shadow_stack mbind membarrier memfd_create memfd_secret migrate_pages mincore mkdir mkdirat mknod
    mknodat mlock mlock2 mlockall mmap mmap2 modify_ldt mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
    mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd
    msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat nice open openat openat2 pause
    pidfd_getfd pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll
    ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_madvise process_mrelease process_vm_readv
    process_vm_writev pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readdir readlink
    readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat
    rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
    sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop
    semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto set_mempolicy set_mempolicy_home_node
    set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32
    setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid
    setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl
    shmdt shmget shutdown sigaction sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn
    sigsuspend socketpair splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync
    sync_file_range syncfs syscall sysinfo tee tgkill time timer_create timer_delete timer_getoverrun
    timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd timerfd_create timerfd_gettime
    timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname
    unlink unlinkat utime utimensat utimensat_time64 utimes vfork wait4 waitid waitpid write writev
";

/// Known, and not for a machine.
const REFUSED: &str = "
    acct add_key bdflush bpf clock_settime clock_settime64 delete_module finit_module fsconfig fsmount fsopen
    fspick init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load
    kexec_load keyctl lookup_dcookie mount mount_setattr move_mount move_pages nfsservctl oldfstat oldlstat
    oldolduname oldstat olduname open_by_handle_at open_tree pciconfig_iobase pciconfig_read pciconfig_write
    perf_event_open pivot_root query_module quotactl reboot request_key setdomainname sethostname setns
    settimeofday sgetmask ssetmask stime swapcontext swapoff swapon sysfs syslog umount umount2 unshare uselib
    userfaultfd ustat vhangup vm86 vm86old vmsplice
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_both_allowed_and_refused() {
        let allowed: Vec<_> = ALLOWED.split_whitespace().collect();
        let refused: Vec<_> = REFUSED.split_whitespace().collect();
        assert!(allowed.iter().all(|name| !refused.contains(name)));
        for name in ["mount", "setns", "unshare", "keyctl", "bpf", "init_module", "open_by_handle_at", "ptrace"] {
            assert_eq!(refused.contains(&name), name != "ptrace", "{name}");
        }
        for name in ["openat2", "name_to_handle_at", "fanotify_init", "pidfd_open", "execve"] {
            assert!(allowed.contains(&name), "{name}");
        }
    }
}
