//! A credential helper for git (gitcredentials(7)), in two parts: a program that git runs in a job, and this agent,
//! which it asks over an abstract unix socket. So the token is in no file, no URL and no argument.

use crate::secrets::{Secrets, Variable};
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use zeroize::Zeroizing;

/// The user name that goes with a token, whatever kind of token it is.
const USER: &str = "x-access-token";
/// Longest description of what git wants, in bytes.
const MAX_QUESTION: u64 = 16 * 1024;
/// How long who asks may take for it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Questions at once, at most.
const MAX_ASKING: usize = 16;

/// The socket to serve.
///
/// # Errors
/// Those of bind(2).
pub fn listen(name: &str) -> io::Result<UnixListener> {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)
}

/// Answers for ever.
pub fn serve(listener: &UnixListener, secrets: &Arc<Secrets>) {
    let asking = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                crate::log::line(format_args!("credentials: {error}"));
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if asking.load(Ordering::Acquire) >= MAX_ASKING {
            continue;
        }
        asking.fetch_add(1, Ordering::AcqRel);
        let (secrets, count) = (secrets.clone(), asking.clone());
        let thread = std::thread::Builder::new().name("credential".into()).stack_size(128 * 1024);
        let made = thread.spawn(move || {
            // Who does not get an answer gets the end of the stream.
            let _ = answer(&stream, &secrets);
            count.fetch_sub(1, Ordering::AcqRel);
        });
        if made.is_err() {
            asking.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn answer(mut stream: &UnixStream, secrets: &Secrets) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    if !secrets.is_user(peer.uid.as_raw()) {
        return Ok(());
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut question = Vec::new();
    stream.take(MAX_QUESTION).read_to_end(&mut question)?;
    let question = String::from_utf8_lossy(&question);
    let attribute =
        |name: &str| question.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default();
    if let Some(token) = secrets.token_for(attribute("protocol"), attribute("host")) {
        let answer = Zeroizing::new([format!("username={USER}\npassword=").as_bytes(), &token, b"\n"].concat());
        stream.write_all(&answer)?;
    }
    Ok(())
}

/// The program that git runs: `credential SOCKET get`. What git has to say after a success or a failure (store,
/// erase) is of no interest.
pub fn ask(socket: &[u8], operation: &[u8]) -> ExitCode {
    if operation != b"get" {
        return ExitCode::SUCCESS;
    }
    match exchange(socket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("machinefs: no credentials: {error}");
            ExitCode::FAILURE
        }
    }
}

fn exchange(socket: &[u8]) -> io::Result<()> {
    let mut question = Vec::new();
    io::stdin().take(MAX_QUESTION).read_to_end(&mut question)?;
    let mut stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(socket)?)?;
    stream.write_all(&question)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Zeroizing::new(Vec::with_capacity(MAX_QUESTION as usize));
    stream.take(MAX_QUESTION).read_to_end(&mut answer)?;
    io::stdout().write_all(&answer)
}

/// What makes git in a job use the helper, as environment variables (git-config(1), GIT_CONFIG_COUNT), on top of the
/// `count` of such that the job has. The first entry for a server takes away helpers from files: one of them could
/// keep the token on a disk.
pub fn git_config(secrets: &Secrets, count: usize) -> Vec<Variable> {
    let urls = secrets.token_urls();
    let Some(program) = own_program().filter(|_| !urls.is_empty()) else { return Vec::new() };
    let helper = format!("!'{program}' credential {}", secrets.socket());
    let mut variables = Vec::new();
    let mut number = count;
    for url in urls {
        for value in ["", helper.as_str()] {
            variables.push((format!("GIT_CONFIG_KEY_{number}"), format!("credential.{url}.helper")));
            variables.push((format!("GIT_CONFIG_VALUE_{number}"), value.to_owned()));
            number += 1;
        }
    }
    variables.push(("GIT_CONFIG_COUNT".to_owned(), number.to_string()));
    variables.into_iter().map(|(name, value)| (name.into_bytes(), Zeroizing::new(value.into_bytes()))).collect()
}

/// The path of the agent's own program, where it can stand in a shell's quotes.
fn own_program() -> Option<String> {
    let path = std::env::current_exe().ok()?.into_os_string().into_string().ok()?;
    (path.starts_with('/') && !path.contains('\'')).then_some(path)
}
