//! Random operations on the service and on a plain directory give the same results and the same trees.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, symlink};

/// A path of at most two names out of few, so that operations meet.
type Place = (Option<u8>, u8);

#[derive(Clone, Debug)]
enum Step {
    Write(Place, u16, Vec<u8>),
    Truncate(Place, u16),
    MkDir(Place),
    SymLink(Place),
    Link(Place, Place),
    Unlink(Place),
    RmDir(Place),
    Rename(Place, Place, bool),
    Evict,
    ForgetAll,
}

fn place() -> impl Strategy<Value = Place> {
    (proptest::option::of(0..3u8), 0..4u8)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (place(), 0..3000u16, proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(place, offset, data)| Step::Write(place, offset, data)),
        1 => (place(), 0..3000u16).prop_map(|(place, size)| Step::Truncate(place, size)),
        2 => place().prop_map(Step::MkDir),
        1 => place().prop_map(Step::SymLink),
        2 => (place(), place()).prop_map(|(from, to)| Step::Link(from, to)),
        2 => place().prop_map(Step::Unlink),
        1 => place().prop_map(Step::RmDir),
        3 => (place(), place(), any::<bool>()).prop_map(|(from, to, keep)| Step::Rename(from, to, keep)),
        1 => Just(Step::Evict),
        1 => Just(Step::ForgetAll),
    ]
}

fn name(number: u8) -> String {
    format!("n{number}")
}

fn path(root: &Path, (dir, file): Place) -> PathBuf {
    dir.map_or(root.to_path_buf(), |dir| root.join(name(dir))).join(name(file))
}

/// The directory's node. Symlinks are not followed on the way; the model must not either.
fn parent(guest: &Guest, (dir, _): Place) -> Result<u64, Errno> {
    match dir {
        None => Ok(ROOT),
        Some(dir) => guest.lookup(ROOT, name(dir)).map(|entry| entry.node).map_err(|error| error.0),
    }
}

fn node(guest: &Guest, place: Place) -> Result<u64, Errno> {
    let parent = parent(guest, place)?;
    guest.lookup(parent, name(place.1)).map(|entry| entry.node).map_err(|error| error.0)
}

fn on_service(guest: &Guest, step: &Step) -> Result<(), Errno> {
    let plain = |error: FileError| error.0;
    match step {
        Step::Write(place, offset, data) => {
            let (_, fh) = guest.create(parent(guest, *place)?, name(place.1), O_RDWR).map_err(plain)?;
            let result = guest.write(fh, (*offset).into(), data).map(|_| ()).map_err(plain);
            guest.service.release(fh, 0);
            result
        }
        Step::Truncate(place, size) => {
            let set = SetAttr { size: Some((*size).into()), ..SetAttr::default() };
            guest.set(node(guest, *place)?, None, set).map(|_| ()).map_err(plain)
        }
        Step::MkDir(place) => guest.mkdir(parent(guest, *place)?, name(place.1)).map(|_| ()).map_err(plain),
        Step::SymLink(place) => {
            let name = name(place.1);
            let (parent, owner) = (parent(guest, *place)?, ROOT_OWNER);
            let request = FileRequest::SymLink { parent, name: name.as_bytes(), target: b"nowhere", owner };
            guest.entry(request).map(|_| ()).map_err(plain)
        }
        Step::Link(from, to) => {
            let (from, dir) = (node(guest, *from)?, parent(guest, *to)?);
            guest.link(from, dir, name(to.1)).map(|_| ()).map_err(plain)
        }
        Step::Unlink(place) => guest.unlink(parent(guest, *place)?, name(place.1)).map_err(plain),
        Step::RmDir(place) => guest.rmdir(parent(guest, *place)?, name(place.1)).map_err(plain),
        Step::Rename(from, to, keep) => {
            let (old, new) = (parent(guest, *from)?, parent(guest, *to)?);
            guest.rename((old, name(from.1)), (new, name(to.1)), u32::from(*keep)).map_err(plain)
        }
        Step::Evict => {
            guest.evict();
            Ok(())
        }
        Step::ForgetAll => {
            guest.service.reset();
            Ok(())
        }
    }
}

fn on_plain(root: &Path, step: &Step) -> Result<(), Errno> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap();
    let not_through_link = |place: &Place| match place.0 {
        Some(dir) if fs::symlink_metadata(root.join(name(dir))).is_ok_and(|found| found.is_symlink()) => {
            Err(Errno::NOTDIR)
        }
        _ => Ok(()),
    };
    let is_link = |place: &Place| fs::symlink_metadata(path(root, *place)).is_ok_and(|found| found.is_symlink());
    match step {
        Step::Write(place, offset, data) => {
            not_through_link(place)?;
            if is_link(place) {
                return Err(Errno::LOOP);
            }
            let mut options = fs::File::options();
            options.read(true).write(true).create(true).truncate(false).mode(0o644);
            let file = options.open(path(root, *place)).map_err(errno)?;
            file.write_all_at(data, (*offset).into()).map_err(errno)
        }
        Step::Truncate(place, size) => {
            not_through_link(place)?;
            if is_link(place) {
                return Err(Errno::INVAL);
            }
            let file = fs::File::options().write(true).open(path(root, *place)).map_err(errno)?;
            file.set_len((*size).into()).map_err(errno)
        }
        Step::MkDir(place) => {
            not_through_link(place)?;
            fs::DirBuilder::new().mode(0o755).create(path(root, *place)).map_err(errno)
        }
        Step::SymLink(place) => {
            not_through_link(place)?;
            symlink("nowhere", path(root, *place)).map_err(errno)
        }
        Step::Link(from, to) => {
            not_through_link(from)?;
            fs::symlink_metadata(path(root, *from)).map_err(errno)?;
            not_through_link(to)?;
            fs::hard_link(path(root, *from), path(root, *to)).map_err(errno)
        }
        Step::Unlink(place) => {
            not_through_link(place)?;
            fs::remove_file(path(root, *place)).map_err(errno)
        }
        Step::RmDir(place) => {
            not_through_link(place)?;
            fs::remove_dir(path(root, *place)).map_err(errno)
        }
        Step::Rename(from, to, keep) => {
            not_through_link(from)?;
            not_through_link(to)?;
            let flags = rustix::fs::RenameFlags::from_bits_retain((*keep).into());
            let (cwd, from, to) = (rustix::fs::CWD, path(root, *from), path(root, *to));
            rustix::fs::renameat_with(cwd, from, cwd, to, flags)
        }
        Step::Evict | Step::ForgetAll => Ok(()),
    }
}

/// All that can be seen of a tree: type, links, mode and content by path.
fn tree(dir: &Path, prefix: &Path, into: &mut BTreeMap<PathBuf, (u32, u64, Vec<u8>)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let found = entry.metadata().unwrap();
        let path = prefix.join(entry.file_name());
        let content = if found.is_file() {
            fs::read(entry.path()).unwrap()
        } else if found.is_symlink() {
            fs::read_link(entry.path()).unwrap().as_os_str().as_bytes().to_vec()
        } else {
            tree(&entry.path(), &path, into);
            Vec::new()
        };
        into.insert(path, (found.mode(), found.nlink(), content));
    }
}

/// Different checks come first when there are several reasons to fail.
fn same(service: Result<(), Errno>, plain: Result<(), Errno>) -> bool {
    let class = |result: Result<(), Errno>| match result {
        Ok(()) => None,
        Err(errno) => Some(std::io::Error::from(errno).kind()),
    };
    let (service, plain) = (class(service), class(plain));
    service == plain || (service.is_some() && plain.is_some() && service != Some(ErrorKind::StaleNetworkFileHandle))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_same_as_a_plain_directory(steps in proptest::collection::vec(step(), 1..60), handles in any::<bool>()) {
        let guest = if handles { Guest::new() } else { Guest::without_handles(3) };
        let plain = tempfile::tempdir().unwrap();
        for step in &steps {
            let (ours, theirs) = (on_service(&guest, step), on_plain(plain.path(), step));
            prop_assert!(same(ours, theirs), "{:?}: {:?}, not {:?}", step, ours, theirs);
        }
        let (mut ours, mut theirs) = (BTreeMap::new(), BTreeMap::new());
        tree(guest.dir.path(), Path::new(""), &mut ours);
        tree(plain.path(), Path::new(""), &mut theirs);
        prop_assert_eq!(ours, theirs);
        guest.service.reset();
        prop_assert_eq!(guest.service.table.living(), 1);
    }
}
