//! Tests of jobs.

use super::super::output::Chunk;
use super::*;
use machinefs_protocol::job::{ExitReason, Source, record_header};

fn record(source: Source, bytes: &[u8]) -> Vec<u8> {
    [&record_header(source, bytes.len())[..], bytes].concat()
}

fn ended(code: u8) -> Phase {
    let reason = ExitReason::Code(code);
    Phase::Ended(JobEnd { reason, log_end: 0, cpu_micros: 0, max_rss_kib: 0, ended_ms: 1 })
}

#[test]
fn readers_see_the_output_from_the_first_byte_then_wait_then_end() {
    let dir = tempfile::tempdir().unwrap();
    let job = Arc::new(Job::new(1, 0, dir.path(), 1 << 20));
    let mut early = job.reader(Output::All);
    assert_eq!(early.next(10).unwrap(), Chunk::Pending);
    job.append(&record(Source::Stdout, b"out\0")).unwrap();
    job.append(&record(Source::Stderr, b"\xfferr")).unwrap();
    assert_eq!(early.next(100).unwrap(), Chunk::Data(b"out\0\xfferr".to_vec()));
    assert_eq!(early.next(100).unwrap(), Chunk::Pending);
    job.set_phase(ended(3));
    assert_eq!(early.next(100).unwrap(), Chunk::End);
    job.save_log().unwrap();
    let mut late = job.reader(Output::Stderr);
    assert_eq!(late.read_at(1, 2).unwrap(), b"er");
    assert_eq!(late.read_at(0, 100).unwrap(), b"\xfferr");
    assert_eq!(job.output_len(Output::Stdout), 4);
    assert_eq!(job.exit().unwrap().unwrap(), 3);
}

#[test]
fn no_time_that_a_guest_claims_is_too_late() {
    let dir = tempfile::tempdir().unwrap();
    for (started, end) in [(u64::MAX, u64::MAX), (u64::MAX, 0), (0, u64::MAX), (1 << 63, 1)] {
        let job = Arc::new(Job::new(1, 0, dir.path(), 1 << 20));
        job.set_started(1, started);
        let reason = ExitReason::Code(0);
        let (cpu_micros, max_rss_kib) = (u64::MAX, u64::MAX);
        job.finish(Phase::Ended(JobEnd { reason, log_end: 0, cpu_micros, max_rss_kib, ended_ms: end }), |_| {});
        assert!(job.status_text().contains("exit 0"));
        let again = Job::load(job.row(), dir.path(), 8192);
        assert_eq!(again.history_line(), job.history_line());
    }
}

#[test]
fn a_finished_job_is_the_same_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let job = Arc::new(Job::new(7, 1000, dir.path(), 8192));
    job.keep_script(Script::Text(b"make\n".to_vec())).unwrap();
    for _ in 0..100 {
        job.append(&record(Source::Stdout, &[b'x'; 1000])).unwrap();
    }
    job.set_phase(ended(0));
    job.save_log().unwrap();
    let all = job.reader(Output::All).read_at(0, 1 << 20).unwrap();
    assert_eq!(all.len() as u64, job.output_len(Output::All));
    assert!(String::from_utf8_lossy(&all).contains("bytes were not kept"));
    let again = Arc::new(Job::load(job.row(), dir.path(), 8192));
    assert_eq!(again.reader(Output::All).read_at(0, 1 << 20).unwrap(), all);
    assert_eq!(again.output_len(Output::All), all.len() as u64);
    assert_eq!(again.history_line(), job.history_line());
}

#[test]
fn a_long_text_is_in_a_file_and_only_its_head_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let text: Vec<u8> = "äöü\n".repeat(10_000).into_bytes();
    let job = Job::new(1, 0, dir.path(), 1 << 20);
    let script = Script::Text(text.clone());
    assert!(script.is_to_be_filed());
    job.keep_script(script).unwrap();
    assert_eq!(job.command_len(), text.len() as u64);
    assert!(job.row().command.len() <= 4000);
    job.set_phase(ended(0));
    let again = Job::load(job.row(), dir.path(), 1 << 20);
    assert_eq!((again.command_len(), again.disk()), (text.len() as u64, text.len() as u64));
    let reader = again.command().unwrap();
    assert_eq!(reader.read_at(0, 1 << 20).unwrap(), text);
    assert_eq!(reader.read_at(7, 5).unwrap(), text[7..12]);
    assert!(reader.read_at(1 << 40, 5).unwrap().is_empty());
    let mut body = b"spec".to_vec();
    again.add_command(&mut body).unwrap();
    assert_eq!(body[4..], text);
    // Somebody cut the file short: no half of a text is run.
    File::options().write(true).open(again.command_path()).unwrap().set_len(10).unwrap();
    assert!(again.add_command(&mut Vec::new()).is_err());
}

#[test]
fn the_line_of_history_is_there_before_the_end_can_be_seen() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(1, 0, dir.path(), 1 << 20);
    let ended_by_this = job.finish(ended(3), |line| {
        assert!(line.contains(" 3 "), "{line}");
        assert!(!job.is_done() && job.exit().is_none());
        assert!(!job.finish(ended(4), |_| panic!("twice")));
    });
    assert!(ended_by_this);
    assert_eq!(job.exit().unwrap().unwrap(), 3);
}
