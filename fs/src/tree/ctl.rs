//! `ctl` files: lines are carried out as they come.
//!
//! Each write is a sequence of whole lines, of which the last may lack its newline: errors must come from write, so
//! `printf stop > ctl` cannot wait for the close. The exception is a write that looks like a program's full buffer
//! ([`is_full_buffer`]): the line it was cut in is held until the next write, or the close.
//!
//! On an error the write is cut short after the last good line and the retry gets the errno; if the first line is bad,
//! the write itself gets it. Further writes fail in the same way until the writer's FLUSH.

use super::ops::{Answer, Caller, Responder};
use super::text::{Owner, Reason, is_full_buffer, same, slice};
use super::words::{self, MAX_LINE};
use crate::errno::Errno;
use crate::machine::error::MachineError;
use crate::machine::{Machine, Verb};
use parking_lot::Mutex;
use std::sync::Arc;

/// Called with the result of a line.
pub type Done = Box<dyn FnOnce(Result<(), MachineError>) + Send>;

/// Whoever carries lines out.
pub trait Commands: Send + Sync {
    /// Carries out one line; `done` may be called before this returns, or later.
    fn run(&self, caller: Caller, words: &[String], done: Done);

    /// Keeps a failed line for `errors`.
    fn failed(&self, verb: &str, errno: Errno, message: &str, line: &str);
}

/// Lines of a machine's `ctl`.
impl Commands for Arc<Machine> {
    fn run(&self, caller: Caller, words: &[String], done: Done) {
        done(self.check_owner(caller).and_then(|()| self.ctl(caller, words)));
    }

    fn failed(&self, verb: &str, errno: Errno, message: &str, line: &str) {
        self.record_error(verb, errno, message, line);
    }
}

/// An open `ctl`.
pub struct CtlFile {
    commands: Box<dyn Commands>,
    usage: Vec<u8>,
    state: Mutex<State>,
    reason: Reason,
}

#[derive(Default)]
struct State {
    /// The beginning of a line, with who wrote it.
    held: Option<(Vec<u8>, Caller, Owner)>,
    failed: Option<(Errno, Owner)>,
}

impl CtlFile {
    /// `usage` is what a read gives.
    pub fn new(commands: Box<dyn Commands>, usage: Vec<u8>) -> Arc<CtlFile> {
        Arc::new(CtlFile { commands, usage, state: Mutex::default(), reason: Reason::default() })
    }

    /// Carries out the lines of a write; answers with the bytes accepted.
    pub fn write(self: &Arc<Self>, caller: Caller, owner: Owner, data: &[u8], responder: Responder) {
        let lines = {
            let mut state = self.state.lock();
            if let Some((errno, _)) = state.failed {
                drop(state);
                return responder.respond(Err(errno));
            }
            let held = state.held.take().map(|(held, ..)| held).unwrap_or_default();
            let (lines, rest) = cut(held, data);
            state.held = rest.map(|rest| (rest, caller, owner));
            lines
        };
        let size = data.len();
        self.carry_out(
            caller,
            owner,
            lines,
            Box::new(move |result| {
                responder.respond(match result {
                    Ok(()) => Ok(Answer::Count(size as u32)),
                    Err((0, errno)) => Err(errno),
                    Err((accepted, _)) => Ok(Answer::Count(accepted as u32)),
                });
            }),
        );
    }

    /// A descriptor was closed: ends a held line, and the failing of writes.
    pub fn flush(self: &Arc<Self>, owner: Owner, responder: Responder) {
        let held = {
            let mut state = self.state.lock();
            if state.failed.is_some_and(|(_, writer)| same(writer, owner)) {
                state.failed = None;
            }
            if state.held.as_ref().is_some_and(|(.., writer)| same(*writer, owner)) { state.held.take() } else { None }
        };
        self.end_held(held, owner, responder);
    }

    /// Ends a held line, whoever wrote it.
    pub fn finish(self: &Arc<Self>, responder: Responder) {
        let held = self.state.lock().held.take();
        self.end_held(held, None, responder);
    }

    fn end_held(self: &Arc<Self>, held: Option<(Vec<u8>, Caller, Owner)>, closer: Owner, responder: Responder) {
        let Some((line, caller, owner)) = held else { return responder.respond(Ok(Answer::Ok)) };
        let file = self.clone();
        self.carry_out(
            caller,
            owner,
            vec![Line { text: line, end: 0 }],
            Box::new(move |result| {
                // This close was the writer's: what comes after it begins anew.
                if same(owner, closer) {
                    file.state.lock().failed = None;
                }
                responder.respond(result.map(|()| Answer::Ok).map_err(|(_, errno)| errno));
            }),
        );
    }

    /// Bytes at an offset: why the last line failed, else one comment line per verb.
    pub fn read(&self, offset: u64, max: usize) -> Vec<u8> {
        self.reason.read(offset, max).unwrap_or_else(|| slice(&self.usage, offset, max).to_vec())
    }

    fn carry_out(self: &Arc<Self>, caller: Caller, owner: Owner, lines: Vec<Line>, done: Finished) {
        Run { file: self.clone(), caller, owner, lines: lines.into_iter(), accepted: 0, done }.go_on();
    }
}

/// The usage lines of verbs, as comments: copying the file to itself does nothing.
pub fn usage(verbs: &[Verb]) -> String {
    let width = verbs.iter().map(|verb| verb.usage.chars().count()).max().unwrap_or(0);
    verbs.iter().map(|verb| format!("# {:width$}  {}\n", verb.usage, verb.doc)).collect()
}

#[derive(Debug, PartialEq, Eq)]
struct Line {
    text: Vec<u8>,
    /// Bytes of the write up to and with this line.
    end: usize,
}

/// Cuts a write into lines, the first of which continues what was held; the second value is what is held now.
fn cut(held: Vec<u8>, data: &[u8]) -> (Vec<Line>, Option<Vec<u8>>) {
    let mut lines = Vec::new();
    let mut begun = held;
    let mut end = 0;
    for piece in data.split_inclusive(|byte| *byte == b'\n') {
        end += piece.len();
        match piece.strip_suffix(b"\n") {
            Some(rest) => {
                begun.extend_from_slice(rest);
                lines.push(Line { text: std::mem::take(&mut begun), end });
            }
            None => begun.extend_from_slice(piece),
        }
    }
    if begun.is_empty() {
        return (lines, None);
    }
    // A line too long for the grammar is not held, but refused.
    if is_full_buffer(data.len()) && begun.len() <= MAX_LINE {
        return (lines, Some(begun));
    }
    lines.push(Line { text: begun, end });
    (lines, None)
}

/// Called at the end of a run: the error comes with the bytes accepted before it.
type Finished = Box<dyn FnOnce(Result<(), (usize, Errno)>) + Send>;

/// Lines on their way, one after the other.
struct Run {
    file: Arc<CtlFile>,
    caller: Caller,
    owner: Owner,
    lines: std::vec::IntoIter<Line>,
    accepted: usize,
    done: Finished,
}

/// Where the result of a line meets the run that waits for it: whichever comes second goes on. So a thousand lines
/// that are done at once do not nest a thousand calls.
enum Meeting {
    Empty,
    Result(Result<(), MachineError>),
    Waiting(Run, Line, String),
}

impl Run {
    fn go_on(mut self) {
        while let Some(line) = self.lines.next() {
            let words = match words::split(&line.text) {
                Ok(words) => words,
                Err(error) => return self.fail(&line, "ctl", Errno::EINVAL, &error.to_string()),
            };
            let Some(verb) = words.first().cloned() else {
                self.accepted = line.end;
                continue;
            };
            let meeting = Arc::new(Mutex::new(Meeting::Empty));
            let of_done = meeting.clone();
            let done = move |result: Result<(), MachineError>| {
                let mut met = of_done.lock();
                match std::mem::replace(&mut *met, Meeting::Empty) {
                    Meeting::Waiting(run, line, verb) => {
                        drop(met);
                        if let Some(run) = run.take_result(line, &verb, result) {
                            run.go_on();
                        }
                    }
                    _ => *met = Meeting::Result(result),
                }
            };
            self.file.commands.run(self.caller, &words, Box::new(done));
            let mut met = meeting.lock();
            match std::mem::replace(&mut *met, Meeting::Empty) {
                Meeting::Result(result) => match self.take_result(line, &verb, result) {
                    Some(run) => self = run,
                    None => return,
                },
                _ => {
                    *met = Meeting::Waiting(self, line, verb);
                    return;
                }
            }
        }
        self.file.reason.clear();
        (self.done)(Ok(()));
    }

    fn take_result(mut self, line: Line, verb: &str, result: Result<(), MachineError>) -> Option<Run> {
        match result {
            Ok(()) => {
                self.accepted = line.end;
                Some(self)
            }
            Err(error) => {
                self.fail(&line, verb, error.errno(), &error.to_string());
                None
            }
        }
    }

    fn fail(self, line: &Line, verb: &str, errno: Errno, message: &str) {
        {
            let mut state = self.file.state.lock();
            state.failed = Some((errno, self.owner));
            state.held = None;
        }
        self.file.reason.set(message);
        let shown = String::from_utf8_lossy(slice(&line.text, 0, 200)).into_owned();
        self.file.commands.failed(verb, errno, message, &shown);
        (self.done)(Err((self.accepted, errno)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::ops::{Cancel, Respond};
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Log {
        good: Mutex<Vec<String>>,
        bad: Mutex<Vec<String>>,
        later: bool,
    }

    impl Commands for Arc<Log> {
        fn run(&self, _caller: Caller, words: &[String], done: Done) {
            let result = if words[0] == "bad" {
                Err(MachineError::invalid("unknown control message \"bad\""))
            } else {
                self.good.lock().push(words.join(" "));
                Ok(())
            };
            if self.later {
                std::thread::spawn(move || done(result));
            } else {
                done(result);
            }
        }

        fn failed(&self, _verb: &str, _errno: Errno, _message: &str, line: &str) {
            self.bad.lock().push(line.to_string());
        }
    }

    struct Reply(std::sync::mpsc::Sender<Result<Answer, Errno>>);

    impl Respond for Reply {
        fn respond(self: Box<Self>, answer: Result<Answer, Errno>) {
            self.0.send(answer).unwrap();
        }

        fn set_cancel(&mut self, _cancel: Arc<dyn Cancel>) -> bool {
            true
        }
    }

    fn open(later: bool) -> (Arc<CtlFile>, Arc<Log>) {
        let log = Arc::new(Log { later, ..Log::default() });
        (CtlFile::new(Box::new(log.clone()), b"# usage\n".to_vec()), log)
    }

    fn ask(start: impl FnOnce(Responder)) -> Result<Answer, Errno> {
        let (sender, receiver) = std::sync::mpsc::channel();
        start(Box::new(Reply(sender)));
        receiver.recv().unwrap()
    }

    fn write(file: &Arc<CtlFile>, owner: u64, data: &str) -> Result<u32, Errno> {
        match ask(|responder| file.write(Caller::default(), Some(owner), data.as_bytes(), responder))? {
            Answer::Count(count) => Ok(count),
            other => panic!("{other:?}"),
        }
    }

    fn flush(file: &Arc<CtlFile>, owner: u64) -> Result<(), Errno> {
        ask(|responder| file.flush(Some(owner), responder)).map(|_| ())
    }

    #[test]
    fn lines_in_order() {
        for later in [false, true] {
            let (file, log) = open(later);
            assert_eq!(write(&file, 1, "a\n\n# no\nb 'c d'\n"), Ok(16));
            assert_eq!(write(&file, 1, "stop"), Ok(4));
            assert_eq!(*log.good.lock(), ["a", "b c d", "stop"]);
            assert_eq!(file.read(0, 100), b"# usage\n");
        }
    }

    #[test]
    fn a_write_is_cut_after_the_last_good_line() {
        for later in [false, true] {
            let (file, log) = open(later);
            assert_eq!(write(&file, 1, "a\nbad\nc\n"), Ok(2));
            assert_eq!(write(&file, 1, "bad\nc\n"), Err(Errno::EINVAL));
            assert_eq!(write(&file, 1, "d\n"), Err(Errno::EINVAL));
            assert_eq!(file.read(2, 100), b"unknown control message \"bad\"\n");
            assert_eq!(flush(&file, 2), Ok(()));
            assert_eq!(write(&file, 1, "d\n"), Err(Errno::EINVAL));
            assert_eq!(flush(&file, 1), Ok(()));
            assert_eq!(write(&file, 1, "d\n"), Ok(2));
            assert_eq!((&*log.good.lock(), &*log.bad.lock()), (&vec!["a".into(), "d".into()], &vec!["bad".into()]));
        }
    }

    #[test]
    fn a_line_cut_by_a_buffer_is_held() {
        let (file, log) = open(false);
        let first = format!("{}\nset x=12", "#".repeat(4096 - 9));
        assert_eq!(first.len(), 4096);
        assert_eq!(write(&file, 1, &first), Ok(4096));
        assert!(log.good.lock().is_empty());
        assert_eq!(write(&file, 1, "34\n"), Ok(3));
        assert_eq!(*log.good.lock(), ["set x=1234"]);
        let last = format!("{}\nba", "#".repeat(4096 - 3));
        assert_eq!(write(&file, 1, &last), Ok(4096));
        assert_eq!(write(&file, 1, "d\n"), Err(Errno::EINVAL));
        flush(&file, 1).unwrap();
        let last = format!("{}\nbad", "#".repeat(4096 - 4));
        assert_eq!(write(&file, 1, &last), Ok(4096));
        assert_eq!(flush(&file, 1), Err(Errno::EINVAL));
        assert_eq!(write(&file, 1, "e\n"), Ok(2));
    }

    #[test]
    fn a_thousand_lines_do_not_nest() {
        for (later, count) in [(false, 30_000), (true, 300)] {
            let (file, log) = open(later);
            assert_eq!(write(&file, 1, &"x\n".repeat(count)), Ok(2 * count as u32));
            assert_eq!(log.good.lock().len(), count);
        }
    }

    proptest! {
        #[test]
        fn cutting_loses_nothing(data in proptest::collection::vec("[a\n]{0,5}", 0..6)) {
            let (mut held, mut seen) = (Vec::new(), Vec::new());
            let all = data.concat();
            // Each piece alone is shorter than a buffer: its last line is whole.
            for piece in &data {
                let (lines, rest) = cut(std::mem::take(&mut held), piece.as_bytes());
                prop_assert!(lines.last().is_none_or(|line| line.end == piece.len()));
                seen.extend(lines.into_iter().flat_map(|line| line.text));
                held = rest.unwrap_or_default();
            }
            prop_assert!(held.is_empty());
            prop_assert_eq!(seen, all.replace('\n', "").into_bytes());
        }

        #[test]
        fn any_bytes_are_answered(data: Vec<u8>) {
            let (file, _log) = open(false);
            let answer = ask(|responder| file.write(Caller::default(), None, &data, responder));
            prop_assert!(answer.is_ok() || answer.is_err_and(|errno| errno == Errno::EINVAL));
        }
    }
}
