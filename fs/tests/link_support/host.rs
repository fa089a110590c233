//! Asking a guest's files, as a front end does.

use super::PATIENCE;
use machinefs::errno::Errno;
use machinefs::link::Link;
use machinefs::tree::cache::HostCache;
use machinefs::tree::guest::{GuestFiles, GuestView};
use machinefs::tree::ops::{Answer, Caller, Cancel, Files, NodeId, Op, Respond};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// How the guest behind a link is shown here.
pub fn view(slot: u32) -> GuestView {
    GuestView {
        slot,
        epoch: slot,
        owner_uid: 1000,
        owner_gid: 1000,
        default_user: (0, 0),
        map_owner: true,
        root_ino: 4711,
        cache: Arc::new(HostCache::default()),
        paused: Arc::default(),
    }
}

pub fn files(link: &Arc<Link>) -> Arc<GuestFiles> {
    Arc::new(GuestFiles::new(link.clone(), view(1)))
}

/// Gives the answer to the test.
struct Collect(Sender<Result<Answer, Errno>>);

impl Respond for Collect {
    fn respond(self: Box<Self>, answer: Result<Answer, Errno>) {
        // A test may have stopped waiting.
        let _ = self.0.send(answer);
    }

    fn set_cancel(&mut self, _cancel: Arc<dyn Cancel>) -> bool {
        true
    }
}

/// Starts an operation; the answer comes on the channel.
pub fn start(files: &GuestFiles, op: Op<'_>) -> Receiver<Result<Answer, Errno>> {
    let (sender, receiver) = channel();
    let caller = Caller { uid: 1000, gid: 1000, pid: std::process::id() };
    files.dispatch(caller, op, Box::new(Collect(sender)));
    receiver
}

/// An operation and its answer.
pub fn ask(files: &GuestFiles, op: Op<'_>) -> Result<Answer, Errno> {
    start(files, op).recv_timeout(PATIENCE).expect("an operation hangs")
}

pub fn lookup(files: &GuestFiles, parent: NodeId, name: &[u8]) -> Result<NodeId, Errno> {
    match ask(files, Op::Lookup { parent, name })? {
        Answer::Entry(entry) => Ok(entry.node),
        other => panic!("{other:?}"),
    }
}

/// What a directory's cost function is for FUSE, about.
pub fn cost(name: usize) -> usize {
    24 + name.next_multiple_of(8)
}

/// The whole listing of a directory: names and their number of reads. Ends after `most` reads.
pub fn list(files: &GuestFiles, node: NodeId, most: usize) -> Result<Vec<Box<[u8]>>, Errno> {
    let handle = match ask(files, Op::OpenDir { node, flags: 0 })? {
        Answer::Opened(opened) => opened.handle,
        other => panic!("{other:?}"),
    };
    let (mut names, mut cookie, mut result) = (Vec::new(), 0, Ok(()));
    for round in 0.. {
        assert!(round < most, "the listing does not end");
        match ask(files, Op::ReadDir { node, handle, cookie, max: 4096, plus: true, cost }) {
            Ok(Answer::Dir(entries)) => {
                let Some(last) = entries.last() else { break };
                cookie = last.cookie;
                names.extend(entries.into_iter().map(|entry| entry.name));
            }
            Ok(other) => panic!("{other:?}"),
            Err(errno) => {
                result = Err(errno);
                break;
            }
        }
    }
    ask(files, Op::ReleaseDir { node, handle }).unwrap();
    result.map(|()| names)
}
