//! Machines that rest because nobody used them, and the files in them.
//!
//! Reading does not wake them: an indexer that wanders by is no use. Writing does. What a walk into `files/` is for,
//! FUSE does not say; so where a machine rests, the caller's system call is looked at (proc_pid_syscall(5)): the caller
//! waits in it for the answer. Where that may not be read, nothing is woken.

use super::ops::Op;

/// Whether an operation is one of use: on the content of files, or one that changes something. Looking around is not.
pub fn is_use(op: &Op<'_>) -> bool {
    match op {
        Op::Lookup { .. }
        | Op::GetAttr { .. }
        | Op::ReadLink { .. }
        | Op::OpenDir { .. }
        | Op::ReadDir { .. }
        | Op::ReleaseDir { .. }
        | Op::FsyncDir { .. }
        | Op::Flush { .. }
        | Op::Release { .. }
        | Op::StatFs { .. }
        | Op::GetXattr { .. }
        | Op::ListXattr { .. }
        | Op::GetLock { .. }
        | Op::Poll { .. }
        | Op::SyncFs { .. } => false,
        Op::SetAttr { .. }
        | Op::SymLink { .. }
        | Op::MkNod { .. }
        | Op::MkDir { .. }
        | Op::Unlink { .. }
        | Op::RmDir { .. }
        | Op::Rename { .. }
        | Op::Link { .. }
        | Op::Open { .. }
        | Op::Create { .. }
        | Op::TmpFile { .. }
        | Op::Read { .. }
        | Op::Write { .. }
        | Op::Fsync { .. }
        | Op::SetXattr { .. }
        | Op::RemoveXattr { .. }
        | Op::Fallocate { .. }
        | Op::Seek { .. }
        | Op::CopyRange { .. }
        | Op::SetLock { .. } => true,
    }
}

/// Whether an operation writes: the ones that are use, but for those that only read.
pub fn writes(op: &Op<'_>) -> bool {
    match op {
        Op::Open { flags, .. } => opens_for_writing(u64::from(*flags)),
        Op::Read { .. } | Op::Seek { .. } | Op::SetLock { .. } => false,
        op => is_use(op),
    }
}

fn opens_for_writing(flags: u64) -> bool {
    let wanted = (libc::O_CREAT | libc::O_TRUNC) as u64;
    flags & libc::O_ACCMODE as u64 != libc::O_RDONLY as u64 || flags & wanted != 0
}

/// Whether the process (thread) that asks is in a system call that writes to what it names.
pub fn caller_writes(pid: u32) -> bool {
    let path = format!("/proc/{pid}/syscall");
    pid != 0 && std::fs::read_to_string(path).is_ok_and(|text| syscall_writes(&text))
}

/// The same of the text of that file: the number of the system call, then its arguments in hexadecimal.
fn syscall_writes(text: &str) -> bool {
    let mut fields = text.split_ascii_whitespace();
    let number = fields.next().and_then(|field| field.parse::<libc::c_long>().ok());
    let arguments: Vec<u64> =
        fields.filter_map(|field| u64::from_str_radix(field.strip_prefix("0x")?, 16).ok()).collect();
    let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
    match number {
        Some(libc::SYS_openat) => opens_for_writing(argument(2)),
        #[cfg(target_arch = "x86_64")]
        Some(libc::SYS_open) => opens_for_writing(argument(1)),
        #[cfg(target_arch = "x86_64")]
        Some(
            libc::SYS_creat
            | libc::SYS_mkdir
            | libc::SYS_rmdir
            | libc::SYS_unlink
            | libc::SYS_rename
            | libc::SYS_link
            | libc::SYS_symlink
            | libc::SYS_mknod
            | libc::SYS_chmod
            | libc::SYS_chown
            | libc::SYS_lchown
            | libc::SYS_utimes,
        ) => true,
        Some(
            libc::SYS_truncate
            | libc::SYS_mkdirat
            | libc::SYS_unlinkat
            | libc::SYS_renameat
            | libc::SYS_renameat2
            | libc::SYS_linkat
            | libc::SYS_symlinkat
            | libc::SYS_mknodat
            | libc::SYS_fchmodat
            | libc::SYS_fchownat
            | libc::SYS_utimensat
            | libc::SYS_setxattr
            | libc::SYS_lsetxattr
            | libc::SYS_removexattr
            | libc::SYS_lremovexattr,
        ) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_call_is_read() {
        let openat =
            |flags: i32| format!("{} 0xffffff9c 0x7ffd 0x{flags:x} 0x1b6 0x0 0x0 0x7ffc 0x7f00\n", libc::SYS_openat);
        assert!(!syscall_writes(&openat(libc::O_RDONLY | libc::O_CLOEXEC)));
        assert!(!syscall_writes(&openat(libc::O_PATH | libc::O_DIRECTORY)));
        assert!(syscall_writes(&openat(libc::O_WRONLY)));
        assert!(syscall_writes(&openat(libc::O_RDWR)));
        assert!(syscall_writes(&openat(libc::O_RDONLY | libc::O_CREAT)));
        assert!(syscall_writes(&format!("{} 0x1 0x2\n", libc::SYS_mkdirat)));
        assert!(!syscall_writes(&format!("{} 0x1 0x2\n", libc::SYS_newfstatat)));
        for text in ["", "running\n", "-1 0x0 0x0\n", "x y z"] {
            assert!(!syscall_writes(text));
        }
    }

    #[test]
    fn our_own_call_is_a_read() {
        assert!(!caller_writes(std::process::id()));
        assert!(!caller_writes(0));
    }
}
