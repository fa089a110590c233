//! Terminal programs in a machine, through `machinefs attach`, in a real terminal (tmux): what is on the screen is what
//! the same program shows here.

use machinefs_tests::{Daemon, Machine, each_user, each_user_alone, eventually, skip};

/// A terminal of 80 by 24, in which a command runs.
struct Terminal<'a> {
    daemon: &'a Daemon,
    socket: String,
}

impl<'a> Terminal<'a> {
    fn open(daemon: &'a Daemon, name: &str, command: &str) -> Terminal<'a> {
        let socket = daemon.tmp().join(format!("tmux-{name}")).display().to_string();
        let terminal = Terminal { daemon, socket };
        // It stays when the command has ended, so that its last words can be read.
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "exec cat"]);
        terminal.tmux(&["set", "-g", "status", "off"]);
        terminal.tmux(&["set", "-g", "remain-on-exit", "on"]);
        terminal.tmux(&["respawn-window", "-k", &format!("{command}; echo \"ended: $?\"")]);
        terminal
    }

    #[track_caller]
    fn tmux(&self, arguments: &[&str]) -> String {
        let mut argv = vec!["env", "-u", "TMUX", "tmux", "-S", &self.socket];
        argv.extend(arguments);
        self.daemon.exec(&argv).ok().text()
    }

    #[track_caller]
    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    #[track_caller]
    fn until(&self, words: &str) {
        let there = eventually(30, || self.screen().contains(words));
        assert!(there, "\"{words}\" does not appear:\n{}", self.screen());
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        self.daemon.try_exec(&["tmux", "-S", &self.socket, "kill-server"]);
    }
}

fn has_tmux(d: &Daemon) -> bool {
    d.exec(&["sh", "-c", "command -v tmux vim less top python3"]).code == 0
}

#[track_caller]
fn attach<'a>(m: &Machine<'a>, name: &str, arguments: &str) -> Terminal<'a> {
    let path = m.daemon.mount.join(&m.name);
    Terminal::open(m.daemon, name, &format!("{} attach {} {arguments}", m.daemon.program().display(), path.display()))
}

each_user! {
    /// vim and less show in a machine what they show here.
    fn screens_are_the_same(d) {
        if !has_tmux(d) {
            skip!("tmux, vim, less, top or python3 is not there");
        }
        let m = d.running("screens");
        let text: String = (1..=200).map(|line| format!("line {line} \\t{}\\n", "äöü€ 漢字 ".repeat(line % 5))).collect();
        let file = d.tmp().join("screen.txt").display().to_string();
        // The same path there as here, since programs show it.
        d.bash(&format!("printf '{text}' > {file}")).ok();
        m.bash(&format!("mkdir -p $D/files{}; cp {file} $D/files{file}", d.tmp().display())).ok();
        let sessions: [(&str, String, &[&[&str]], &str); 2] = [
            ("vim", format!("vim -u NONE -N {file}"), &[&["50G"], &["dd"], &["oinserted ß", "Escape"], &[":set number", "Enter"]], "inserted ß"),
            ("less", format!("less {file}"), &[&["Space"], &["/line 77", "Enter"]], "line 77"),
        ];
        for (program, command, keys, words) in sessions {
            let here = Terminal::open(d, &format!("here-{program}"), &format!("LC_ALL=C.UTF-8 {command}"));
            let there = attach(&m, &format!("there-{program}"), &format!("-e LC_ALL=C.UTF-8 -- {command}"));
            for terminal in [&here, &there] {
                terminal.until("line 1 ");
                for keys in keys {
                    terminal.keys(keys);
                }
                terminal.until(words);
            }
            let same = eventually(20, || here.screen() == there.screen());
            assert!(same, "here:\n{}\nthere:\n{}", here.screen(), there.screen());
        }
    }
}

each_user! {
    /// The size is seen and its changes too; Ctrl-C, Ctrl-Z and Ctrl-D go to the program; the exit code is the job's.
    fn size_and_keys(d) {
        if !has_tmux(d) {
            skip!("tmux, vim, less, top or python3 is not there");
        }
        let m = d.running("keys");
        let terminal = attach(&m, "keys", "-- bash --norc --noprofile");
        terminal.until("bash-5");
        terminal.keys(&["stty size", "Enter"]);
        terminal.until("24 80");
        terminal.tmux(&["resize-window", "-x", "100", "-y", "30"]);
        let resized = eventually(20, || {
            terminal.keys(&["clear; stty size", "Enter"]);
            std::thread::sleep(std::time::Duration::from_millis(200));
            terminal.screen().contains("30 100")
        });
        assert!(resized, "{}", terminal.screen());
        // One after the other, as by hand: what is typed while a shell changes the terminal's mode can get lost anywhere.
        terminal.keys(&["clear; echo n''ow; sleep 1000", "Enter"]);
        terminal.until("now");
        terminal.keys(&["C-c"]);
        terminal.until("^C\nbash-5");
        terminal.keys(&["echo code=$?", "Enter"]);
        terminal.until("code=130");
        terminal.keys(&["cat", "Enter"]);
        terminal.until("cat");
        terminal.keys(&["first", "Enter"]);
        terminal.until("first\nfirst");
        terminal.keys(&["C-z"]);
        terminal.until("Stopped");
        terminal.keys(&["clear; fg", "Enter"]);
        terminal.until("cat");
        terminal.keys(&["typed", "Enter"]);
        terminal.until("typed\ntyped");
        terminal.keys(&["C-d"]);
        terminal.until("typed\nbash-5");
        terminal.keys(&["(exit 6)", "Enter"]);
        terminal.until("(exit 6)\nbash-5");
        terminal.keys(&["C-d"]);
        terminal.until("ended: 6");
    }
}

each_user! {
    /// top and a Python prompt.
    fn other_programs(d) {
        if !has_tmux(d) {
            skip!("tmux, vim, less, top or python3 is not there");
        }
        let m = d.running("programs");
        let top = attach(&m, "top", "-- top -d 1");
        top.until("PID USER");
        top.keys(&["q"]);
        top.until("ended: 0");
        let python = attach(&m, "python", "-- python3 -q");
        python.until(">>>");
        python.keys(&["print(6 * 7, 'ä')", "Enter"]);
        python.until("\n42 ä");
        python.keys(&["C-d"]);
        python.until("ended: 0");
    }
}

each_user! {
    /// Who leaves a job finds it as it was, with all that it printed.
    fn leaving_and_coming_back(d) {
        if !has_tmux(d) {
            skip!("tmux, vim, less, top or python3 is not there");
        }
        let m = d.running("leave");
        let first = attach(&m, "leave", "-- sh -c 'echo begun; read line; echo got $line; exit 3'");
        first.until("begun");
        first.keys(&["C-p", "C-q"]);
        first.until("ended: 0");
        let job = m.bash("ls $D/jobs").ok().text();
        let second = attach(&m, "back", &format!("--job {job}"));
        second.until("begun");
        second.keys(&["word", "Enter"]);
        second.until("got word");
        second.until("ended: 3");
    }
}

each_user_alone! {
    /// The daemon is killed while a program runs in a terminal: it goes on as if nothing had been.
    fn over_a_crash_of_the_daemon(user) {
        let d = Daemon::start(user);
        if !has_tmux(&d) {
            skip!("tmux, vim, less, top or python3 is not there");
        }
        let m = d.running("crash");
        let terminal = attach(&m, "crash", "-- bash --norc --noprofile");
        terminal.until("bash-5");
        terminal.keys(&["for i in 1 2 3 4 5 6; do echo line $i; sleep 0.5; done; echo all", "Enter"]);
        terminal.until("line 1");
        d.crash();
        terminal.until("line 6\nall");
        for line in 1..=6 {
            assert_eq!(terminal.screen().matches(&format!("line {line}\n")).count(), 1, "{}", terminal.screen());
        }
        terminal.keys(&["echo still $((40 + 2))", "Enter"]);
        terminal.until("still 42");
        terminal.keys(&["exit 9", "Enter"]);
        terminal.until("ended: 9");
    }
}
