//! `allow_commands`: which programs jobs may be. With a list set, a text is one line that is split into words and given
//! to the program as they are; no shell ever sees it, so that nothing in it can mean another program.

use super::error::MachineError;

/// Longest command where only some are allowed, in bytes: an argument of a program has at most 128 KiB (execve(2)).
pub const LONGEST: u64 = 64 * 1024;

/// Whether a text may be so long, in bytes, where only some commands are allowed.
///
/// # Errors
/// E2BIG.
pub fn check_length(len: u64) -> Result<(), MachineError> {
    if len <= LONGEST {
        return Ok(());
    }
    Err(MachineError::too_big("with allow_commands set, a command has at most 64 KiB"))
}

/// The names that a list allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Everything, through a shell.
    All,
    /// These programs.
    Names(Vec<String>),
}

impl Allowed {
    /// Reads the value of the key: `*`, or names separated by blanks or commas. `None` when it is neither.
    pub fn parse(value: &str) -> Option<Allowed> {
        if value == "*" {
            return Some(Allowed::All);
        }
        let names: Vec<String> = value.split([' ', ',']).filter(|name| !name.is_empty()).map(str::to_string).collect();
        let is_name =
            |name: &String| !name.contains(['*', '?', '[', '\'', '"', '\\', '$', '`', ';', '|', '&', '<', '>']);
        (!names.is_empty() && names.iter().all(is_name)).then_some(Allowed::Names(names))
    }

    /// Whether a program may be run: its name alone if that is listed, its path only if that very path is.
    ///
    /// # Errors
    /// EPERM, with the name.
    pub fn check(&self, program: &[u8]) -> Result<(), MachineError> {
        match self {
            Allowed::All => Ok(()),
            Allowed::Names(names) if names.iter().any(|name| name.as_bytes() == program) => Ok(()),
            Allowed::Names(names) => Err(MachineError::forbidden(format!(
                "{} is not allowed here: config/allow_commands has {}",
                super::events::quote(&String::from_utf8_lossy(program)),
                names.join(" ")
            ))),
        }
    }

    /// The words that a text stands for; `None`: it is for the shell, since everything is allowed.
    ///
    /// # Errors
    /// EPERM for a program that is not listed, EINVAL for a text that is not one line of words.
    pub fn split(&self, text: &[u8]) -> Result<Option<Vec<Vec<u8>>>, MachineError> {
        if *self == Allowed::All {
            return Ok(None);
        }
        let line = text.strip_suffix(b"\n").unwrap_or(text);
        let line = std::str::from_utf8(line)
            .map_err(|_| MachineError::invalid("with allow_commands set, a command is one line of UTF-8 text"))?;
        if line.contains(['\n', '\0']) {
            return Err(MachineError::invalid("with allow_commands set, a command is one line, without NUL"));
        }
        // A comment would swallow the rest in silence, and so this word, which is put at the end to see that.
        const END: &str = "end";
        let mut words =
            shell_words::split(&format!("{line} {END}")).map_err(|_| MachineError::invalid("unclosed quote"))?;
        if words.pop().as_deref() != Some(END) {
            return Err(MachineError::invalid("with allow_commands set, # and \\ at the end are to be quoted"));
        }
        let Some(program) = words.first() else {
            return Err(MachineError::invalid("with allow_commands set, an empty command is nothing"));
        };
        self.check(program.as_bytes())?;
        Ok(Some(words.into_iter().map(String::into_bytes).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errno::Errno;
    use proptest::prelude::*;

    fn split(list: &str, text: &str) -> Result<Vec<String>, Errno> {
        let words = Allowed::parse(list).unwrap().split(text.as_bytes()).map_err(|error| error.errno())?;
        Ok(words.unwrap().into_iter().map(|word| String::from_utf8(word).unwrap()).collect())
    }

    #[test]
    fn words_have_no_shell_meaning() {
        let words = |text: &str| split("ls, echo /opt/tool", text).unwrap();
        assert_eq!(words("ls -l '/a b' \"c d\" e\\ f\n"), ["ls", "-l", "/a b", "c d", "e f"]);
        assert_eq!(
            words("echo $(id) `id` $HOME * ; rm > x | cat &"),
            ["echo", "$(id)", "`id`", "$HOME", "*", ";", "rm", ">", "x", "|", "cat", "&"]
        );
        assert_eq!(words("echo 'a #b' a#b '#'"), ["echo", "a #b", "a#b", "#"]);
        assert_eq!(words("/opt/tool x"), ["/opt/tool", "x"]);
    }

    #[test]
    fn what_is_not_listed_is_refused() {
        for text in ["rm x", "/bin/ls", "./ls", "ls;rm", "LS", "'ls '", "$0", "sh -c ls", "\\ls/", "env ls"] {
            assert_eq!(split("ls echo", text), Err(Errno::EPERM), "{text}");
        }
        for text in ["", "\n", "ls\nrm x\n", "ls 'x", "#!/bin/sh\nls", "ls #x", "#", "ls \0", "ls x\\", "ls \"x"] {
            assert_eq!(split("ls echo", text), Err(Errno::EINVAL), "{text:?}");
        }
        let error = Allowed::parse("ls").unwrap().split(b"rm -rf /").unwrap_err();
        assert!(error.to_string().contains("rm ") && error.to_string().contains("ls"), "{error}");
    }

    #[test]
    fn a_list_is_names() {
        assert_eq!(Allowed::parse("*"), Some(Allowed::All));
        assert_eq!(Allowed::parse("*").unwrap().split(b"a\nb").unwrap(), None);
        for bad in ["", " , ", "l*", "ls;rm", "'ls'"] {
            assert_eq!(Allowed::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn the_first_word_is_always_listed(text in "[ -~\n]{0,40}") {
            if let Ok(words) = split("ls a b", &text) {
                prop_assert!(["ls", "a", "b"].contains(&words[0].as_str()));
            }
        }
    }
}
