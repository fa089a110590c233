//! Targets of symlinks, kept inside `files/`.
//!
//! The host's kernel resolves what readlink gives, one component after the other, in the host's own tree: an absolute
//! target would leave the machine, and so would one that climbs above `files`. The target that is shown therefore
//! begins with at most as many `..` as the link lies deep, and has none after a name: the name could be another
//! link, and nobody knows how deep its end lies.

use crate::errno::Errno;

/// PATH_MAX, the end included.
const MAX_TARGET: usize = 4095;

/// The target as the host shows it, of a link whose directory lies `depth` levels below the guest's root. `None`:
/// the depth is not known.
///
/// # Errors
/// EACCES when it would climb out of `files`; ENAMETOOLONG when the rewritten target is too long.
pub(super) fn contain(target: &[u8], depth: Option<usize>) -> Result<Vec<u8>, Errno> {
    let absolute = target.starts_with(b"/");
    let mut names: Vec<&[u8]> = Vec::new();
    let (mut climb, mut rewritten) = (0usize, absolute);
    for component in target.split(|&b| b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                if names.pop().is_some() {
                    rewritten = true;
                } else if !absolute {
                    climb += 1;
                }
            }
            name => names.push(name),
        }
    }
    if absolute {
        climb = depth.ok_or(Errno::EACCES)?;
    } else if climb > depth.unwrap_or(0) {
        return Err(Errno::EACCES);
    }
    if !rewritten {
        return Ok(target.to_vec());
    }
    let named = !names.is_empty();
    let mut shown = Vec::with_capacity(3 * climb + target.len());
    for component in std::iter::repeat_n(&b".."[..], climb).chain(names) {
        if !shown.is_empty() {
            shown.push(b'/');
        }
        shown.extend_from_slice(component);
    }
    if shown.is_empty() {
        shown.push(b'.');
    } else if named && target.ends_with(b"/") {
        shown.push(b'/');
    }
    if shown.len() > MAX_TARGET { Err(Errno::ENAMETOOLONG) } else { Ok(shown) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(target: &str, depth: usize) -> Result<String, Errno> {
        contain(target.as_bytes(), Some(depth)).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn what_stays_inside_is_shown_as_it_is() {
        for (target, depth) in [("x", 0), ("a/b", 0), ("../x", 1), (".././../x", 2), ("a//b/", 0), ("socket:[1]", 3)] {
            assert_eq!(shown(target, depth).unwrap(), target);
        }
        assert_eq!(contain(b"a/b", None).unwrap(), b"a/b");
    }

    #[test]
    fn absolute_targets_become_relative() {
        for (target, depth, want) in [
            ("/etc/hosts", 0, "etc/hosts"),
            ("/etc/hosts", 2, "../../etc/hosts"),
            ("/", 0, "."),
            ("/", 1, ".."),
            ("//", 0, "."),
            ("/usr/", 1, "../usr/"),
            ("/../../etc", 1, "../etc"),
            ("/usr/bin/../lib", 1, "../usr/lib"),
        ] {
            assert_eq!(shown(target, depth).unwrap(), want, "{target} {depth}");
        }
    }

    #[test]
    fn what_climbs_out_is_refused() {
        for (target, depth) in [("..", 0), ("../..", 1), ("a/../../x", 0), ("../x/../../y", 1)] {
            assert_eq!(shown(target, depth), Err(Errno::EACCES), "{target} {depth}");
        }
        assert_eq!(contain(b"/etc", None), Err(Errno::EACCES), "depth not known");
        assert_eq!(contain(b"../x", None), Err(Errno::EACCES), "depth not known");
        let long = [b"/", vec![b'x'; 4090].as_slice()].concat();
        assert_eq!(contain(&long, Some(5)), Err(Errno::ENAMETOOLONG));
    }

    #[test]
    fn no_climbing_after_a_name() {
        // `a` may be a link to the root: `a/a/../..` would then be two levels above it.
        assert_eq!(shown("a/a/../../x", 0).unwrap(), "x");
        assert_eq!(shown("../a/../b", 1).unwrap(), "../b");
        assert_eq!(shown("a/..", 0).unwrap(), ".");
    }

    proptest! {
        #[test]
        fn never_above_the_root(target in "[a./]{0,40}", depth in 0usize..5) {
            if let Ok(shown) = shown(&target, depth) {
                prop_assert!(!shown.starts_with('/'));
                let components: Vec<&str> = shown.split('/').filter(|c| !c.is_empty() && *c != ".").collect();
                let climb = components.iter().take_while(|c| **c == "..").count();
                prop_assert!(climb <= depth);
                prop_assert!(components.iter().skip(climb).all(|c| *c != ".."));
            }
        }
    }
}
