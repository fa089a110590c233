//! The bytes of messages: a change of any of them is a change of the protocol.
#![allow(clippy::unwrap_used)]

use machinefs_protocol::file::{FileReply, FileRequest};
use machinefs_protocol::frame::{FLAG_MORE, HEADER_LEN, Header, Kind, decode_meta, encode_meta};
use machinefs_protocol::job::{ExitReason, JobEnd, JobInfo, JobSpec, MAX_SPEC};
use machinefs_protocol::message::{Credit, Event, Failure, GuestInfo, Hello, Notice, Reply, Request};
use machinefs_protocol::secret::{self, MAX_SECRETS, Secret};
use machinefs_protocol::{OLDEST_VERSION, VERSION};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn encoded<T: serde::Serialize>(message: &T) -> String {
    let mut meta = Vec::new();
    encode_meta(message, &mut meta).unwrap();
    hex(&meta)
}

fn end() -> JobEnd {
    JobEnd { reason: ExitReason::Signal(9), log_end: 300, cpu_micros: 7, max_rss_kib: 128, ended_ms: 5 }
}

#[test]
fn requests() {
    let cases = [
        (Request::Ping, "00"),
        (Request::File(FileRequest::SyncFs), "011e"),
        (Request::JobStart { job: 300, spec_len: 1000 }, "02ac02e807"),
        (Request::JobAttach { job: 7, offset: 128 }, "03078001"),
        (Request::JobSignal { job: 7, signal: 15, all: true }, "04071e01"),
        (Request::JobList, "05"),
        (Request::JobForget { job: 1 }, "0601"),
        (Request::Info, "07"),
        (Request::Shutdown { grace_ms: 200 }, "08c801"),
        (Request::SetClock { unix_nanos: 1 }, "0901"),
        (Request::ReadLog, "0a"),
        (Request::JobStdin { job: 7, offset: 300 }, "0b07ac02"),
        (Request::JobResize { job: 7, rows: 24, cols: 200 }, "0c0718c801"),
        (Request::Connect { port: 8080 }, "0d903f"),
        (Request::SetSecrets, "0e"),
    ];
    for (request, bytes) in cases {
        assert_eq!(encoded(&request), bytes, "{request:?}");
        let mut meta = Vec::new();
        encode_meta(&request, &mut meta).unwrap();
        assert_eq!(decode_meta::<Request>(&meta).unwrap(), request);
    }
}

#[test]
fn replies_and_what_is_said_unasked() {
    let info = JobInfo { job: 1, pid: 2, started_ms: 3, log_end: 4, cpu_micros: 5, rss_kib: 6, end: Some(end()) };
    assert_eq!(encoded(&Reply::Ok), "00");
    assert_eq!(encoded(&Reply::File(FileReply::Ok)), "0100");
    assert_eq!(encoded(&Reply::Started { pid: 300, started_ms: 1 }), "02ac0201");
    assert_eq!(encoded(&Reply::Jobs), "03");
    assert_eq!(encoded(&vec![info]), "01010203040506010109ac0207800105");
    assert_eq!(encoded(&Reply::Info(GuestInfo::default())), "0400000000000000000000");
    assert_eq!(encoded(&Reply::Data), "05");
    assert_eq!(encoded(&Reply::Stdin { offset: 300, credit: 128, ended: true }), "06ac02800101");
    assert_eq!(encoded(&Failure { errno: 2, message: "no".into() }), "04026e6f");
    assert_eq!(encoded(&Credit { bytes: 300 }), "ac02");
    assert_eq!(encoded(&Notice::Forget(vec![(1, 2)])), "00010102");
    assert_eq!(encoded(&Notice::Release { fh: 1, owner: 2 }), "010102");
    assert_eq!(encoded(&Notice::ReleaseDir { fh: 1 }), "0201");
    assert_eq!(encoded(&Event::JobEnded { job: 1, end: end() }), "00010109ac0207800105");
    let hello = Hello { version: VERSION, oldest: OLDEST_VERSION, features: 0, session: 5, boot: 6, build: "b".into() };
    assert_eq!(encoded(&hello), "01010005060162");
}

#[test]
fn headers() {
    let header = Header {
        kind: Kind::Data,
        flags: FLAG_MORE,
        meta_len: 0x0102,
        data_len: 0x0304,
        seq: 0x0506,
        deadline_ms: 0x0708,
        tag: 0x090a,
    };
    assert_eq!(hex(&header.encode()), "070102010403000006050000080700000a09000000000000");
    assert_eq!(Header::decode(&header.encode()).unwrap(), header);
    assert_eq!(header.encode().len(), HEADER_LEN);
}

#[test]
fn descriptions_of_jobs() {
    let spec = JobSpec {
        argv: vec![b"a".into(), b"bc".into()],
        shell: b"sh".into(),
        cwd: b"/".into(),
        user: b"u".into(),
        env: vec![b"A=1".into()],
        timeout_ms: 300,
        output_limit: 128,
        tty: Some((24, 200)),
        stdin: true,
    };
    let (len, body) = spec.start_body(b"script").unwrap();
    let description = "020161026263027368012f01750103413d31ac0280010118c80101";
    assert_eq!(hex(&body), description.to_owned() + &hex(b"script"));
    assert_eq!(JobSpec::from_start_body(len, &body).unwrap(), (spec.clone(), b"script".as_slice()));
    assert_eq!(JobSpec::from_start_body(len, &body[..len as usize]).unwrap(), (spec.clone(), b"".as_slice()));
    for wrong in [0, 1, len - 1, len + 1, body.len() as u32, body.len() as u32 + 1, u32::MAX] {
        assert!(JobSpec::from_start_body(wrong, &body).is_err(), "{wrong}");
    }
    // As much as execve(2) takes.
    let large = JobSpec { argv: vec![vec![b'x'; 100]; 20_000], ..JobSpec::default() };
    let (len, body) = large.start_body(b"").unwrap();
    assert_eq!(JobSpec::from_start_body(len, &body).unwrap().0, large);
    let over = JobSpec { argv: vec![vec![0; MAX_SPEC]], ..JobSpec::default() };
    assert!(over.start_body(b"").is_err());
}

#[test]
fn secrets() {
    let one = [Secret { name: b"A", value: b"bc" }, Secret { name: b"B", value: b"" }];
    let body = secret::encode(&one).unwrap();
    assert_eq!(hex(&body), "020141026263014200");
    assert_eq!(secret::decode(&body).unwrap(), one);
    assert!(secret::decode(&body[1..]).is_err());
    assert!(secret::decode(&vec![0; MAX_SECRETS + 1]).is_err());
    assert!(secret::encode(&[Secret { name: b"A", value: &vec![0; MAX_SECRETS] }]).is_err());
    let shown = format!("{:?}", Secret { name: b"TOKEN", value: b"hidden" });
    assert!(shown.contains("TOKEN") && !shown.contains("hidden"), "{shown}");
    assert!(!shown.contains(&format!("{:?}", b"hidden")), "{shown}");
}
