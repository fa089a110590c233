//! Output is exact to the byte, and costs the daemon no memory.

use machinefs_tests::process::status_field;
use machinefs_tests::{Daemon, each_user, quick, scale, skip};

/// What the daemon's memory stays below, whatever its machines print and however slowly it is read: 128 MiB.
const MEMORY_CAP_KIB: u64 = 128 * 1024;

#[track_caller]
fn memory_is_bounded(d: &Daemon) {
    let peak = status_field(d.pid(), "VmHWM").expect("VmHWM");
    assert!(peak < MEMORY_CAP_KIB, "the daemon's peak is {peak} KiB");
}

each_user! {
    /// NUL and invalid UTF-8 pass, in `out`, `stdout` and `stderr`.
    fn any_bytes(d) {
        let m = d.running("bytes");
        m.python(r#"
def execute(script):
    with open(f'{D}/exec', 'wb') as f: f.write(script)
    return open(f'{D}/out', 'rb').read()
assert execute(b"printf 'a\\000b\\377\\303(\\n\\000'") == b'a\0b\xff\xc3(\n\0'
every = bytes(range(256)) * 1000
with open(f'{D}/files/root/every', 'wb') as f: f.write(every)
assert execute(b'cat /root/every') == every
assert execute(b'cat /root/every >&2') == every
job = max(os.listdir(f'{D}/jobs'), key=int)
assert open(f'{D}/jobs/{job}/stderr', 'rb').read() == every
assert open(f'{D}/jobs/{job}/stdout', 'rb').read() == b''
# A script of any bytes as well.
assert execute(b"printf %s '\xff\xfe\xc3('") == b'\xff\xfe\xc3('
assert execute(b'head -c 3000000 /dev/urandom | tee /root/random') == open(f'{D}/files/root/random', 'rb').read()
"#).ok();
    }
}

each_user! {
    /// A reader that keeps up sees every byte, also past `output_limit`.
    fn a_reader_that_keeps_up(d) {
        let m = d.running("keepup");
        // The machine goes on only when what it printed has been read here.
        m.python(r#"
piece = 8 << 20
rounds = 14
script = '''
for i in $(seq ROUNDS); do
    head -c PIECE /root/piece
    until [ -e /root/ack$i ]; do sleep 0.02; done
done
'''.replace('ROUNDS', str(rounds)).replace('PIECE', str(piece))
data = os.urandom(piece)
with open(f'{D}/files/root/piece', 'wb') as f: f.write(data)
with open(f'{D}/exec', 'w') as f: f.write(script)
with open(f'{D}/out', 'rb', buffering=0) as out:
    for round in range(1, rounds + 1):
        got = b''
        while len(got) < piece:
            more = out.read(min(1 << 20, piece - len(got)))
            assert more, f'the end in round {round}'
            got += more
        assert got == data, f'round {round}'
        open(f'{D}/files/root/ack{round}', 'w').close()
    assert out.read(1) == b''
assert open(f'{D}/exit').read() == '0\n'
"#).ok();
        memory_is_bounded(d);
    }
}

each_user! {
    /// 1 GiB of output: the command is not held up, its exit code is right, the daemon's memory stays bounded, the first
    /// and the last of it stay.
    fn a_gibibyte(d) {
        if quick() {
            skip!("--quick: this moves a gigabyte");
        }
        let m = d.running("gib");
        let size = (1u64 << 30) * scale() as u64;
        m.bash(&format!("echo 'echo begin; head -c {size} /dev/zero; echo; echo end; exit 4' > $D/exec")).ok();
        let outcome = m.bash("cat $D/out > $T/gib; wc -c < $T/gib; head -n 1 $T/gib; tail -n 1 $T/gib; cat $D/exit; rm $T/gib").ok();
        let text = outcome.text();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines[1..], ["begin", "end", "4"], "{text}");
        let bytes: u64 = lines[0].parse().expect("a number");
        assert!(bytes >= 32 << 20, "only {bytes} bytes of it were there to be read");
        assert!(bytes <= size + 4096, "{bytes} bytes: more than was printed");
        memory_is_bounded(d);
        // What is kept: at most output_limit and the words that mark the gap.
        let kept: u64 = m.bash("wc -c < $D/out").ok().text().trim().parse().expect("a number");
        assert!((32 << 20..=65 << 20).contains(&kept), "{kept} bytes are kept");
        memory_is_bounded(d);
    }
}

each_user! {
    /// 100 readers that hardly read hold up neither the command nor a quick reader, and cost no memory.
    fn a_hundred_slow_readers(d) {
        let m = d.running("slow");
        m.python(r#"
size = 48 << 20
with open(f'{D}/exec', 'w') as f: f.write(f'echo begin; until [ -e /root/go ]; do sleep 0.05; done; head -c {size} /dev/zero; exit 2\n')
readers = []
for _ in range(100):
    fd = os.open(f'{D}/out', os.O_RDONLY)
    assert os.read(fd, 3) == b'beg'
    readers.append(fd)
open(f'{D}/files/root/go', 'w').close()
quick = open(f'{D}/out', 'rb').read()
assert len(quick) == size + 6, len(quick)
assert open(f'{D}/exit').read() == '2\n'
for fd in readers: assert len(os.read(fd, 65536)) > 0
for fd in readers[::10]:
    total = 0
    while piece := os.read(fd, 1 << 20): total += len(piece)
    assert total > size // 2, total
"#).ok();
        memory_is_bounded(d);
    }
}

each_user! {
    /// Output stays readable after the machine has stopped.
    fn output_outlives_the_machine(d) {
        let m = d.running("after");
        m.bash("echo 'echo kept; exit 3' > $D/exec; cat $D/exit; echo stop > $D/ctl; cat $D/wait/stopped").ok();
        assert_eq!(m.status(), "stopped");
        assert_eq!(m.read("out"), "kept\n");
        assert_eq!(m.read("exit"), "3\n");
    }
}
