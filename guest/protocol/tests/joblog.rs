//! The job log against a naive model.
#![allow(clippy::unwrap_used)]

use machinefs_protocol::job::{MAX_RECORD, Source, record_header};
use machinefs_protocol::joblog::{Chunk, Cursor, FILE_HEADER, Filter, JobLog, MEMORY_LIMIT, MIN_LIMIT, Opener, Totals};
use proptest::prelude::*;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn opener() -> Opener {
    Box::new(tempfile)
}

fn tempfile() -> io::Result<File> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let name = format!("mfs-joblog-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}

/// Every output there ever was.
#[derive(Default)]
struct Model {
    records: Vec<(Source, Vec<u8>)>,
    state: u8,
}

impl Model {
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len)
            .map(|_| {
                self.state = self.state.wrapping_mul(13).wrapping_add(7);
                self.state ^ (self.records.len() as u8)
            })
            .collect()
    }

    fn output(&self, filter: Filter) -> Vec<u8> {
        let wanted = |source: &Source| match filter {
            Filter::All => true,
            Filter::Stdout => *source == Source::Stdout,
            Filter::Stderr => *source == Source::Stderr,
        };
        self.records.iter().filter(|(source, _)| wanted(source)).flat_map(|(_, body)| body.clone()).collect()
    }

    /// Which of its records a log of that limit keeps: from the front, and from the back.
    fn kept(&self, limit: u64) -> (usize, usize) {
        let sizes: Vec<u64> = self.records.iter().map(|(_, body)| body.len() as u64 + 4).collect();
        let mut sum = 0;
        let front = sizes
            .iter()
            .take_while(|size| {
                sum += **size;
                sum <= limit / 2
            })
            .count();
        sum = 0;
        let room = limit - limit / 2;
        let back = sizes[front..]
            .iter()
            .rev()
            .take_while(|size| {
                sum += **size;
                sum <= room
            })
            .count();
        (front, back)
    }
}

/// Reads all of it, checking each byte and each gap against what was printed.
fn check_output(log: &JobLog, model: &Model, filter: Filter, max: usize) -> (u64, u64) {
    let all = model.output(filter);
    let mut cursor = Cursor::start();
    let (mut at, mut kept, mut lost) = (0usize, 0u64, 0u64);
    loop {
        match log.read_source(&mut cursor, filter, max).unwrap() {
            Chunk::Data(data) if data.is_empty() => break,
            Chunk::Data(data) => {
                assert!(data.len() <= max);
                assert!(all[at..].starts_with(&data), "wrong bytes at {at}");
                at += data.len();
                kept += data.len() as u64;
            }
            Chunk::Gap(gap) => {
                assert!(gap.of(filter) > 0);
                at += gap.of(filter) as usize;
                lost += gap.of(filter);
            }
        }
        assert_eq!(cursor.output().of(filter), at as u64);
    }
    assert_eq!(at, all.len());
    assert_eq!(log.totals().of(filter), at as u64);
    assert_eq!(log.lost().of(filter), lost);
    (kept, lost)
}

fn check(log: &JobLog, model: &Model, max: usize) {
    for filter in [Filter::All, Filter::Stdout, Filter::Stderr] {
        check_output(log, model, filter, max);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Append(bool, usize),
    /// The replica reads at most so much, in one go.
    Follow(usize),
    /// The replica's link is lost: it goes on at its end.
    Resume,
    Save,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![1usize..40, 1usize..600, 500usize..9000, 1usize..(3 * MAX_RECORD)];
    let step = prop_oneof![
        6 => (any::<bool>(), len).prop_map(|(stderr, len)| Step::Append(stderr, len)),
        3 => (28usize..300_000).prop_map(Step::Follow),
        1 => Just(Step::Resume),
        1 => Just(Step::Save),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn keeps_both_ends_exactly(limit in prop_oneof![0u64..20_000, 0u64..400_000], steps in steps(), max in 1usize..100_000) {
        let mut log = JobLog::new(limit, opener());
        let limit = limit.max(MIN_LIMIT);
        let piece = ((limit - limit / 2) / 4).clamp(512, MAX_RECORD as u64) as usize;
        let mut model = Model::default();
        for step in &steps {
            let Step::Append(stderr, len) = step else { continue };
            let source = if *stderr { Source::Stderr } else { Source::Stdout };
            let bytes = model.bytes(*len);
            log.append(source, &bytes);
            model.records.extend(bytes.chunks(piece).map(|body| (source, body.to_vec())));
        }
        let sizes: u64 = model.records.iter().map(|(_, body)| body.len() as u64 + 4).sum();
        prop_assert_eq!(log.end(), sizes);
        prop_assert!(log.memory() <= 2 * MEMORY_LIMIT);
        check(&log, &model, max);
        // Exactly the records of the model are kept.
        let (front, back) = model.kept(limit);
        let mut expected = Vec::new();
        let dropped = &model.records[front..model.records.len() - back];
        for (at, (source, body)) in model.records.iter().enumerate() {
            if at == front && !dropped.is_empty() {
                let target: u64 = model.records[..front + dropped.len()].iter().map(|(_, b)| b.len() as u64 + 4).sum();
                let lost = |wanted| dropped.iter().filter(|(s, _)| *s == wanted).map(|(_, b)| b.len() as u64).sum::<u64>();
                expected.extend(record_header(Source::Gap, 24));
                for word in [target, lost(Source::Stdout), lost(Source::Stderr)] {
                    expected.extend(word.to_le_bytes());
                }
            }
            if at < front || at >= front + dropped.len() {
                expected.extend(record_header(*source, body.len()));
                expected.extend(body);
            }
        }
        let (mut cursor, mut got) = (Cursor::start(), Vec::new());
        loop {
            let records = log.read_records(&mut cursor, max.max(MAX_RECORD + 4)).unwrap();
            if records.is_empty() { break }
            got.extend(records);
        }
        prop_assert_eq!(cursor.offset(), log.end());
        prop_assert!(got == expected, "the records kept differ");
    }

    #[test]
    fn a_replica_follows(limit in 0u64..200_000, other in 0u64..200_000, steps in steps(), max in 1usize..70_000) {
        let mut log = JobLog::new(limit, opener());
        let file = Arc::new(tempfile().unwrap());
        let theirs = file.clone();
        let mut replica = JobLog::new(other, Box::new(move || theirs.try_clone()));
        let mut saved: Option<(u64, Totals)> = None;
        let mut model = Model::default();
        let mut cursor = Cursor::start();
        for step in &steps {
            match step {
                Step::Append(stderr, len) => {
                    let source = if *stderr { Source::Stderr } else { Source::Stdout };
                    let bytes = model.bytes(*len);
                    log.append(source, &bytes);
                    model.records.push((source, bytes));
                }
                Step::Follow(max) => {
                    let records = log.read_records(&mut cursor, *max).unwrap();
                    prop_assert!(records.len() <= *max);
                    replica.append_records(&records).unwrap();
                    prop_assert_eq!(replica.end(), cursor.offset());
                }
                Step::Resume => {
                    // A cursor among dropped records is an estimate: only resume where it is exact.
                    let known = cursor;
                    let found = log.cursor_at(replica.end()).unwrap().unwrap();
                    prop_assert_eq!(found.offset(), replica.end());
                    let next = log.read_records(&mut found.clone(), 100_000).unwrap();
                    if next.get(3) != Some(&3) {
                        prop_assert_eq!(found, known);
                    }
                }
                Step::Save => {
                    replica.save().unwrap();
                    saved = Some((replica.end(), replica.totals()));
                }
            }
        }
        if let Some((end, totals)) = saved {
            // As after a crash: what was saved last, though more was written since.
            let loaded = JobLog::load(file.try_clone().unwrap()).unwrap();
            prop_assert!(loaded.end() >= end && loaded.totals().of(Filter::All) >= totals.of(Filter::All));
            let totals = loaded.totals();
            let mut before = Model::default();
            let mut left = totals;
            for (source, body) in &model.records {
                let left = if *source == Source::Stdout { &mut left.stdout } else { &mut left.stderr };
                let take = body.len().min(*left as usize);
                *left -= take as u64;
                before.records.push((*source, body[..take].to_vec()));
            }
            for filter in [Filter::Stdout, Filter::Stderr] {
                check_output(&loaded, &before, filter, max);
            }
        }
        loop {
            let records = log.read_records(&mut cursor, 300_000).unwrap();
            if records.is_empty() { break }
            replica.append_records(&records).unwrap();
        }
        prop_assert_eq!(replica.end(), log.end());
        prop_assert_eq!(replica.totals(), log.totals());
        check(&replica, &model, max);
        replica.save().unwrap();
        let loaded = JobLog::load(file.try_clone().unwrap()).unwrap();
        check(&loaded, &model, max);
        prop_assert!(file.metadata().unwrap().len() <= FILE_HEADER + other.max(MIN_LIMIT));
    }

    #[test]
    fn bad_records_are_refused(bytes in prop::collection::vec(prop_oneof![Just(0u8), 0u8..4, any::<u8>()], 0..400)) {
        let mut log = JobLog::new(8192, opener());
        log.append(Source::Stdout, b"before");
        let end = log.end();
        if log.append_records(&bytes).is_err() {
            prop_assert_eq!(log.end(), end);
        }
        let mut cursor = Cursor::start();
        while let Chunk::Gap(_) = log.read_source(&mut cursor, Filter::All, 100).unwrap() {}
    }

    #[test]
    fn damaged_files_do_not_panic(limit in 0u64..200_000, steps in steps(), damage in prop::collection::vec((0u64..100_000, any::<u8>()), 1..20), cut in prop::option::of(0u64..300_000)) {
        let file = tempfile().unwrap();
        let theirs = file.try_clone().unwrap();
        let mut log = JobLog::new(limit, Box::new(move || theirs.try_clone()));
        let mut model = Model::default();
        for step in &steps {
            if let Step::Append(_, len) = step {
                let bytes = model.bytes(*len);
                log.append(Source::Stdout, &bytes);
            }
        }
        log.save().unwrap();
        let len = file.metadata().unwrap().len();
        for (at, byte) in damage {
            if at < len { file.write_all_at(&[byte], at).unwrap(); }
        }
        if let Some(cut) = cut { file.set_len(cut.min(len)).unwrap(); }
        if let Ok(mut log) = JobLog::load(file) {
            for filter in [Filter::All, Filter::Stdout, Filter::Stderr] {
                let mut cursor = Cursor::start();
                while let Ok(chunk) = log.read_source(&mut cursor, filter, 50_000) {
                    if chunk == Chunk::Data(Vec::new()) { break }
                }
            }
            let mut cursor = Cursor::start();
            while log.read_records(&mut cursor, 100_000).is_ok_and(|records| !records.is_empty()) {}
            let _ = log.cursor_at(log.end() / 2);
            log.append(Source::Stderr, &[7; 3000]);
        }
    }
}

#[test]
fn a_full_disk_loses_output_but_does_not_fail() {
    let mut log = JobLog::new(1 << 20, Box::new(|| Err(io::Error::from(io::ErrorKind::StorageFull))));
    let mut model = Model::default();
    for _ in 0..100 {
        let bytes = model.bytes(5000);
        log.append(Source::Stdout, &bytes);
        model.records.push((Source::Stdout, bytes));
        check(&log, &model, 3000);
    }
    assert!(log.lost().stdout > 0);
    assert!(log.memory() <= 2 * MEMORY_LIMIT);
    assert!(log.save().is_err());
}

#[test]
fn lies_about_gaps_are_refused() {
    let gap = |target: u64, out: u64, err: u64| {
        let mut record = record_header(Source::Gap, 24).to_vec();
        for word in [target, out, err] {
            record.extend(word.to_le_bytes());
        }
        record
    };
    let mut log = JobLog::new(0, opener());
    log.append(Source::Stdout, b"0123456789");
    assert!(log.append_records(&gap(13, 0, 0)).is_err(), "backwards");
    assert!(log.append_records(&gap(20, 7, 0)).is_err(), "more lost than skipped");
    assert!(log.append_records(&gap(u64::MAX, 0, 0)).is_err(), "overflow");
    assert!(log.append_records(&gap(u64::MAX / 2, u64::MAX, u64::MAX)).is_err(), "overflow");
    assert!(log.append_records(&record_header(Source::Stdout, 0)).is_err(), "empty");
    assert!(log.append_records(&gap(20, 3, 1)[..20]).is_err(), "cut short");
    assert_eq!(log.end(), 14);
    log.append_records(&gap(20, 3, 1)).unwrap();
    assert_eq!((log.end(), log.lost()), (20, Totals { stdout: 3, stderr: 1 }));
    // A storm of gaps takes no more than the limit.
    for target in 21..20_000 {
        log.append_records(&gap(target, 1, 0)).unwrap();
    }
    assert!(log.memory() <= 2 * MEMORY_LIMIT && !log.in_file());
    assert_eq!(log.lost().stdout, 3 + 19_979);
}
