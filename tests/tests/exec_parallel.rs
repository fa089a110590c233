//! Many at once: exit codes are exact, names are unique, long commands end when they end.

use machinefs_tests::{each_user, scale, shells};

each_user! {
    /// 100 parallel execs, each exit code right (waitpid races lost some in other systems).
    fn a_hundred_exit_codes(d) {
        let m = d.running("codes");
        for _ in 0..scale() {
            m.bash(r#"
                for i in $(seq 100); do
                    ( exec 3<>$D/exec
                      echo "echo $i; exit $i" >&3
                      test "$(cat <&3)" = $i
                      read -r word code <&3
                      test "$word $code" = "exit $i" ) &
                done
                for job in $(jobs -p); do wait $job; done
            "#).ok();
        }
        m.python(r#"
for line in open(f'{D}/history'):
    fields = line.split()
    assert fields[3] in line.split('exit ')[-1], line
"#).ok();
        assert_eq!(m.jobs(), 100 * scale());
    }
}

each_user! {
    /// `mktemp -d XXXXXX` names a machine; ten at once, under every shell.
    fn ten_machines_by_mktemp(d) {
        for shell in shells() {
            let script = r#"
                for i in 1 2 3 4 5 6 7 8 9 10; do
                    ( name=$(mktemp -d "$M/XXXXXX")
                      echo "echo hello from $i; exit $i" > "$name/exec"
                      test "$(cat "$name/out")" = "hello from $i"
                      test "$(cat "$name/exit")" = $i
                      rmdir "$name" ) || echo "failed: $i" &
                done
                wait
            "#;
            assert_eq!(d.sh(shell, script).ok().text(), "");
        }
    }
}

each_user! {
    /// A 10 s command under a 30 s time limit succeeds (seconds are seconds); one past its limit is 124.
    fn exec_timeout(d) {
        let m = d.running("limit");
        m.bash("echo 30s > $D/config/exec_timeout; echo 'sleep 10; echo done' > $D/exec; test \"$(cat $D/out)\" = done").ok();
        assert_eq!(m.read("exit"), "0\n");
        m.bash("echo 1s > $D/config/exec_timeout; echo 'sleep 1000 & sleep 1000' > $D/exec; test \"$(cat $D/exit)\" = 124").ok();
        assert_eq!(m.guest("ps -e | grep -c '[s]leep' || true"), "0", "its descendants ended too");
    }
}

each_user! {
    /// Jobs run side by side in one machine; closing files never ends one.
    fn side_by_side(d) {
        let m = d.running("beside");
        m.bash("echo 'until [ -e /root/two ]; do sleep 0.05; done; touch /root/one' > $D/exec").ok();
        m.bash("echo 'touch /root/two; until [ -e /root/one ]; do sleep 0.05; done; echo both' > $D/exec").ok();
        assert_eq!(m.read("out"), "both\n");
        assert_eq!(m.read("exit"), "0\n");
        // A reader that goes away half way through takes nothing with it.
        m.bash("echo 'echo a; sleep 0.5; echo b; exit 6' > $D/exec; head -c 1 $D/out > /dev/null").ok();
        assert_eq!(m.read("exit"), "6\n");
        assert_eq!(m.read("out"), "a\nb\n");
    }
}
