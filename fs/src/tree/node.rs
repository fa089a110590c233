//! Numbers of the control nodes: derived from what a node is, never counted, so that they are the same after a rename
//! and after a restart of the daemon, and need no table of what the kernel holds.
//!
//! ```text
//! bit 63     0: a control node (1: a file in a guest, see `guest`)
//! bits 36–59 slot of the machine or template, 0 for the service itself
//! bits 28–35 kind
//! bits 0–27  sub: number of the job or variable, hash of the key's name, else 0
//! ```
//! The root is [`ROOT`], which is [`Kind::Root`] with sub 1. The inode number of a control node is its node number.

use super::ops::{NodeId, ROOT};
use crate::machine::vars::VarKind;

/// Set in the numbers of files in guests.
pub const GUEST_BIT: u64 = 1 << 63;

/// Largest `sub`.
pub const MAX_SUB: u64 = (1 << 28) - 1;

const MAX_SLOT: u32 = (1 << 24) - 1;
const SLOT_SHIFT: u32 = 36;
const KIND_SHIFT: u32 = 28;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a control node is. The numbers are part of inode numbers: they may be added to, never changed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// Every kind.
            #[cfg(test)]
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            fn from_u8(number: u8) -> Option<Kind> {
                match number {
                    $($number => Some(Kind::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// The top of the tree.
    Root = 0,
    /// `.sys`
    Sys = 1,
    /// `.sys/wait`
    SysWait = 2,
    /// `.sys/templates`
    Templates = 3,
    /// `.sys/templates/NAME`
    Template = 4,
    /// `.sys/templates/NAME/config`
    TemplateConfig = 5,
    /// `.sys/templates/NAME/env`
    TemplateEnv = 6,
    /// `.sys/templates/NAME/secrets`
    TemplateSecrets = 7,
    /// A machine's directory.
    Machine = 16,
    /// `NAME/wait`
    Wait = 17,
    /// `NAME/config`
    Config = 18,
    /// `NAME/jobs`
    Jobs = 19,
    /// `NAME/jobs/JOB`
    Job = 20,
    /// `NAME/files`
    Files = 21,
    /// `NAME/env`
    Env = 22,
    /// `NAME/secrets`
    Secrets = 23,
    /// `NAME/tags`
    Tags = 24,
    /// `NAME/ports`
    Ports = 25,
    /// `NAME/mounts`
    Mounts = 26,
    /// `.sys/volumes`
    Volumes = 27,
    /// `.sys/volumes/NAME`
    Volume = 28,
    /// `README`
    Readme = 32,
    /// `.ignore`
    Ignore = 33,
    /// `ctl` of the service
    RootCtl = 34,
    /// `index`
    Index = 35,
    /// `index.json`
    IndexJson = 36,
    /// `.sys/version`
    Version = 37,
    /// `.sys/health`
    SysHealth = 38,
    /// `.sys/metrics`
    Metrics = 39,
    /// `.sys/events`
    SysEvents = 40,
    /// `.sys/wait/event`
    SysWaitEvent = 41,
    /// `NAME/ctl`
    Ctl = 64,
    /// `NAME/status`
    Status = 65,
    /// `NAME/wait/running`
    WaitRunning = 66,
    /// `NAME/wait/stopped`
    WaitStopped = 67,
    /// `NAME/wait/event`
    WaitEvent = 68,
    /// `NAME/wait/console`
    WaitConsole = 69,
    /// `NAME/info`
    Info = 70,
    /// `NAME/info.json`
    InfoJson = 71,
    /// `NAME/errors`
    Errors = 72,
    /// `NAME/events`
    Events = 73,
    /// `NAME/health`
    Health = 74,
    /// `NAME/console`
    Console = 75,
    /// `NAME/exec`
    Exec = 76,
    /// `NAME/out`
    Out = 77,
    /// `NAME/exit`
    Exit = 78,
    /// `NAME/history`
    History = 79,
    /// `NAME/work`
    Work = 80,
    /// `NAME/.ignore`
    MachineIgnore = 81,
    /// `NAME/usage`
    Usage = 82,
    /// `NAME/config/KEY`
    ConfigKey = 96,
    /// `NAME/env/NAME`
    EnvVar = 97,
    /// `NAME/secrets/NAME`
    Secret = 98,
    /// `NAME/tags/NAME`
    Tag = 99,
    /// `.sys/templates/NAME/config/KEY`
    TemplateKey = 100,
    /// `.sys/templates/NAME/env/NAME`
    TemplateVar = 101,
    /// `.sys/templates/NAME/secrets/NAME`
    TemplateSecret = 102,
    /// `NAME/ports/PORT`
    Port = 103,
    /// `NAME/mounts/PATH`
    Mount = 104,
    /// `NAME/changes`
    Changes = 105,
    /// `.sys/volumes/NAME/info`
    VolumeInfo = 106,
    /// `NAME/jobs/JOB/cmd`
    JobCmd = 128,
    /// `NAME/jobs/JOB/out`
    JobOut = 129,
    /// `NAME/jobs/JOB/stdout`
    JobStdout = 130,
    /// `NAME/jobs/JOB/stderr`
    JobStderr = 131,
    /// `NAME/jobs/JOB/exit`
    JobExit = 132,
    /// `NAME/jobs/JOB/status`
    JobStatus = 133,
    /// `NAME/jobs/JOB/ctl`
    JobCtl = 134,
    /// `NAME/jobs/JOB/argv`
    JobArgv = 135,
    /// `NAME/jobs/JOB/cwd`
    JobCwd = 136,
    /// `NAME/jobs/JOB/env`
    JobEnv = 137,
    /// `NAME/jobs/JOB/user`
    JobUser = 138,
    /// `NAME/jobs/JOB/timeout`
    JobTimeout = 139,
    /// `NAME/jobs/JOB/tty`
    JobTty = 140,
    /// `NAME/jobs/JOB/stdin`
    JobStdin = 141,
}

impl Kind {
    /// Whether nodes of this kind are directories.
    pub fn is_dir(self) -> bool {
        matches!(
            self,
            Kind::Root
                | Kind::Sys
                | Kind::SysWait
                | Kind::Machine
                | Kind::Wait
                | Kind::Config
                | Kind::Jobs
                | Kind::Job
                | Kind::Files
                | Kind::Env
                | Kind::Secrets
                | Kind::Tags
                | Kind::Ports
                | Kind::Mounts
                | Kind::Volumes
                | Kind::Volume
        ) || self.is_template_dir()
    }

    /// Whether it is the directory of templates, or one in it.
    fn is_template_dir(self) -> bool {
        matches!(
            self,
            Kind::Templates | Kind::Template | Kind::TemplateConfig | Kind::TemplateEnv | Kind::TemplateSecrets
        )
    }

    /// What users name in a directory of this kind, and the kind of its nodes.
    pub fn vars(self) -> Option<(VarKind, Kind)> {
        Some(match self {
            Kind::Env => (VarKind::Env, Kind::EnvVar),
            Kind::Secrets => (VarKind::Secret, Kind::Secret),
            Kind::Tags => (VarKind::Tag, Kind::Tag),
            Kind::Ports => (VarKind::Port, Kind::Port),
            Kind::Mounts => (VarKind::Mount, Kind::Mount),
            Kind::TemplateEnv => (VarKind::Env, Kind::TemplateVar),
            Kind::TemplateSecrets => (VarKind::Secret, Kind::TemplateSecret),
            _ => return None,
        })
    }

    /// The `DT_…` of readdir(3).
    pub fn dirent(self) -> u8 {
        match self {
            Kind::Work => libc::DT_LNK,
            kind if kind.is_dir() => libc::DT_DIR,
            _ => libc::DT_REG,
        }
    }
}

/// A control node's number, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// Slot of the machine; 0 for the service.
    pub slot: u32,
    /// What it is.
    pub kind: Kind,
    /// Which of that kind.
    pub sub: u32,
}

impl Control {
    /// A node of the service itself.
    pub fn service(kind: Kind) -> Control {
        Control { slot: 0, kind, sub: u32::from(kind == Kind::Root) }
    }

    /// A node of a machine of which there is one.
    pub fn machine(slot: u32, kind: Kind) -> Control {
        Control { slot, kind, sub: 0 }
    }

    /// The node's number.
    pub fn id(self) -> NodeId {
        debug_assert!(self.slot <= MAX_SLOT && u64::from(self.sub) <= MAX_SUB);
        u64::from(self.slot & MAX_SLOT) << SLOT_SHIFT
            | u64::from(self.kind as u8) << KIND_SHIFT
            | (u64::from(self.sub) & MAX_SUB)
    }

    /// The node with this number; `None` when no control node can have it.
    pub fn from_id(id: NodeId) -> Option<Control> {
        if id == ROOT {
            return Some(Control::service(Kind::Root));
        }
        let slot = u32::try_from(id >> SLOT_SHIFT).ok().filter(|slot| *slot <= MAX_SLOT)?;
        let kind = Kind::from_u8((id >> KIND_SHIFT & 0xff) as u8)?;
        let sub = (id & MAX_SUB) as u32;
        (kind != Kind::Root).then_some(Control { slot, kind, sub })
    }
}

/// Inode number of a machine's `files`, for the guest's root directory that it is.
pub fn files_ino(slot: u32) -> u64 {
    Control::machine(slot, Kind::Files).id()
}

/// A name as a `sub`: FNV-1a folded to 28 bits. What is hashed comes from short fixed lists, whose freedom from
/// collisions is tested.
pub fn hash28(name: &[u8]) -> u32 {
    let hash = name.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    (hash >> 28) ^ (hash & MAX_SUB as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_root_is_one() {
        assert_eq!(Control::service(Kind::Root).id(), ROOT);
        assert_eq!(Control::from_id(ROOT), Some(Control::service(Kind::Root)));
        assert_eq!(Control::from_id(0), None);
    }

    #[test]
    fn numbers_of_kinds_stay() {
        // Inode numbers outlive a version of the daemon: a change here breaks them.
        let numbers: Vec<u8> = Kind::ALL.iter().map(|kind| *kind as u8).collect();
        let expected: Vec<u8> =
            (0..8).chain(16..29).chain(32..42).chain(64..83).chain(96..107).chain(128..142).collect();
        assert_eq!(numbers, expected);
    }

    proptest! {
        #[test]
        fn numbers_come_back(slot in 0..=MAX_SLOT, kind in proptest::sample::select(Kind::ALL), sub in 0..=MAX_SUB as u32) {
            prop_assume!(kind != Kind::Root);
            let node = Control { slot, kind, sub };
            prop_assert_eq!(Control::from_id(node.id()), Some(node));
            prop_assert_eq!(node.id() & GUEST_BIT, 0);
        }

        #[test]
        fn any_number_is_taken_apart_or_refused(id: u64) {
            if let Some(node) = Control::from_id(id) {
                prop_assert_eq!(node.id(), id);
            }
        }
    }
}
