//! Users and groups inside POSIX ACLs, as they are stored in extended attributes.

use super::ids::Swap;

/// Names of the attributes that hold ACLs, see acl(5) and linux/posix_acl_xattr.h.
const NAMES: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
/// The attribute's version, its first 4 bytes.
const VERSION: u32 = 2;
/// An entry: tag and permissions of 2 bytes each, and a number of 4.
const ENTRY: usize = 8;
/// `ACL_USER`: the number is a user's.
const ACL_USER: u16 = 0x02;
/// `ACL_GROUP`: the number is a group's.
const ACL_GROUP: u16 = 0x08;

/// Whether that attribute holds an ACL.
pub(super) fn is_acl(name: &[u8]) -> bool {
    NAMES.contains(&name)
}

/// Maps the numbers in an ACL. `None` when it is not one.
pub(super) fn map(value: &[u8], user: impl Fn(u32) -> u32, group: impl Fn(u32) -> u32) -> Option<Vec<u8>> {
    let (version, entries) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != VERSION || entries.len() % ENTRY != 0 {
        return None;
    }
    let mut mapped = Vec::with_capacity(value.len());
    mapped.extend_from_slice(version);
    for entry in entries.chunks_exact(ENTRY) {
        let (tag, rest) = entry.split_first_chunk::<2>()?;
        let (permissions, id) = rest.split_first_chunk::<2>()?;
        let id = u32::from_le_bytes(*id.first_chunk::<4>()?);
        let id = match u16::from_le_bytes(*tag) {
            ACL_USER => user(id),
            ACL_GROUP => group(id),
            _ => id,
        };
        mapped.extend_from_slice(tag);
        mapped.extend_from_slice(permissions);
        mapped.extend_from_slice(&id.to_le_bytes());
    }
    Some(mapped)
}

/// An ACL of the guest as the host shows it.
pub(super) fn to_host(value: &[u8], users: Swap, groups: Swap) -> Option<Vec<u8>> {
    map(value, |id| users.to_host(id), |id| groups.to_host(id))
}

/// An ACL of the host as the guest has it.
pub(super) fn to_guest(value: &[u8], users: Swap, groups: Swap) -> Option<Vec<u8>> {
    map(value, |id| users.to_guest(id), |id| groups.to_guest(id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(permissions.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn users_and_groups_are_swapped_and_the_rest_is_kept() {
        let users = Swap { owner: 1000, default: 0, trusted: false, off: false };
        let groups = Swap { owner: 2000, default: 0, trusted: false, off: false };
        let rest = [(0x01, 6, u32::MAX), (0x04, 4, u32::MAX), (0x10, 7, u32::MAX), (0x20, 4, u32::MAX)];
        let guest = acl(&[rest[0], (ACL_USER, 7, 0), (ACL_USER, 5, 33), rest[1], (ACL_GROUP, 3, 0), rest[2], rest[3]]);
        let host =
            acl(&[rest[0], (ACL_USER, 7, 1000), (ACL_USER, 5, 33), rest[1], (ACL_GROUP, 3, 2000), rest[2], rest[3]]);
        assert_eq!(to_host(&guest, users, groups).unwrap(), host);
        assert_eq!(to_guest(&host, users, groups).unwrap(), guest);
    }

    #[test]
    fn garbage_is_refused() {
        for bytes in [&b""[..], b"\x02\0\0", b"\x03\0\0\0", b"\x02\0\0\0\x01", &[2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]] {
            assert!(map(bytes, |id| id, |id| id).is_none(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn mapping_never_changes_the_length(bytes: Vec<u8>) {
            if let Some(mapped) = map(&bytes, |id| !id, |id| !id) {
                prop_assert_eq!(mapped.len(), bytes.len());
            }
        }
    }
}
