//! `allow_commands`: what exec may run.

use machinefs_tests::{each_user, each_user_alone, gate};

each_user! {
    /// With a list, a text is words for one program, never a shell's: what a shell would take for more is an argument.
    fn no_shell_behind_a_list(d) {
        let m = d.create("allow", "allow_commands=echo,ls,/usr/bin/printf");
        m.until_running();
        assert_eq!(m.guest("echo $(id) `id` $HOME * ; touch /root/x > y | cat && id 'a  b' \"c\"\n"),
            "$(id) `id` $HOME * ; touch /root/x > y | cat && id a  b c\n".trim_end());
        assert_eq!(m.guest("/usr/bin/printf %s,%s a 'b c'"), "a,b c");
        let (output, code) = m.run("ls /nonexistent-directory");
        assert!(code == 2 && output.contains("nonexistent"), "{code} {output}");
        assert_eq!(d.exec(&["sh", "-c", &format!("ls -A {}/files/root | wc -l", m.name)]).text(), "0");
    }
}

each_user! {
    /// Everything else is EPERM from the write, with the name, in `errors` and on the descriptor; and nothing has run.
    fn refusals_name_the_command(d) {
        let m = d.create("deny", "allow_commands=echo,ls");
        m.until_running();
        for text in ["touch /root/ran", "/bin/ls", "/usr/bin/touch /root/ran", "./ls", "ls;touch /root/ran", "LS", "$(echo ls)",
            "env ls", "sh -c ls", "\"touch\" /root/ran", "to'uch' /root/ran", "X=1 ls", "!ls"] {
            m.python(&format!(r#"
text = {text:?}
fd = os.open(f'{{D}}/exec', os.O_RDWR)
fails(errno.EPERM, os.write, fd, text.encode() + b'\n')
reason = os.read(fd, 4096).decode()
assert 'not allowed' in reason and 'echo ls' in reason, reason
assert 'EPERM' in open(f'{{D}}/errors').read().splitlines()[-1]
"#)).ok();
        }
        for text in ["ls\ntouch /root/ran", "#!/bin/sh\ntouch /root/ran", "ls #x", "ls 'unclosed", "\n", "echo \\"] {
            m.python(&format!("fd = os.open(f'{{D}}/exec', os.O_RDWR)\nfails(errno.EINVAL, os.write, fd, {text:?}.encode())")).ok();
        }
        // As shells write it.
        m.bash("printf 'ls\\ntouch /root/ran\\n' > $D/exec").fails();
        m.bash("{ echo ls; echo touch /root/ran; } > $D/exec").fails();
        m.bash("echo touch /root/ran > $D/exec").fails_with("not permitted");
        assert!(m.read("errors").contains("touch"), "{}", m.read("errors"));
        m.bash("cat $D/jobs/*/exit > /dev/null || true").ok();
        m.bash("test ! -e $D/files/root/ran").ok();
        // A text too long for one look comes to the same.
        m.python("text = b'touch /root/ran ' + b'x' * 5000\nfd = os.open(f'{D}/exec', os.O_WRONLY)\nos.write(fd, text[:4096])\ntry: os.write(fd, text[4096:])\nexcept PermissionError: pass\nelse: raise SystemExit('accepted')").ok();
        m.bash("echo '*' > $D/config/allow_commands").ok();
        m.guest("touch /root/ran; echo $((1+1))");
    }
}

each_user_alone! {
    /// What counts is the list when the job starts: one that waits for the boot is looked at again.
    fn a_queued_job_is_looked_at_again(user) {
        let d = gate::gated(user);
        gate::close(&d);
        let m = d.machine("queued");
        m.bash("echo 'touch /root/ran; echo x' > $D/exec; echo 'set allow_commands=ls' > $D/ctl").ok();
        gate::open(&d);
        m.until_running();
        assert_eq!(m.read("exit"), "126\n");
        assert!(m.read("jobs/1/status").contains("not started"), "{}", m.read("jobs/1/status"));
        m.bash("test ! -e $D/files/root/ran").ok();
    }
}
