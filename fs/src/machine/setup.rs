//! How a job is to run, beside its script: what is written into `jobs/NAME/` before it starts.

use super::config;
use super::error::MachineError;
use machinefs_protocol::job::JobSpec;
use serde::{Deserialize, Serialize};

/// Size of a terminal that is asked for without one.
const ROWS: u16 = 24;
/// See [`ROWS`].
const COLUMNS: u16 = 80;
/// Bytes of arguments and environment together, at most: execve(2) takes 2 MiB by default, and the machine's own
/// environment is to fit too.
const MAX_STRINGS: usize = 1 << 20;

/// A value of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The directory in the guest that it starts in.
    Cwd,
    /// Variables of its environment: `NAME=value`, a line each; with a NUL in it, separated by NULs.
    Env,
    /// The user in the guest.
    User,
    /// How long it may run.
    Timeout,
    /// `no`, `yes`, or rows and columns of its terminal.
    Tty,
}

/// What was said of a job. What was not said is as the machine's configuration has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The program and its arguments; empty: there is a script.
    pub argv: Vec<Vec<u8>>,
    cwd: Vec<u8>,
    env: Vec<Vec<u8>>,
    user: Vec<u8>,
    /// 0: never.
    timeout_secs: Option<u64>,
    /// Rows and columns.
    tty: Option<(u16, u16)>,
    /// It has an input that is fed to it.
    pub input: bool,
    /// It was not started yet.
    pub open: bool,
    /// It is the machine's own: what users may run is not asked.
    pub own: bool,
}

impl Setup {
    /// Of a job that is to be set up.
    pub fn open() -> Setup {
        Setup { open: true, ..Setup::default() }
    }

    /// Of a job of the machine's own. It starts where every machine has something.
    pub(super) fn own(argv: Vec<Vec<u8>>) -> Setup {
        Setup { argv, cwd: b"/".to_vec(), own: true, ..Setup::default() }
    }

    /// Sets a value.
    ///
    /// # Errors
    /// EINVAL, with what it should be.
    pub fn set(&mut self, field: Field, value: &[u8]) -> Result<(), MachineError> {
        let line = || {
            let text = std::str::from_utf8(value).ok().filter(|text| !text.contains(['\n', '\0']));
            text.ok_or_else(|| MachineError::invalid("the value is one line of text"))
        };
        match field {
            Field::Cwd => {
                let absolute = value.is_empty() || value.starts_with(b"/");
                if !absolute || value.contains(&0) {
                    return Err(MachineError::invalid("cwd is an absolute path in the machine"));
                }
                self.cwd = value.to_vec();
            }
            Field::Env => self.env = variables(value)?,
            Field::User => self.user = line()?.as_bytes().to_vec(),
            Field::Timeout => {
                let text = line()?;
                let time = config::parse_time(text)
                    .ok_or_else(|| MachineError::invalid(format!("bad timeout \"{text}\": a time as 30s, or none")))?;
                self.timeout_secs = Some(time.map_or(0, |time| time.as_secs()));
            }
            Field::Tty => self.tty = terminal(line()?)?,
        }
        Ok(())
    }

    /// The value as it can be written back.
    pub fn text(&self, field: Field) -> Vec<u8> {
        let line = |text: &[u8]| if text.is_empty() { Vec::new() } else { [text, b"\n"].concat() };
        match field {
            Field::Cwd => line(&self.cwd),
            Field::Env if self.env.iter().any(|variable| variable.contains(&b'\n')) => {
                self.env.iter().flat_map(|variable| [variable.as_slice(), b"\0"].concat()).collect()
            }
            Field::Env => self.env.iter().flat_map(|variable| line(variable)).collect(),
            Field::User => line(&self.user),
            Field::Timeout => match self.timeout_secs {
                None => Vec::new(),
                Some(0) => b"none\n".to_vec(),
                Some(secs) => format!("{secs}s\n").into_bytes(),
            },
            Field::Tty => match self.tty {
                Some((rows, columns)) => format!("{rows} {columns}\n").into_bytes(),
                None => b"no\n".to_vec(),
            },
        }
    }

    /// As it is written down: nothing where nothing was said.
    pub(super) fn to_row(&self) -> Vec<u8> {
        if *self == Setup::default() { Vec::new() } else { postcard::to_stdvec(self).unwrap_or_default() }
    }

    /// What was written down.
    pub(super) fn from_row(row: &[u8]) -> Setup {
        if row.is_empty() { Setup::default() } else { postcard::from_bytes(row).unwrap_or_default() }
    }

    /// Whether variables were set for it alone, but for the terminal's name.
    pub fn has_environment(&self) -> bool {
        self.env.iter().any(|variable| !variable.starts_with(b"TERM="))
    }

    /// Whether it has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.tty.is_some()
    }

    /// Sets the program and its arguments, which end with a NUL each; the last may do without. One newline at the end,
    /// as `echo` writes it, is not part of them.
    ///
    /// # Errors
    /// EINVAL when there is no program.
    pub fn set_argv(&mut self, bytes: &[u8]) -> Result<(), MachineError> {
        let bytes = match bytes.strip_suffix(b"\n") {
            Some(rest) if !bytes.contains(&0) => rest,
            _ => bytes,
        };
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
        let argv: Vec<Vec<u8>> = bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        if argv.first().is_none_or(Vec::is_empty) {
            return Err(MachineError::invalid(
                "argv is a program and its arguments, separated by NULs: printf 'ls\\0-l\\0' > argv",
            ));
        }
        check_size(&argv)?;
        self.argv = argv;
        Ok(())
    }

    /// The arguments as they were written.
    pub fn argv_text(&self) -> Vec<u8> {
        self.argv.iter().flat_map(|word| [word.as_slice(), b"\0"].concat()).collect()
    }

    /// The arguments as a shell would take them, for people.
    pub fn argv_line(&self) -> Vec<u8> {
        let words = self.argv.iter().map(|word| String::from_utf8_lossy(word));
        let mut line = words.map(|word| super::events::quote(&word)).collect::<Vec<_>>().join(" ");
        line.push('\n');
        line.into_bytes()
    }

    /// Puts it over what the configuration says.
    pub fn apply(&self, spec: &mut JobSpec) {
        if !self.argv.is_empty() {
            spec.argv.clone_from(&self.argv);
        }
        if !self.cwd.is_empty() {
            spec.cwd.clone_from(&self.cwd);
        }
        if !self.user.is_empty() {
            spec.user.clone_from(&self.user);
        }
        // The last of a name counts.
        spec.env.extend(self.env.iter().cloned());
        if let Some(secs) = self.timeout_secs {
            spec.timeout_ms = secs.saturating_mul(1000);
        }
        spec.tty = self.tty;
        spec.stdin = self.input;
    }
}

fn variables(value: &[u8]) -> Result<Vec<Vec<u8>>, MachineError> {
    let separator = if value.contains(&0) { 0 } else { b'\n' };
    let lines = value.split(|byte| *byte == separator).filter(|line| !line.is_empty());
    let variables: Vec<Vec<u8>> = lines.map(<[u8]>::to_vec).collect();
    for variable in &variables {
        let named = variable.iter().position(|byte| *byte == b'=').is_some_and(|at| at > 0);
        if !named {
            let shown = String::from_utf8_lossy(variable.get(..50).unwrap_or(variable)).into_owned();
            return Err(MachineError::invalid(format!("\"{shown}\" is not NAME=value")));
        }
    }
    check_size(&variables)?;
    Ok(variables)
}

fn check_size(strings: &[Vec<u8>]) -> Result<(), MachineError> {
    // execve(2): each string may take 128 KiB.
    let long = strings.iter().any(|string| string.len() >= 128 * 1024);
    if long || strings.iter().map(|string| string.len() + 9).sum::<usize>() > MAX_STRINGS {
        return Err(MachineError::invalid("too long for a program's arguments: write a script to cmd instead"));
    }
    Ok(())
}

fn terminal(text: &str) -> Result<Option<(u16, u16)>, MachineError> {
    let mut words = text.split_whitespace();
    let size = match (words.next(), words.next(), words.next()) {
        (Some("no"), None, None) => return Ok(None),
        (Some("yes"), None, None) => Some((ROWS, COLUMNS)),
        (Some(rows), Some(columns), None) => rows.parse().ok().zip(columns.parse().ok()),
        _ => None,
    };
    let size = size.filter(|(rows, columns)| *rows > 0 && *columns > 0);
    size.map(Some).ok_or_else(|| MachineError::invalid(format!("bad tty \"{text}\": no, yes, or ROWS COLUMNS")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_can_be_written_back() {
        let mut setup = Setup::default();
        let values: [(Field, &[u8], &[u8]); 9] = [
            (Field::Cwd, b"/srv", b"/srv\n"),
            (Field::Env, b"A=1\nB=x=y\n", b"A=1\nB=x=y\n"),
            (Field::Env, b"A=1\n2\0B=3\0", b"A=1\n2\0B=3\0"),
            (Field::User, b"nobody", b"nobody\n"),
            (Field::Timeout, b"2m", b"120s\n"),
            (Field::Timeout, b"none", b"none\n"),
            (Field::Tty, b"yes", b"24 80\n"),
            (Field::Tty, b"50 132", b"50 132\n"),
            (Field::Tty, b"no", b"no\n"),
        ];
        for (field, value, text) in values {
            setup.set(field, value).unwrap();
            assert_eq!(setup.text(field), text);
            let written = setup.text(field);
            setup.set(field, written.strip_suffix(b"\n").unwrap_or(&written)).unwrap();
            assert_eq!(setup.text(field), text);
        }
    }

    #[test]
    fn bad_values_are_refused() {
        let mut setup = Setup::default();
        let bad: [(Field, &[u8]); 9] = [
            (Field::Cwd, b"relative"),
            (Field::Cwd, b"/a\0b"),
            (Field::Env, b"novalue"),
            (Field::Env, b"=x"),
            (Field::User, b"a\nb"),
            (Field::Timeout, b"soon"),
            (Field::Tty, b"24"),
            (Field::Tty, b"0 80"),
            (Field::Tty, b"24 80 3"),
        ];
        for (field, value) in bad {
            assert!(setup.set(field, value).is_err(), "{field:?} {value:?}");
        }
        assert!(setup.set_argv(b"").is_err() && setup.set_argv(b"\0x").is_err() && setup.set_argv(b"\n").is_err());
        assert!(setup.set_argv(&vec![b'x'; 200_000]).is_err());
        assert_eq!(setup, Setup::default());
    }

    #[test]
    fn arguments_are_bytes() {
        let mut setup = Setup::default();
        setup.set_argv(b"printf\0%s\\n\0a b\xff\0\0").unwrap();
        assert_eq!(setup.argv, [&b"printf"[..], b"%s\\n", b"a b\xff", b""]);
        assert_eq!(setup.argv_text(), b"printf\0%s\\n\0a b\xff\0\0");
        setup.set_argv(b"ls\n").unwrap();
        assert_eq!(setup.argv, [b"ls"]);
    }
}
