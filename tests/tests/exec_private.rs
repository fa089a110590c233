//! `exec` opened for reading and writing is private: ten users of one machine at once, none sees another's.

use machinefs_tests::process::Running;
use machinefs_tests::{each_user, scale, shells};

each_user! {
    /// `exec 3<>exec; echo … >&3; cat <&3; read _ code <&3`, by ten users of one machine, several commands each.
    fn ten_users_at_once(d) {
        let m = d.running("private");
        for shell in shells() {
            let users: Vec<Running> = (1..=10)
                .map(|user| {
                    let script = r#"
                        exec 3<>$D/exec
                        for round in 1 2 3; do
                            echo "echo first USER.$round; sleep 0.0$round; echo last USER.$round >&2; exit $((USER + round))" >&3
                            cat <&3 > "$T/private.USER"
                            read -r word code <&3
                            test "$word" = exit
                            test "$code" = $((USER + round))
                            printf 'first USER.%s\nlast USER.%s\n' $round $round | cmp - "$T/private.USER"
                        done
                    "#;
                    let mut command = shell.command(&script.replace("USER", &user.to_string()));
                    command.env("D", &m.name);
                    let mut command = d.prepare(command);
                    command.env("D", &m.name);
                    Running::start(command)
                })
                .collect();
            for user in users {
                user.wait(90).ok();
            }
        }
        assert_eq!(m.jobs(), 30 * shells().len());
    }
}

each_user! {
    /// The very line of the contract.
    fn the_line_of_the_contract(d) {
        let m = d.running("line");
        for shell in shells() {
            let printed = m.sh(shell, "exec 3<>$D/exec; echo 'echo made; exit 2' >&3; cat <&3; read _ code <&3; echo $code").ok();
            assert_eq!(printed.text(), "made\n2");
        }
    }
}

each_user! {
    /// A private command is `out` of nobody else: reading `out` while it runs gives the newest job at open, whole.
    fn output_is_not_mixed(d) {
        let m = d.running("mixed");
        let rounds = 20 * scale();
        let outcome = m.python(&format!(r#"
def user(number):
    for round in range({rounds}):
        fd = os.open(f'{{D}}/exec', os.O_RDWR)
        text = f'user {{number}} round {{round}} ' * 50
        os.write(fd, f'echo "{{text}}"; exit {{number}}\n'.encode())
        got = b''
        while piece := os.read(fd, 100): got += piece
        assert got.decode() == text + '\n', got
        assert os.read(fd, 100) == f'exit {{number}}\n'.encode()
        os.close(fd)
failed = []
def guarded(number):
    try: user(number)
    except BaseException as error: failed.append((number, repr(error)))
threads = [threading.Thread(target=guarded, args=(n,)) for n in range(10)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not failed, failed
"#));
        outcome.ok();
        assert!(m.jobs() >= 100);
    }
}

each_user! {
    /// poll(2) is exact: not readable while the command is silent, woken when it prints, and at its end.
    fn poll_is_exact(d) {
        let m = d.running("poll");
        m.python(r#"
fd = os.open(f'{D}/exec', os.O_RDWR | os.O_NONBLOCK)
os.write(fd, b'until [ -e /root/go ]; do sleep 0.05; done; echo printed; until [ -e /root/end ]; do sleep 0.05; done; exit 9\n')
os.fsync(fd)
p = select.poll()
p.register(fd, select.POLLIN)
assert p.poll(300) == [], 'silent, but readable'
fails(errno.EAGAIN, os.read, fd, 100)
open(f'{D}/files/root/go', 'w').close()
assert p.poll(60000), 'not woken by output'
assert os.read(fd, 100) == b'printed\n'
assert p.poll(300) == [], 'nothing more, but readable'
open(f'{D}/files/root/end', 'w').close()
assert p.poll(60000), 'not woken by the end'
assert os.read(fd, 100) == b''
assert os.read(fd, 100) == b'exit 9\n'
"#).ok();
    }
}

each_user! {
    /// poll(2) of `out`, `exit` and wait/ files too; a thread that waits is woken.
    fn poll_of_blocking_files(d) {
        let m = d.running("polls");
        m.python(r#"
def write(name, text):
    with open(f'{D}/{name}', 'w') as f: f.write(text)
write('exec', 'until [ -e /root/go ]; do sleep 0.05; done; echo printed\n')
for name in ['out', 'exit', 'wait/stopped', 'wait/event']:
    fd = os.open(f'{D}/{name}', os.O_RDONLY | os.O_NONBLOCK)
    if name in ['wait/event']:
        # Past what has happened before.
        try:
            while os.read(fd, 65536): pass
        except BlockingIOError: pass
    p = select.poll()
    p.register(fd, select.POLLIN)
    assert p.poll(200) == [], name
    fails(errno.EAGAIN, os.read, fd, 100)
    globals()['fd_' + name.replace('/', '_')] = fd
write('files/root/go', '')
for name, text in [('out', b'printed\n'), ('exit', b'0\n')]:
    p = select.poll()
    p.register(globals()['fd_' + name], select.POLLIN)
    assert p.poll(60000), name
    assert os.read(globals()['fd_' + name], 100) == text
write('ctl', 'stop\n')
for name in ['wait_stopped', 'wait_event']:
    p = select.poll()
    p.register(globals()['fd_' + name], select.POLLIN)
    assert p.poll(60000), name
"#).ok();
    }
}
