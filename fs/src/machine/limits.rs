//! How many machines, and how much memory, there may be: in all, and for one user.

use super::error::MachineError;

/// The limits; `None` is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Machines in all.
    pub machines: Option<usize>,
    /// Machines of one user.
    pub user_machines: Option<usize>,
    /// Bytes of memory in all, as the machines' `memory` says.
    pub memory: Option<u64>,
    /// Bytes of memory of one user's machines.
    pub user_memory: Option<u64>,
}

/// What a machine counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whose it is.
    pub uid: u32,
    /// Its memory limit; `None` is none.
    pub memory: Option<u64>,
}

impl Limits {
    /// Whether a machine can come to these (one of them that changes is left out of them).
    ///
    /// # Errors
    /// ENOSPC for a limit of all, EDQUOT for one of the user's, each with what is used and the limit's name.
    pub fn check(&self, others: &[Share], new: Share) -> Result<(), MachineError> {
        let mine = || others.iter().filter(|share| share.uid == new.uid);
        if let Some(most) = self.machines.filter(|most| others.len() >= *most) {
            return Err(MachineError::no_space(format!(
                "there are {} machines, of {most} (max_machines)",
                others.len()
            )));
        }
        if let Some(most) = self.user_machines.filter(|most| mine().count() >= *most) {
            let count = mine().count();
            return Err(MachineError::quota(format!("you have {count} machines, of {most} (max_user_machines)")));
        }
        if self.memory.is_none() && self.user_memory.is_none() {
            return Ok(());
        }
        let Some(wanted) = new.memory else {
            return Err(MachineError::invalid("memory is limited here: say how much, as in create NAME memory=512M"));
        };
        let sum = |shares: &mut dyn Iterator<Item = &Share>| {
            shares.filter_map(|share| share.memory).fold(wanted, u64::saturating_add)
        };
        let text = |sum: u64, most: u64, name: &str| {
            format!("with this one, machines may use {} of {} of memory ({name})", size(sum), size(most))
        };
        let all = sum(&mut others.iter());
        if let Some(most) = self.memory.filter(|most| all > *most) {
            return Err(MachineError::no_space(text(all, most, "max_memory")));
        }
        let own = sum(&mut mine());
        if let Some(most) = self.user_memory.filter(|most| own > *most) {
            return Err(MachineError::quota(text(own, most, "max_user_memory")));
        }
        Ok(())
    }
}

/// A size in whole MiB, rounded up.
fn size(bytes: u64) -> String {
    format!("{}M", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errno::Errno;

    const fn share(uid: u32, mib: u64) -> Share {
        Share { uid, memory: Some(mib << 20) }
    }

    #[test]
    fn each_limit_has_its_errno_and_its_name() {
        let others = [share(1, 100), share(1, 100), share(2, 100), Share { uid: 3, memory: None }];
        let fails = |limits: Limits, new: Share| {
            limits.check(&others, new).map_err(|error| (error.errno(), error.to_string())).unwrap_err()
        };
        let free = Limits::default();
        free.check(&others, Share { uid: 1, memory: None }).unwrap();
        let (errno, text) = fails(Limits { machines: Some(4), ..free }, share(9, 1));
        assert!(errno == Errno::ENOSPC && text.contains("max_machines"), "{text}");
        let (errno, text) = fails(Limits { user_machines: Some(2), ..free }, share(1, 1));
        assert!(errno == Errno::EDQUOT && text.contains("max_user_machines"), "{text}");
        Limits { user_machines: Some(2), ..free }.check(&others, share(2, 1)).unwrap();
        let memory = Limits { memory: Some(400 << 20), user_memory: Some(250 << 20), ..free };
        memory.check(&others, share(1, 50)).unwrap();
        assert_eq!(fails(memory, share(1, 51)).0, Errno::EDQUOT);
        assert_eq!(fails(memory, share(2, 101)).0, Errno::ENOSPC);
        assert_eq!(fails(memory, Share { uid: 1, memory: None }).0, Errno::EINVAL);
        assert_eq!(fails(memory, share(1, u64::MAX >> 20)).0, Errno::ENOSPC);
    }
}
