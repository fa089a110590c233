//! Open directories: a page of the listing in memory, from which readdir is answered.

use super::super::ops;
use super::attr;
use machinefs_protocol::file::{DirEntry, DirPage, Entry};
use parking_lot::Mutex;

/// Entries that a listing may have from its beginning on; after that it ends.
const MAX_ENTRIES: u64 = 50_000_000;

/// An open directory.
pub(super) struct DirHandle {
    /// The agent's handle.
    pub fh: u64,
    /// The agent's node.
    pub node: u64,
    state: Mutex<State>,
}

struct State {
    page: Page,
    /// Entries fetched since the listing was last begun.
    fetched: u64,
    closed: bool,
}

/// What a read of the listing gives.
pub(super) enum Served {
    Entries(Vec<Listed>),
    /// The page after this cookie has to be fetched.
    Fetch,
    /// Not even one entry fits.
    TooSmall,
}

/// An entry that goes to the kernel, in the guest's numbers.
pub(super) struct Listed {
    pub name: Box<[u8]>,
    pub ino: u64,
    pub kind: u8,
    pub cookie: u64,
    /// The node is handed over with it.
    pub entry: Option<Entry>,
}

/// A page, checked, as the agent sent it.
#[derive(Default)]
pub(super) struct Page {
    /// The cookie it follows.
    start: u64,
    body: Vec<u8>,
    slots: Vec<Slot>,
    end: bool,
    /// The slot that the next read is likely to begin with.
    next: usize,
    /// Something of it was delivered.
    used: bool,
}

struct Slot {
    /// Where in the body the entry begins.
    at: u32,
    cookie: u64,
    /// The node that we hold for the kernel; 0: none, or handed over.
    node: u64,
}

impl Page {
    /// Checks a page. Gives what is wrong with it, if anything.
    pub fn parse(start: u64, page: DirPage, body: Vec<u8>) -> Result<Page, &'static str> {
        let mut slots = Vec::with_capacity((page.count as usize).min(body.len() / 8));
        let mut rest = body.as_slice();
        let (mut last, mut end) = (start, page.end);
        for _ in 0..page.count {
            let at = (body.len() - rest.len()) as u32;
            let (entry, after) = postcard::take_from_bytes::<DirEntry<'_>>(rest).map_err(|_| "a page of garbage")?;
            rest = after;
            let node = check(&entry)?;
            if entry.cookie == last || entry.cookie == start {
                // It would go on for ever.
                end = true;
            }
            last = entry.cookie;
            slots.push(Slot { at, cookie: entry.cookie, node });
        }
        if !rest.is_empty() {
            return Err("a page with more than it says");
        }
        Ok(Page { start, end: end || slots.is_empty(), body, slots, next: 0, used: false })
    }

    /// The nodes that are held and were not handed over.
    pub fn held(&self) -> Vec<(u64, u64)> {
        self.slots.iter().filter(|slot| slot.node != 0).map(|slot| (slot.node, 1)).collect()
    }

    /// The slot that follows a cookie.
    fn position(&self, cookie: u64) -> Option<usize> {
        let before = |index: usize| match index.checked_sub(1) {
            None => self.start,
            Some(index) => self.slots.get(index).map_or(self.start, |slot| slot.cookie),
        };
        if before(self.next) == cookie {
            return Some(self.next);
        }
        (0..=self.slots.len()).find(|&index| before(index) == cookie)
    }

    fn serve(&mut self, cookie: u64, max: usize, plus: bool, cost: fn(usize) -> usize) -> Served {
        // From the beginning again: programs expect to see what is new.
        if cookie == 0 && self.used {
            return Served::Fetch;
        }
        let Some(first) = self.position(cookie) else { return Served::Fetch };
        if first == self.slots.len() && !self.end {
            return Served::Fetch;
        }
        self.used = true;
        self.next = first;
        let (mut entries, mut room) = (Vec::new(), max);
        for slot in self.slots.iter_mut().skip(first) {
            let bytes = self.body.get(slot.at as usize..).unwrap_or(&[]);
            // It was decoded before.
            let Ok((entry, _)) = postcard::take_from_bytes::<DirEntry<'_>>(bytes) else { break };
            let Some(left) = room.checked_sub(cost(entry.name.len())) else {
                if entries.is_empty() {
                    return Served::TooSmall;
                }
                break;
            };
            room = left;
            self.next += 1;
            let given = plus && slot.node != 0;
            if given {
                slot.node = 0;
            }
            entries.push(Listed {
                name: entry.name.into(),
                ino: entry.ino,
                kind: if entry.kind <= libc::DT_SOCK { entry.kind } else { libc::DT_UNKNOWN },
                cookie: entry.cookie,
                entry: if given { entry.entry } else { None },
            });
        }
        Served::Entries(entries)
    }
}

/// The node that an entry makes us hold (0: none), or what is wrong with it.
fn check(entry: &DirEntry<'_>) -> Result<u64, &'static str> {
    let name = entry.name;
    if name.is_empty() || name.len() > super::MAX_NAME || name.contains(&b'/') || name.contains(&0) {
        return Err("a name that is none");
    }
    // 0 is the beginning: a listing that goes on there would never end.
    if entry.cookie == 0 || entry.cookie > attr::MAX_SIZE {
        return Err("a cookie out of range");
    }
    match &entry.entry {
        None => Ok(0),
        Some(_) if name == b"." || name == b".." => Err("a node for . or .."),
        Some(entry) => attr::check_entry(entry).map(|()| entry.node),
    }
}

impl DirHandle {
    /// With its first page.
    pub fn new(fh: u64, node: u64, page: Page) -> DirHandle {
        let fetched = page.slots.len() as u64;
        DirHandle { fh, node, state: Mutex::new(State { page, fetched, closed: false }) }
    }

    /// Reads on from memory.
    pub fn read(&self, cookie: u64, max: usize, plus: bool, cost: fn(usize) -> usize) -> Served {
        self.state.lock().page.serve(cookie, max, plus, cost)
    }

    /// A page was fetched. Gives the nodes that nobody will ask for any more, and whether the directory is still
    /// open.
    pub fn install(&self, mut page: Page) -> (Vec<(u64, u64)>, bool) {
        let mut state = self.state.lock();
        if state.closed {
            return (page.held(), false);
        }
        let before = if page.start == 0 { 0 } else { state.fetched };
        state.fetched = before.saturating_add(page.slots.len() as u64);
        page.end |= state.fetched > MAX_ENTRIES;
        (std::mem::replace(&mut state.page, page).held(), true)
    }

    /// It is closed. Gives the nodes that were never handed over.
    pub fn close(&self) -> Vec<(u64, u64)> {
        let mut state = self.state.lock();
        state.closed = true;
        std::mem::take(&mut state.page).held()
    }
}

impl Listed {
    /// As the front end takes it.
    pub fn into_host(self, ino: u64, entry: Option<ops::Entry>) -> ops::DirEntry {
        ops::DirEntry { name: self.name, ino, kind: self.kind, cookie: self.cookie, entry }
    }
}
