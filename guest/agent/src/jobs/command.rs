//! What is executed for a job: program, arguments, environment.

use super::script::{MAX_ARGUMENT, Script};
use super::users::User;
use super::{JobError, read_bounded};
use crate::secrets::Variable;
use machinefs_protocol::job::JobSpec;
use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::ops::Deref;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use zeroize::{Zeroize, Zeroizing};

/// PATH of a job that names none.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What to execute.
#[derive(Debug)]
pub struct Program {
    /// Paths to try, in order.
    pub paths: Vec<CString>,
    /// The arguments, the program's name first.
    pub argv: Vec<CString>,
    /// The environment, `NAME=value`.
    pub env: Environment,
    /// What to call it in messages.
    pub name: String,
    /// The script's file, to be kept for the time of the job.
    pub script: Option<Script>,
}

/// An environment: secrets are in it, and so it is wiped after use.
#[derive(Debug)]
pub struct Environment(Vec<CString>);

impl Deref for Environment {
    type Target = [CString];

    fn deref(&self) -> &[CString] {
        &self.0
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        for entry in self.0.drain(..) {
            entry.into_bytes_with_nul().zeroize();
        }
    }
}

/// What a job finds in its environment without having asked for it.
pub struct Surroundings<'a> {
    /// The machine's secrets.
    pub secrets: Vec<Variable>,
    /// The job's number, for its own use.
    pub job: u64,
    /// What its processes are known by, `NAME=value`.
    pub mark: String,
    /// What git is to be told on top of so many GIT_CONFIG entries.
    pub git: &'a dyn Fn(usize) -> Vec<Variable>,
}

/// Puts together what a job executes. `unique` names its script's file, should there be one; see [`Script::create`]
/// for what must not happen meanwhile.
pub fn prepare(
    spec: &JobSpec,
    script: &[u8],
    user: &User,
    surroundings: &Surroundings<'_>,
    unique: &str,
) -> Result<Program, JobError> {
    let env = environment(spec, user, surroundings)?;
    let path = env.iter().rev().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH=")).unwrap_or(PATH).to_vec();
    let cwd = if spec.cwd.is_empty() { &user.home } else { &spec.cwd };
    if let [program, ..] = spec.argv.as_slice() {
        let argv = spec.argv.iter().map(|arg| c_string(arg, "argument")).collect::<Result<Vec<_>, _>>()?;
        let name = String::from_utf8_lossy(program).into_owned();
        return Ok(Program { paths: candidates(program, &path, cwd)?, argv, env, name, script: None });
    }
    if script.starts_with(b"#!") {
        let file = Script::create(script, unique, user, true)?;
        let line = script.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let name = String::from_utf8_lossy(line.get(..line.len().min(256)).unwrap_or_default()).into_owned();
        let argv = vec![file.path().clone()];
        return Ok(Program { paths: argv.clone(), argv, env, name, script: Some(file) });
    }
    let shell: &[u8] = match spec.shell.as_slice() {
        [] if is_program(Path::new("/bin/bash")) => b"/bin/bash",
        [] => b"/bin/sh",
        shell => shell,
    };
    let mut argv = vec![c_string(shell, "shell")?];
    let mut file = None;
    if script.len() <= MAX_ARGUMENT && !script.contains(&0) {
        argv.push(c"-c".into());
        if matches!(script.first(), Some(b'-' | b'+')) {
            // Else it would be taken for an option.
            argv.push(c"--".into());
        }
        argv.push(c_string(script, "script")?);
    } else {
        let created = Script::create(script, unique, user, false)?;
        argv.push(created.path().clone());
        file = Some(created);
    }
    let name = String::from_utf8_lossy(shell).into_owned();
    Ok(Program { paths: candidates(shell, &path, cwd)?, argv, env, name, script: file })
}

/// The agent's own small environment, the secrets, and the job's variables on top; of two values of a name the later one
/// stays.
fn environment(spec: &JobSpec, user: &User, surroundings: &Surroundings<'_>) -> Result<Environment, JobError> {
    let mut entries: Vec<Zeroizing<Vec<u8>>> = Vec::new();
    // Where each name is.
    let mut places: HashMap<Vec<u8>, usize> = HashMap::new();
    let mut set = |name: &[u8], value: &[u8]| {
        let entry = Zeroizing::new([name, b"=", value].concat());
        match places.get(name).and_then(|place| entries.get_mut(*place)) {
            Some(place) => *place = entry,
            None => {
                places.insert(name.to_vec(), entries.len());
                entries.push(entry);
            }
        }
    };
    set(b"PATH", PATH);
    set(b"HOME", &user.home);
    set(b"USER", &user.name);
    set(b"LOGNAME", &user.name);
    set(b"SHELL", &user.shell);
    set(b"LANG", b"C.UTF-8");
    if spec.tty.is_some() {
        set(b"TERM", b"xterm-256color");
    }
    let mut git_entries = Some(0);
    for (name, value) in &surroundings.secrets {
        set(name, value);
    }
    for entry in &spec.env {
        let place = entry.iter().position(|byte| *byte == b'=').filter(|place| *place > 0);
        let (name, value) = place
            .and_then(|place| Some((entry.get(..place)?, entry.get(place + 1..)?)))
            .ok_or(JobError::Invalid("an environment entry without a name or without ="))?;
        set(name, value);
        if name == b"GIT_CONFIG_COUNT" {
            git_entries = std::str::from_utf8(value).ok().and_then(|count| count.parse().ok());
        }
    }
    // What is no number would make git fail: whoever set it is to see that.
    for (name, value) in git_entries.map(surroundings.git).unwrap_or_default() {
        set(&name, &value);
    }
    set(b"MACHINEFS_JOB", surroundings.job.to_string().as_bytes());
    if let Some((name, value)) = surroundings.mark.split_once('=') {
        set(name.as_bytes(), value.as_bytes());
    }
    let entries: Result<_, _> = entries.iter().map(|entry| c_string(entry, "environment")).collect();
    entries.map(Environment)
}

/// Where a program may be: the path it is, or its name in each directory of PATH, as execvp(3) does it. A relative
/// path is of the working directory.
fn candidates(program: &[u8], path: &[u8], cwd: &[u8]) -> Result<Vec<CString>, JobError> {
    if program.is_empty() {
        return Err(JobError::Invalid("an empty program name"));
    }
    if program.contains(&b'/') {
        return Ok(vec![c_string(program, "program")?]);
    }
    let directory = |dir: &[u8]| if dir.is_empty() { cwd.to_vec() } else { dir.to_vec() };
    path.split(|byte| *byte == b':')
        .map(|dir| c_string(&[&directory(dir), b"/".as_slice(), program].concat(), "PATH"))
        .collect()
}

fn is_program(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Why `program` could not be executed, when the errno alone misleads: ENOENT for a script whose interpreter is
/// missing, or for a binary whose loader is.
pub fn explain(paths: &[CString], errno: i32) -> Option<String> {
    if errno != libc::ENOENT {
        return None;
    }
    let found = paths.iter().map(|path| Path::new(OsStr::from_bytes(path.to_bytes()))).find(|path| path.exists())?;
    let start = read_bounded(found, 256).ok()?;
    let Some(line) = start.strip_prefix(b"#!") else { return Some("its dynamic loader is missing".into()) };
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let interpreter = line.trim_ascii().split(|byte| byte.is_ascii_whitespace()).next().unwrap_or_default();
    Some(format!("its interpreter {} is missing", String::from_utf8_lossy(interpreter)))
}

fn c_string(bytes: &[u8], what: &'static str) -> Result<CString, JobError> {
    CString::new(bytes).map_err(|_| JobError::Nul(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> User {
        User { uid: 0, gid: 0, groups: vec![0], name: b"root".into(), home: b"/root".into(), shell: b"/bin/sh".into() }
    }

    fn git(count: usize) -> Vec<Variable> {
        vec![(b"GIT_CONFIG_COUNT".into(), Zeroizing::new((count + 1).to_string().into_bytes()))]
    }

    fn surroundings() -> Surroundings<'static> {
        let secret = |name: &[u8]| (name.to_vec(), Zeroizing::new(b"secret".to_vec()));
        let secrets = vec![secret(b"TOKEN"), secret(b"B")];
        Surroundings { secrets, job: 7, mark: "MARK=abc-7".into(), git: &git }
    }

    fn argv(spec: &JobSpec, script: &[u8]) -> Vec<Vec<u8>> {
        let program = prepare(spec, script, &root(), &surroundings(), "unused").unwrap();
        program.argv.iter().map(|arg| arg.to_bytes().to_vec()).collect()
    }

    #[test]
    fn scripts_become_arguments() {
        let spec = JobSpec { shell: b"sh".into(), ..JobSpec::default() };
        assert_eq!(argv(&spec, b"echo a"), [b"sh".as_slice(), b"-c", b"echo a"]);
        assert_eq!(argv(&spec, b"-x; true"), [b"sh".as_slice(), b"-c", b"--", b"-x; true"]);
        assert_eq!(argv(&spec, b""), [b"sh".as_slice(), b"-c", b""]);
    }

    #[test]
    fn later_values_replace_earlier_ones() {
        let env = [b"PATH=/x".to_vec(), b"A=1=2".into(), b"A=3".into()];
        let spec = JobSpec { argv: vec![b"ls".into()], env: env.into(), ..JobSpec::default() };
        let program = prepare(&spec, b"", &root(), &surroundings(), "unused").unwrap();
        let of = |name: &[u8]| program.env.iter().filter(|e| e.to_bytes().starts_with(name)).count();
        assert_eq!((of(b"PATH="), of(b"A=")), (1, 1));
        assert_eq!(program.paths, [c"/x/ls".to_owned()]);
        for bad in [b"=x".as_slice(), b"x", b"A=\0"] {
            let spec = JobSpec { env: vec![bad.into()], ..JobSpec::default() };
            assert!(prepare(&spec, b"", &root(), &surroundings(), "unused").is_err());
        }
    }

    #[test]
    fn secrets_and_what_comes_before_them() {
        let of = |env: &[&str]| -> Vec<String> {
            let env = env.iter().map(|entry| entry.as_bytes().to_vec()).collect();
            let spec = JobSpec { argv: vec![b"ls".into()], env, ..JobSpec::default() };
            let program = prepare(&spec, b"", &root(), &surroundings(), "unused").unwrap();
            program.env.iter().map(|entry| entry.to_str().unwrap().to_owned()).collect()
        };
        let env = of(&["B=own", "MARK=forged", "MACHINEFS_JOB=1"]);
        for entry in ["TOKEN=secret", "B=own", "MARK=abc-7", "MACHINEFS_JOB=7", "GIT_CONFIG_COUNT=1"] {
            assert_eq!(env.iter().filter(|other| *other == entry).count(), 1, "{entry} in {env:?}");
        }
        assert!(!env.iter().any(|entry| entry == "B=secret" || entry == "MARK=forged"));
        assert!(of(&["GIT_CONFIG_COUNT=2"]).contains(&"GIT_CONFIG_COUNT=3".to_owned()));
        assert!(of(&["GIT_CONFIG_COUNT=x"]).contains(&"GIT_CONFIG_COUNT=x".to_owned()));
    }
}
