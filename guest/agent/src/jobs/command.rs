//! What is executed for a job: program, arguments, environment.

use super::script::{MAX_ARGUMENT, Script};
use super::users::User;
use super::{JobError, read_bounded};
use machinefs_protocol::job::JobSpec;
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

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
    pub env: Vec<CString>,
    /// What to call it in messages.
    pub name: String,
    /// The script's file, to be kept for the time of the job.
    pub script: Option<Script>,
}

/// Puts together what a job executes. `unique` names its script's file, should there be one; see [`Script::create`]
/// for what must not happen meanwhile.
pub fn prepare(spec: &JobSpec, script: &[u8], user: &User, unique: &str) -> Result<Program, JobError> {
    let env = environment(spec, user)?;
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

/// The agent's own small environment, and the job's on top; of two values of a name the later one stays.
fn environment(spec: &JobSpec, user: &User) -> Result<Vec<CString>, JobError> {
    let named = |name: &[u8], value: &[u8]| [name, b"=", value].concat();
    let mut entries = vec![
        named(b"PATH", PATH),
        named(b"HOME", &user.home),
        named(b"USER", &user.name),
        named(b"LOGNAME", &user.name),
        named(b"SHELL", &user.shell),
        named(b"LANG", b"C.UTF-8"),
    ];
    if spec.tty.is_some() {
        entries.push(named(b"TERM", b"xterm-256color"));
    }
    for entry in &spec.env {
        let name = entry.split(|byte| *byte == b'=').next().unwrap_or_default();
        if name.is_empty() || name.len() == entry.len() {
            return Err(JobError::Invalid("an environment entry without a name or without ="));
        }
        let prefix = named(name, b"");
        entries.retain(|other| !other.starts_with(&prefix));
        entries.push(entry.clone());
    }
    entries.iter().map(|entry| c_string(entry, "environment")).collect()
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

    fn argv(spec: &JobSpec, script: &[u8]) -> Vec<Vec<u8>> {
        let program = prepare(spec, script, &root(), "unused").unwrap();
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
        let program = prepare(&spec, b"", &root(), "unused").unwrap();
        let of = |name: &[u8]| program.env.iter().filter(|e| e.to_bytes().starts_with(name)).count();
        assert_eq!((of(b"PATH="), of(b"A=")), (1, 1));
        assert_eq!(program.paths, [c"/x/ls".to_owned()]);
        for bad in [b"=x".as_slice(), b"x", b"A=\0"] {
            let spec = JobSpec { env: vec![bad.into()], ..JobSpec::default() };
            assert!(prepare(&spec, b"", &root(), "unused").is_err());
        }
    }
}
