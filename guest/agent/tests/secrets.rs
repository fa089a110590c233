//! Secrets: jobs get them, git gets the token, and nothing else does.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use machinefs_protocol::job::{ExitReason, JobSpec};
use machinefs_protocol::message::{Reply, Request};
use machinefs_protocol::secret::{Secret, encode};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use support::*;

const TOKEN: &str = "ghp_A1secretNobodyMaySee";

fn set(client: &Client, secrets: &[(&str, &str)]) {
    let secrets: Vec<Secret<'_>> =
        secrets.iter().map(|(name, value)| Secret { name: name.as_bytes(), value: value.as_bytes() }).collect();
    let body = encode(&secrets).unwrap();
    assert_eq!(client.call(&Request::SetSecrets, &body).unwrap().0, Reply::Ok);
}

fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// git alone, without the configuration of whoever runs this.
fn git_env(home: &Path) -> Vec<Vec<u8>> {
    [
        format!("HOME={}", home.display()),
        "GIT_CONFIG_NOSYSTEM=1".into(),
        "GIT_TERMINAL_PROMPT=0".into(),
        "GIT_AUTHOR_NAME=a".into(),
        "GIT_AUTHOR_EMAIL=a@example.com".into(),
        "GIT_COMMITTER_NAME=a".into(),
        "GIT_COMMITTER_EMAIL=a@example.com".into(),
    ]
    .map(String::into_bytes)
    .into()
}

#[test]
fn jobs_have_them_in_their_environment() {
    let agent = Agent::start();
    let client = agent.client();
    set(&client, &[("GITHUB_TOKEN", TOKEN), ("OTHER", "with = and\nline"), ("OWN", "secret")]);
    let named = JobSpec { env: vec![b"OWN=job".into()], ..spec() };
    let (_, log) = client.run(1, named, "printf '%s|%s|%s|%s' \"$GITHUB_TOKEN\" \"$OTHER\" \"$OWN\" $MACHINEFS_JOB");
    assert_eq!(stdout(&log), format!("{TOKEN}|with = and\nline|job|1"));
    set(&client, &[("OTHER", "new")]);
    let (_, log) = client.run(2, spec(), "echo \"<$GITHUB_TOKEN><$OTHER><$GIT_CONFIG_COUNT>\"");
    assert_eq!(stdout(&log), "<><new><>\n");
    // A set with one that cannot be is refused whole.
    for bad in [Secret { name: b"A=", value: b"x" }, Secret { name: b"A", value: b"\0" }] {
        let body = encode(&[Secret { name: b"OTHER", value: b"changed" }, bad]).unwrap();
        assert_eq!(client.call(&Request::SetSecrets, &body).unwrap_err().errno, libc::EINVAL);
    }
    assert_eq!(client.call(&Request::SetSecrets, b"\xff\xff").unwrap_err().errno, libc::EINVAL);
    // They stay over links and lives of the daemon.
    drop(client);
    let client = agent.client_of(2);
    assert_eq!(stdout(&client.run(3, spec(), "echo $OTHER").1), "new\n");
}

#[test]
fn they_are_nowhere_else() {
    let agent = Agent::start();
    let client = agent.client();
    set(&client, &[("GITHUB_TOKEN", TOKEN)]);
    let script = "git credential fill <<E\nprotocol=https\nhost=github.com\n\nE\ntr '\\0' '\\n' < /proc/$PPID/cmdline; env | grep GIT_CONFIG";
    let env = git_env(agent.dir.path());
    let (_, log) = client.run(1, JobSpec { env, ..spec() }, script);
    let text = stdout(&log);
    assert!(text.contains(&format!("username=x-access-token\npassword={TOKEN}\n")), "{text} {}", stderr(&log));
    let configured = text.lines().filter(|line| line.starts_with("GIT_CONFIG")).collect::<String>();
    assert!(configured.contains("credential.https://github.com.helper") && !configured.contains(TOKEN));
    assert!(!agent.log().contains(TOKEN));
    let Ok((Reply::Data, own_log)) = client.call(&Request::ReadLog, &[]) else { panic!("no log") };
    assert!(!String::from_utf8_lossy(&own_log).contains(TOKEN));
    let proc = format!("/proc/{}", agent.process.id());
    for file in ["environ", "cmdline", "status", "maps"] {
        let text = std::fs::read(format!("{proc}/{file}")).unwrap();
        assert!(!String::from_utf8_lossy(&text).contains(TOKEN), "{file}");
    }
    // No core file of it is written, and no process of its user looks into its memory: what is not dumpable belongs
    // to root, as far as /proc goes.
    if is_root() {
        let path = agent.dir.path().join("agent");
        std::fs::copy(env!("CARGO_BIN_EXE_machinefs-agent"), &path).unwrap();
        std::fs::set_permissions(agent.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new(&path);
        command.arg("serve");
        std::os::unix::process::CommandExt::uid(&mut command, 4711);
        let other = Agent::start_with(command);
        let client = other.client();
        client.ping();
        let looked = format!("cat /proc/{0}/environ; ls /proc/{0}/fd; head -c 1 /proc/{0}/mem", other.process.id());
        let (_, log) = client.run(1, spec(), looked);
        assert_eq!(stderr(&log).matches("ermission denied").count(), 3, "{}", stderr(&log));
    }
}

#[test]
fn strangers_are_not_answered() {
    if !is_root() {
        println!("skipped: needs root");
        return;
    }
    let agent = Agent::start();
    let client = agent.client();
    set(&client, &[("GITHUB_TOKEN", TOKEN)]);
    let (_, log) =
        client.run(1, spec(), "git config credential.https://github.com.helper; env | grep -o 'machinefs-[0-9a-f]*'");
    let socket = stdout(&log).lines().last().unwrap().to_owned();
    assert!(socket.starts_with("machinefs-"), "{socket}");
    let path = agent.dir.path().join("agent");
    std::fs::copy(env!("CARGO_BIN_EXE_machinefs-agent"), &path).unwrap();
    std::fs::set_permissions(agent.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ask = |uid: u32, question: &str| {
        let mut command = Command::new(&path);
        command.args(["credential", &socket, "get"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        std::os::unix::process::CommandExt::uid(&mut command, uid);
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(question.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let question = "protocol=https\nhost=github.com\n\n";
    assert!(ask(0, question).contains(TOKEN), "root has run a job");
    assert_eq!(ask(4711, question), "");
    for other in
        ["protocol=http\nhost=github.com\n\n", "protocol=https\nhost=evil.example\n\n", "", "host=github.com\n\n"]
    {
        assert_eq!(ask(0, other), "", "{other}");
    }
    client.run(2, JobSpec { user: b"4711".into(), ..spec() }, "true");
    assert!(ask(4711, question).contains(TOKEN), "now it has had it in its environment");
    // Those who say nothing are in nobody's way.
    use std::os::linux::net::SocketAddrExt;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&socket).unwrap();
    let silent: Vec<_> = (0..10).map(|_| std::os::unix::net::UnixStream::connect_addr(&address).unwrap()).collect();
    assert!(ask(0, question).contains(TOKEN));
    drop(silent);
}

/// A git server over HTTP that wants the token, and what it was asked without it.
fn git_server(root: &Path) -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (root, refused) = (root.to_owned(), Arc::new(Mutex::new(Vec::new())));
    let theirs = refused.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (root, refused) = (root.clone(), theirs.clone());
            std::thread::spawn(move || {
                let _ = git_request(stream, &root, &refused);
            });
        }
    });
    (port, refused)
}

/// Base64 of what git sends as user and password.
fn authorization() -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let plain = format!("x-access-token:{TOKEN}");
    let digits = plain.as_bytes().chunks(3).flat_map(|chunk| {
        let word = chunk.iter().chain(&[0, 0]).take(3).fold(0u32, |word, byte| word << 8 | u32::from(*byte));
        (0..4)
            .map(move |at| if at <= chunk.len() { DIGITS[(word >> (18 - 6 * at) & 63) as usize] as char } else { '=' })
    });
    format!("Basic {}", digits.collect::<String>())
}

/// One request, handed to git-http-backend(1) as a CGI program.
fn git_request(mut stream: TcpStream, root: &Path, refused: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let header = |name: &str| {
        head.lines()
            .filter_map(|line| line.split_once(": "))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, v)| v)
    };
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    if header("Authorization") != Some(&authorization()) {
        refused.lock().unwrap().push(head.clone());
        return stream.write_all(
            b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"git\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut body = vec![0; header("Content-Length").map_or(0, |len| len.parse().unwrap())];
    stream.read_exact(&mut body)?;
    let mut backend = Command::new("git");
    backend.arg("http-backend").env("GIT_PROJECT_ROOT", root).env("GIT_HTTP_EXPORT_ALL", "1");
    backend.env("REQUEST_METHOD", method).env("PATH_INFO", path).env("QUERY_STRING", query).env("REMOTE_USER", "x");
    backend
        .env("CONTENT_TYPE", header("Content-Type").unwrap_or_default())
        .env("CONTENT_LENGTH", body.len().to_string());
    let mut child = backend.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || input.write_all(&body));
    let output = child.wait_with_output()?;
    let _ = writer.join();
    stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n")?;
    stream.write_all(&output.stdout)
}

#[test]
fn git_clones_and_pushes_with_the_token() {
    if !Command::new("git").arg("--version").output().is_ok_and(|output| output.status.success()) {
        println!("skipped: no git");
        return;
    }
    let agent = Agent::start();
    let client = agent.client();
    let dir = agent.dir.path();
    let made = Command::new("git").args(["init", "-q", "--bare"]).arg(dir.join("srv/private.git")).status().unwrap();
    assert!(made.success());
    std::fs::create_dir(dir.join("home")).unwrap();
    let (port, refused) = git_server(&dir.join("srv"));
    let host = format!("http://127.0.0.1:{port}");
    let home = dir.join("home");
    let job = || JobSpec { env: git_env(&home), cwd: home.as_os_str().as_encoded_bytes().into(), ..spec() };
    let clone = format!("git clone -q {host}/private.git clone");
    // Without the token, and for a server it is not for.
    let (end, log) = client.run(1, job(), &clone);
    assert_eq!(end.reason, ExitReason::Code(128), "{}", stderr(&log));
    set(&client, &[("GITHUB_TOKEN", TOKEN)]);
    let (end, _) = client.run(2, job(), &clone);
    assert_eq!(end.reason, ExitReason::Code(128));
    set(&client, &[("GITHUB_TOKEN", TOKEN), ("GITHUB_HOST", &host)]);
    // A helper of the user's own that would keep the token in a file.
    let script = format!(
        "set -e; git config --global credential.helper store; {clone}; cd clone; echo content > file; git add file; \
         git commit -qm first; git push -q origin HEAD:main; git ls-remote {host}/private.git; git config -l --local"
    );
    let (end, log) = client.run(3, job(), script);
    assert_eq!(end.reason, ExitReason::Code(0), "{}", stderr(&log));
    assert!(stdout(&log).contains("refs/heads/main") && !stdout(&log).contains(TOKEN), "{}", stdout(&log));
    let found = Command::new("grep").args(["-r", TOKEN]).arg(dir).output().unwrap();
    assert_eq!(String::from_utf8(found.stdout).unwrap(), "", "the token is in a file");
    assert!(refused.lock().unwrap().iter().all(|head| !head.contains(TOKEN)), "it is in no URL");
}
