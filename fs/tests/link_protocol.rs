//! The link against an agent that lies: nothing it sends ends in a panic, a hang, or memory that grows.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod link_support;

use link_support::{Agent, Frame, Host, OP_DEADLINE, PATIENCE, connect, resident, until};
use machinefs::errno::Errno;
use machinefs::link::{LinkError, RequestOptions, Response, StreamSink};
use machinefs_protocol::file::{FileReply, FileRequest, SetAttr};
use machinefs_protocol::frame::{FLAG_MORE, HEADER_LEN, Header, Kind, MAX_DATA, decode_meta, encode_meta};
use machinefs_protocol::job::{INITIAL_CREDIT, Source, record_header};
use machinefs_protocol::message::{Credit, Event, Notice, Reply, Request};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Memory that a flood may take in passing; allocators keep some of it.
const ROOM: usize = 160 << 20;
const LONG: Duration = Duration::from_secs(600);
const GETATTR: Request<'_> = Request::File(FileRequest::GetAttr { node: 2, fh: None });

/// Those that look at this process's memory run one after the other.
static ALONE: Mutex<()> = Mutex::new(());

type Answers = Receiver<Result<Response, LinkError>>;

fn send(host: &Host, request: &Request<'_>, body: &[u8], options: RequestOptions) -> Answers {
    let (sender, receiver) = channel();
    host.link.request(
        request,
        body,
        options,
        Box::new(move |answer| {
            let _ = sender.send(answer);
        }),
    );
    receiver
}

fn ask(host: &Host, request: &Request<'_>) -> Answers {
    send(host, request, &[], RequestOptions::within(host.link.op_deadline()))
}

fn got(answers: &Answers) -> Result<Response, LinkError> {
    answers.recv_timeout(PATIENCE).expect("a request hangs")
}

fn errno(answers: &Answers) -> Errno {
    got(answers).expect_err("an answer").errno()
}

fn read(size: u32) -> Request<'static> {
    Request::File(FileRequest::Read { fh: 9, offset: 0, size })
}

// --- frames -------------------------------------------------------------------------------------------------------

/// A lie for which the link ends: what was pending fails, and the news come.
fn ends(what: &str, lie: impl FnOnce(&mut Agent, u64)) {
    let (host, mut agent) = connect(LONG);
    let waiting = ask(&host, &read(4096));
    let tag = agent.next_request().unwrap().header.tag;
    lie(&mut agent, tag);
    assert_eq!(errno(&waiting), Errno::EHOSTUNREACH, "{what}");
    assert!(matches!(host.lost(), LinkError::Lie(_)), "{what}");
    assert_eq!(errno(&ask(&host, &GETATTR)), Errno::EHOSTUNREACH, "{what}: afterwards");
    assert_eq!(host.link.pending(), (0, 0));
    while agent.next().is_some() {}
}

fn raw_header(agent: &Agent, kind: u8, meta_len: u16, data_len: u32, tag: u64) -> [u8; HEADER_LEN] {
    let header = Header { kind: Kind::Reply, flags: 0, meta_len, data_len, seq: agent.seq, deadline_ms: 0, tag };
    let mut bytes = header.encode();
    bytes[0] = kind;
    bytes
}

#[test]
fn frames_that_are_none_end_the_link() {
    for kind in [0, 11, 255] {
        ends("kind", |agent, tag| agent.raw(&raw_header(agent, kind, 0, 0, tag)).unwrap());
    }
    ends("4 GiB of data", |agent, tag| agent.raw(&raw_header(agent, 3, 2, u32::MAX, tag)).unwrap());
    ends("a byte too much data", |agent, tag| agent.raw(&raw_header(agent, 3, 2, MAX_DATA as u32 + 1, tag)).unwrap());
    ends("64 KiB of message", |agent, tag| agent.raw(&raw_header(agent, 3, u16::MAX, 0, tag)).unwrap());
    for jump in [1, u32::MAX, 1 << 31] {
        ends("sequence", |agent, tag| {
            agent.seq = agent.seq.wrapping_add(jump);
            let _ = agent.reply(tag, &Reply::File(FileReply::Data), &[]);
        });
    }
    for kind in [Kind::Hello, Kind::Request, Kind::Cancel, Kind::Notice] {
        ends("what only the host says", |agent, tag| agent.frame(kind, 0, tag, &[], &[]).unwrap());
    }
    ends("a reply of garbage", |agent, tag| agent.frame(Kind::Reply, 0, tag, &[0xff; 40], &[]).unwrap());
    ends("a reply with more behind it", |agent, tag| agent.frame(Kind::Reply, 0, tag, &[0, 0], &[]).unwrap());
    ends("a failure of garbage", |agent, tag| agent.frame(Kind::Error, 0, tag, &[0xff; 40], &[]).unwrap());
    ends("an event of garbage", |agent, _| agent.frame(Kind::Event, 0, 0, &[7], &[]).unwrap());
    ends("an event with a body", |agent, _| {
        let mut meta = Vec::new();
        encode_meta(&ended(1, 0, 0), &mut meta).unwrap();
        agent.frame(Kind::Event, 0, 0, &meta, b"x").unwrap();
    });
}

#[test]
fn bodies_that_were_not_asked_for_end_the_link() {
    let data = Reply::File(FileReply::Data);
    ends("longer than asked", |agent, tag| agent.reply(tag, &data, &[b'x'; 4097]).unwrap());
    ends("longer than asked, in pieces", |agent, tag| {
        agent.message(Kind::Reply, FLAG_MORE, tag, &data, &[b'x'; 4000]).unwrap();
        agent.frame(Kind::Body, 0, tag, &[], &[b'x'; 97]).unwrap();
    });
    ends("pieces of nothing", |agent, tag| {
        agent.message(Kind::Reply, FLAG_MORE, tag, &data, b"x").unwrap();
        agent.frame(Kind::Body, FLAG_MORE, tag, &[], &[]).unwrap();
    });
    ends("a body without a reply", |agent, tag| agent.frame(Kind::Body, 0, tag, &[], b"x").unwrap());
    ends("a body with a message", |agent, tag| {
        agent.message(Kind::Reply, FLAG_MORE, tag, &data, b"x").unwrap();
        agent.frame(Kind::Body, 0, tag, b"m", b"x").unwrap();
    });
    ends("a reply in the midst of a reply", |agent, tag| {
        agent.message(Kind::Reply, FLAG_MORE, tag, &data, b"x").unwrap();
        agent.message(Kind::Reply, 0, tag, &data, b"x").unwrap();
    });
    ends("a failure in the midst of a reply", |agent, tag| {
        agent.message(Kind::Reply, FLAG_MORE, tag, &data, b"x").unwrap();
        agent.failure(tag, libc::EIO).unwrap();
    });
    ends("a long reply to nothing", |agent, tag| {
        agent.message(Kind::Reply, FLAG_MORE, tag + 1000, &data, b"x").unwrap();
    });
}

#[test]
fn a_reply_of_the_wrong_kind_fails_its_request_only() {
    let (host, mut agent) = connect(LONG);
    for reply in [Reply::Ok, Reply::Data, Reply::File(FileReply::Ok), Reply::File(FileReply::Opened(1))] {
        let waiting = ask(&host, &read(4096));
        let tag = agent.next_request().unwrap().header.tag;
        agent.reply(tag, &reply, b"some bytes").unwrap();
        assert_eq!(errno(&waiting), Errno::EHOSTUNREACH, "{reply:?}");
    }
    let waiting = ask(&host, &read(4096));
    let tag = agent.next_request().unwrap().header.tag;
    agent.reply(tag, &Reply::File(FileReply::Data), b"right").unwrap();
    assert_eq!(got(&waiting).unwrap().body, b"right");
}

#[test]
fn replies_nobody_asked_for_and_replies_twice_are_counted_and_end_the_link() {
    let _alone = ALONE.lock();
    let (host, mut agent) = connect(LONG);
    let waiting = ask(&host, &read(4096));
    let tag = agent.next_request().unwrap().header.tag;
    let data = Reply::File(FileReply::Data);
    for (tag, body) in [(tag + 1, &b"wrong"[..]), (u64::MAX, b""), (0, b""), (tag, b"right"), (tag, b"again")] {
        agent.reply(tag, &data, body).unwrap();
    }
    agent.failure(tag, libc::EIO).unwrap();
    assert_eq!(got(&waiting).unwrap().body, b"right");
    let before = resident();
    // A flood of large ones: dropped as they come, and the end when there are too many.
    let large = vec![b'x'; MAX_DATA];
    while agent.reply(tag, &data, &large).is_ok() {}
    assert!(matches!(host.lost(), LinkError::Lie(_)));
    assert!(resident() < before + ROOM, "memory grew");
}

#[test]
fn errnos_that_are_none_do_not_reach_the_kernel() {
    let (host, mut agent) = connect(LONG);
    for (number, expected) in [
        (libc::ENOENT, Errno::ENOENT),
        (libc::ENOSYS, Errno::EOPNOTSUPP),
        (0, Errno::EHOSTUNREACH),
        (-2, Errno::EHOSTUNREACH),
        (512, Errno::EHOSTUNREACH),
        (i32::MAX, Errno::EHOSTUNREACH),
    ] {
        let waiting = ask(&host, &GETATTR);
        let tag = agent.next_request().unwrap().header.tag;
        agent.failure(tag, number).unwrap();
        assert_eq!(errno(&waiting), expected, "{number}");
    }
}

#[test]
fn unfinished_replies_do_not_pile_up() {
    let _alone = ALONE.lock();
    let (host, mut agent) = connect(LONG);
    let before = resident();
    let waiting: Vec<Answers> = (0..1000).map(|_| ask(&host, &read(1 << 20))).collect();
    let tags: Vec<u64> = waiting.iter().map(|_| agent.next_request().unwrap().header.tag).collect();
    // All but the last byte of each.
    let large = vec![b'x'; MAX_DATA];
    'all: for tag in tags {
        if agent.message(Kind::Reply, FLAG_MORE, tag, &Reply::File(FileReply::Data), &large).is_err() {
            break;
        }
        for _ in 0..2 {
            if agent.frame(Kind::Body, FLAG_MORE, tag, &[], &large).is_err() {
                break 'all;
            }
        }
    }
    assert!(matches!(host.lost(), LinkError::Lie(_)));
    assert!(resident() < before + ROOM, "memory grew by {} MiB", (resident() - before) >> 20);
    assert!(waiting.iter().all(|answers| errno(answers) == Errno::EHOSTUNREACH));
}

// --- silence ------------------------------------------------------------------------------------------------------

/// A silence of the agent: requests end within their deadline, new ones at once, the stream's other end can go on.
fn silence(begin: impl FnOnce(&mut Agent, u64)) -> (Host, Agent, u64) {
    let (host, mut agent) = connect(OP_DEADLINE);
    let waiting = [ask(&host, &GETATTR), ask(&host, &read(100))];
    let lock = send(&host, &GETATTR, &[], RequestOptions::forever());
    let tag = agent.next_request().unwrap().header.tag;
    begin(&mut agent, tag);
    for answers in &waiting {
        assert!([Errno::ETIMEDOUT, Errno::EHOSTUNREACH].contains(&errno(answers)));
    }
    // A file operation without a deadline does not outlive the agent's silence.
    assert_eq!(errno(&lock), Errno::EHOSTUNREACH);
    assert!(!host.link.is_responsive());
    assert_eq!(errno(&ask(&host, &GETATTR)), Errno::EHOSTUNREACH);
    (host, agent, tag)
}

#[test]
fn a_silent_agent_fails_what_waits_and_may_come_back() {
    let (host, mut agent, tag) = silence(|_, _| {});
    // What it answers late is given back.
    agent.reply(tag, &Reply::File(FileReply::Attr(link_support::guest::attr(2))), &[]).unwrap();
    until("it answers again", || host.link.is_responsive());
    let waiting = ask(&host, &GETATTR);
    let tag = loop {
        let frame = agent.next_request().unwrap();
        match decode_meta(&frame.meta).unwrap() {
            Request::Ping => agent.reply(frame.header.tag, &Reply::Ok, &[]).unwrap(),
            request if request == GETATTR && frame.header.deadline_ms > 0 && frame.header.tag > tag + 2 => {
                break frame.header.tag;
            }
            _ => {}
        }
    };
    agent.reply(tag, &Reply::File(FileReply::Attr(link_support::guest::attr(2))), &[]).unwrap();
    got(&waiting).unwrap();
}

#[test]
fn half_a_frame_and_then_silence() {
    silence(|agent, tag| agent.raw(&raw_header(agent, 3, 100, 200, tag)[..13]).unwrap());
    silence(|agent, tag| agent.raw(&raw_header(agent, 3, 100, 200, tag)).unwrap());
    silence(|agent, tag| {
        let (data, seq) = (vec![b'x'; 50], agent.seq);
        agent.message(Kind::Reply, FLAG_MORE, tag, &Reply::Data, &[]).unwrap_or_default();
        agent.seq = seq;
        let _ = agent.raw(&data);
    });
}

#[test]
fn an_agent_that_says_something_but_never_answers() {
    let (host, agent) = connect(OP_DEADLINE);
    let mut stream = agent.stream.try_clone().unwrap();
    let header = raw_header(&agent, 10, 0, MAX_DATA as u32, 0);
    let done = Arc::new(AtomicUsize::new(0));
    let ended = done.clone();
    let trickle = std::thread::spawn(move || {
        use std::io::Write;
        for &byte in header.iter().chain(std::iter::repeat(&0)) {
            if ended.load(Ordering::SeqCst) > 0 || stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(OP_DEADLINE / 20);
        }
    });
    for _ in 0..3 {
        let error = errno(&ask(&host, &GETATTR));
        assert!([Errno::ETIMEDOUT, Errno::EHOSTUNREACH].contains(&error), "{error:?}");
    }
    done.store(1, Ordering::SeqCst);
    trickle.join().unwrap();
}

#[test]
fn late_answers_are_given_back() {
    let (host, mut agent) = connect(OP_DEADLINE);
    let open = Request::File(FileRequest::Open { node: 2, flags: 0, kill_suidgid: false });
    let waiting = ask(&host, &open);
    let tag = agent.next_request().unwrap().header.tag;
    let error = errno(&waiting);
    assert!([Errno::ETIMEDOUT, Errno::EHOSTUNREACH].contains(&error), "{error:?}");
    agent.reply(tag, &Reply::File(FileReply::Opened(77)), &[]).unwrap();
    loop {
        let frame = agent.next().unwrap();
        match frame.header.kind {
            Kind::Notice => {
                let notice: Notice = decode_meta(&frame.meta).unwrap();
                assert!(matches!(notice, Notice::Release { fh: 77, .. }), "{notice:?}");
                break;
            }
            _ => assert!(matches!(frame.header.kind, Kind::Cancel | Kind::Request)),
        }
    }
    until("no debt is left but a ping", || host.link.pending().1 == 0);
}

// --- an agent that takes nothing ------------------------------------------------------------------------------------

#[test]
fn an_agent_that_reads_nothing_does_not_fill_the_memory() {
    let _alone = ALONE.lock();
    let (host, _agent) = connect(LONG);
    let before = resident();
    let write = Request::File(FileRequest::Write { fh: 9, offset: 0, kill_suidgid: false });
    let body = vec![b'x'; 128 * 1024];
    let mut refused = 0;
    let waiting: Vec<Answers> = (0..4000).map(|_| send(&host, &write, &body, RequestOptions::within(LONG))).collect();
    for answers in &waiting {
        if let Ok(answer) = answers.try_recv() {
            assert_eq!(answer.unwrap_err().errno(), Errno::EHOSTUNREACH);
            refused += 1;
        }
    }
    assert!(refused > 3000, "{refused} of 4000 writes of 128 KiB refused");
    assert!(host.link.queued() <= 64 << 20);
    assert!(resident() < before + ROOM, "memory grew");
    host.link.close();
    assert!(waiting.iter().filter(|answers| answers.try_recv().is_ok()).count() >= 4000 - refused);
}

#[test]
fn requests_that_are_never_answered_are_bounded() {
    let (host, mut agent) = connect(LONG);
    // It takes them, and that is all.
    std::thread::spawn(move || while agent.next().is_some() {});
    let mut waiting = Vec::new();
    let refused = loop {
        let answers = ask(&host, &GETATTR);
        match answers.try_recv() {
            Ok(answer) => break answer.unwrap_err(),
            Err(_) => waiting.push(answers),
        }
        assert!(waiting.len() <= 1 << 20, "no limit");
    };
    assert_eq!(refused.errno(), Errno::EHOSTUNREACH);
    host.link.close();
    assert!(waiting.iter().all(|answers| errno(answers) == Errno::EHOSTUNREACH));
}

#[test]
fn forgets_that_nobody_takes_are_bounded() {
    let _alone = ALONE.lock();
    let (host, _agent) = connect(LONG);
    let before = resident();
    // Something waits in the queue, so that forgets do too.
    let write = Request::File(FileRequest::Write { fh: 9, offset: 0, kill_suidgid: false });
    let body = vec![b'x'; 8 << 20];
    let _waiting = send(&host, &write, &body, RequestOptions::within(LONG));
    for node in 2..4_000_000u64 {
        host.link.notice(&Notice::Forget(vec![(node, 1)]));
    }
    assert!(resident() < before + ROOM, "memory grew");
    assert!(matches!(host.lost(), LinkError::Lost(_)));
}

// --- streams and events -----------------------------------------------------------------------------------------------

fn ended(job: u64, log_end: u64, time: u64) -> Event {
    let reason = machinefs_protocol::job::ExitReason::Code(0);
    let end = machinefs_protocol::job::JobEnd { reason, log_end, cpu_micros: time, max_rss_kib: time, ended_ms: time };
    Event::JobEnded { job, end }
}

#[derive(Default)]
struct Counting {
    bytes: AtomicUsize,
    lost: AtomicUsize,
    refuses: bool,
}

impl StreamSink for Counting {
    fn records(&self, records: &[u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.bytes.fetch_add(records.len(), Ordering::SeqCst);
        if self.refuses { Err("it takes nothing".into()) } else { Ok(()) }
    }

    fn lost(&self) {
        self.lost.fetch_add(1, Ordering::SeqCst);
    }
}

/// A link with a stream that the agent has agreed to.
fn stream(sink: Arc<Counting>) -> (Host, Agent, u64) {
    let (host, mut agent) = connect(LONG);
    let tag = host.link.attach(5, 0, sink);
    assert_eq!(agent.next_request().unwrap().header.tag, tag);
    agent.reply(tag, &Reply::Ok, &[]).unwrap();
    (host, agent, tag)
}

fn record(len: usize) -> Vec<u8> {
    [&record_header(Source::Stdout, len)[..], &vec![b'x'; len]].concat()
}

#[test]
fn streams_that_are_none_end_the_link() {
    let cases: [(&str, Vec<u8>); 6] = [
        ("no such source", vec![0, 0, 0, 9]),
        ("cut in the header", vec![1, 0]),
        ("cut in the body", record(100)[..50].to_vec()),
        ("a record over its limit", [0xff, 0xff, 0xff, 1].to_vec()),
        ("a gap without a body", record_header(Source::Gap, 0).to_vec()),
        ("bytes behind the last", [record(5), vec![1]].concat()),
    ];
    for (what, bytes) in cases {
        let sink = Arc::new(Counting::default());
        let (host, mut agent, tag) = stream(sink.clone());
        agent.frame(Kind::Data, 0, tag, &[], &bytes).unwrap();
        assert!(matches!(host.lost(), LinkError::Lie(_)), "{what}");
        assert_eq!((sink.bytes.load(Ordering::SeqCst), sink.lost.load(Ordering::SeqCst)), (0, 1), "{what}");
    }
}

#[test]
fn data_beyond_the_credit_ends_the_link() {
    let _alone = ALONE.lock();
    let sink = Arc::new(Counting::default());
    let (host, mut agent, tag) = stream(sink.clone());
    let before = resident();
    let data = record(60_000);
    // Credit is granted as the sink takes it; this agent sends without looking.
    let mut sent = 0;
    let (rest, refused) = (INITIAL_CREDIT as usize / data.len() + 1, 1000);
    while sent < refused * rest && agent.frame(Kind::Data, 0, tag, &[], &data).is_ok() {
        sent += 1;
        if sent % 50 == 0 && host.news.try_recv().is_ok() {
            break;
        }
    }
    assert!(resident() < before + ROOM, "memory grew");
    let taken = sink.bytes.load(Ordering::SeqCst);
    assert!(taken > 0 && taken <= sent * data.len(), "{taken} bytes were taken of {sent} records");
    host.link.close();
}

#[test]
fn a_sink_that_refuses_gets_no_more_than_its_credit() {
    let sink = Arc::new(Counting { refuses: true, ..Counting::default() });
    let (host, mut agent, tag) = stream(sink.clone());
    let data = record(60_000);
    while agent.frame(Kind::Data, 0, tag, &[], &data).is_ok() {}
    assert!(matches!(host.lost(), LinkError::Lie(_)));
    assert_eq!(sink.bytes.load(Ordering::SeqCst), data.len(), "nothing after the refusal");
    // Whoever refuses knows.
    assert_eq!(sink.lost.load(Ordering::SeqCst), 0);
}

#[test]
fn data_and_credit_of_no_stream_are_dropped_and_counted() {
    let _alone = ALONE.lock();
    let (host, mut agent) = connect(LONG);
    let before = resident();
    for tag in [0, 1, u64::MAX] {
        agent.frame(Kind::Data, 0, tag, &[], &[7; 1000]).unwrap();
        agent.message(Kind::Credit, 0, tag, &Credit { bytes: u64::MAX }, &[]).unwrap();
    }
    let waiting = ask(&host, &read(10));
    let tag = agent.next_request().unwrap().header.tag;
    agent.reply(tag, &Reply::File(FileReply::Data), b"there").unwrap();
    assert_eq!(got(&waiting).unwrap().body, b"there");
    while agent.frame(Kind::Data, 0, 77, &[], &vec![7; MAX_DATA]).is_ok() {}
    assert!(matches!(host.lost(), LinkError::Lie(_)));
    assert!(resident() < before + ROOM, "memory grew");
}

#[test]
fn credit_on_a_stream_of_output_is_no_harm() {
    let sink = Arc::new(Counting::default());
    let (host, mut agent, tag) = stream(sink.clone());
    for bytes in [0, 1, u64::MAX, u64::MAX] {
        agent.message(Kind::Credit, 0, tag, &Credit { bytes }, &[]).unwrap();
    }
    agent.frame(Kind::Data, 0, tag, &[], &record(10)).unwrap();
    until("the data", || sink.bytes.load(Ordering::SeqCst) == record(10).len());
    assert!(host.link.is_responsive());
}

#[test]
fn gaps_and_ends_to_impossible_places_are_no_harm() {
    let sink = Arc::new(Counting::default());
    let (host, mut agent, tag) = stream(sink.clone());
    let mut gap = record_header(Source::Gap, 24).to_vec();
    gap.extend([u64::MAX; 3].into_iter().flat_map(u64::to_le_bytes));
    gap.extend(record(10));
    agent.frame(Kind::Data, 0, tag, &[], &gap).unwrap();
    agent.frame(Kind::Data, 0, tag, &[], &gap).unwrap();
    for end in [0, 5, u64::MAX, 5, 5] {
        agent.event(&ended(5, end, u64::MAX)).unwrap();
    }
    for _ in 0..5 {
        host.news.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    assert!(host.link.is_responsive());
}

#[test]
fn a_storm_of_events_takes_no_memory() {
    let _alone = ALONE.lock();
    let (host, mut agent) = connect(LONG);
    let before = resident();
    let listener = std::thread::spawn(move || (host.news.iter().take(200_000).count(), host));
    let mut meta = Vec::new();
    for job in 0..200_000u64 {
        encode_meta(&ended(job, u64::MAX, job), &mut meta).unwrap();
        agent.frame(Kind::Event, 0, 0, &meta, &[]).unwrap();
    }
    let (heard, host) = listener.join().unwrap();
    assert_eq!(heard, 200_000);
    assert!(resident() < before + ROOM, "memory grew");
    let waiting = ask(&host, &GETATTR);
    let Frame { header, .. } = agent.next_request().unwrap();
    agent.failure(header.tag, libc::ENOENT).unwrap();
    assert_eq!(errno(&waiting), Errno::ENOENT);
}

// --- this side ------------------------------------------------------------------------------------------------------

#[test]
fn a_defect_in_whoever_asked_does_not_leave_a_link_that_nobody_reads() {
    let (host, mut agent) = connect(LONG);
    host.link.request(&GETATTR, &[], RequestOptions::within(LONG), Box::new(|_| panic!("a defect")));
    let waiting = ask(&host, &GETATTR);
    let tag = agent.next_request().unwrap().header.tag;
    agent.failure(tag, libc::ENOENT).unwrap();
    assert_eq!(errno(&waiting), Errno::EHOSTUNREACH);
    host.lost();
}

#[test]
fn tags_of_two_links_of_one_session_differ() {
    let (first, _agent) = connect(LONG);
    let (second, _agent) = connect(LONG);
    let tags = [&first, &second].map(|host| (0..100).map(|_| host.link.next_tag()).collect::<Vec<_>>());
    assert!(tags[0].iter().all(|tag| *tag != 0 && !tags[1].contains(tag)), "{tags:?}");
}

#[test]
fn a_request_that_changes_something_is_not_given_up_for_a_signal() {
    use machinefs::link::Interrupt;
    let (host, mut agent) = connect(LONG);
    let set = Request::File(FileRequest::SetAttr { node: 2, fh: None, set: SetAttr::default() });
    let (sender, answers) = channel();
    let options = RequestOptions::within(LONG).interrupt(Interrupt::Change { pid: std::process::id() });
    let done = Box::new(move |answer| {
        let _ = sender.send(answer);
    });
    let tag = host.link.request(&set, &[], options, done);
    host.link.cancel(tag);
    assert_eq!(agent.next().unwrap().header.tag, tag);
    assert!(answers.recv_timeout(Duration::from_millis(300)).is_err(), "it was given up");
    agent.reply(tag, &Reply::File(FileReply::Attr(link_support::guest::attr(2))), &[]).unwrap();
    got(&answers).unwrap();
}
