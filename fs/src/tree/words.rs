//! Lines of `ctl`, taken apart into words the way Plan 9's rc does: blanks separate words, a word in single quotes is
//! taken as it is, two single quotes in it are one, and `#` at the beginning of a word begins a comment.

use std::borrow::Cow;

/// Longest line, in bytes.
pub const MAX_LINE: usize = 64 * 1024;

/// Why a line is not a list of words.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WordsError {
    /// The bytes are no text.
    #[error("the line is not UTF-8 text")]
    NotText,
    /// A NUL or another control character outside quotes would be taken for something that it is not.
    #[error("the line has a control character (byte {0:#04x})")]
    Control(u8),
    /// A quote without its partner.
    #[error("unclosed quote: {0}; a quote in a word is written '' inside quotes")]
    Unclosed(String),
    /// Too long to be a command.
    #[error("the line is longer than {MAX_LINE} bytes")]
    TooLong,
}

/// Splits a line (without its newline) into words; none for an empty line or a comment.
pub fn split(line: &[u8]) -> Result<Vec<String>, WordsError> {
    if line.len() > MAX_LINE {
        return Err(WordsError::TooLong);
    }
    let line = std::str::from_utf8(line).map_err(|_| WordsError::NotText)?;
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            ' ' | '\t' | '\r' => words.extend(word.take()),
            '#' if word.is_none() => break,
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some((_, '\'')) if chars.next_if(|(_, next)| *next == '\'').is_some() => word.push('\''),
                        Some((_, '\'')) => break,
                        Some((_, '\0')) => return Err(WordsError::Control(0)),
                        Some((_, inside)) => word.push(inside),
                        None => return Err(WordsError::Unclosed(line.get(at..).unwrap_or_default().to_string())),
                    }
                }
            }
            c if c.is_ascii_control() => return Err(WordsError::Control(c as u8)),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

/// A word as it is written in a line, quoted only where it must be.
pub fn quote(word: &str) -> Cow<'_, str> {
    let plain = !word.is_empty()
        && !word.starts_with('#')
        && word.chars().all(|c| !c.is_ascii_control() && c != ' ' && c != '\'');
    if plain { Cow::Borrowed(word) } else { Cow::Owned(format!("'{}'", word.replace('\'', "''"))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Vec<String> {
        split(line.as_bytes()).unwrap()
    }

    #[test]
    fn plain_words() {
        assert_eq!(words("stop 5s"), ["stop", "5s"]);
        assert_eq!(words("  create\tdev  image=python:3.12 \r"), ["create", "dev", "image=python:3.12"]);
        assert!(words("").is_empty());
        assert!(words("   ").is_empty());
    }

    #[test]
    fn quotes() {
        assert_eq!(words("set command='it''s here'"), ["set", "command=it's here"]);
        assert_eq!(words("a '' b"), ["a", "", "b"]);
        assert_eq!(words("a'b c'd"), ["ab cd"]);
        assert_eq!(words("'#' x"), ["#", "x"]);
        assert!(matches!(split(b"set 'a"), Err(WordsError::Unclosed(_))));
    }

    #[test]
    fn comments() {
        assert!(words("# start  boots it").is_empty());
        assert_eq!(words("stop # now"), ["stop"]);
        assert_eq!(words("set tag=a#b"), ["set", "tag=a#b"]);
    }

    #[test]
    fn not_text() {
        assert_eq!(split(b"stop\0"), Err(WordsError::Control(0)));
        assert_eq!(split(b"'stop\0'"), Err(WordsError::Control(0)));
        assert_eq!(split(b"\xff"), Err(WordsError::NotText));
        assert_eq!(split(&vec![b'a'; MAX_LINE + 1]), Err(WordsError::TooLong));
    }

    proptest! {
        #[test]
        fn never_panics(line: Vec<u8>) {
            let _ = split(&line);
        }

        #[test]
        fn quoting_comes_back(list in proptest::collection::vec("[^\0]*", 0..6)) {
            let line = list.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
            prop_assert_eq!(split(line.as_bytes()), Ok(list));
        }
    }
}
