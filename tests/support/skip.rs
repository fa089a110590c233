//! Tests that cannot run here say so, and are counted: the reason is printed, and added to the file that
//! `MACHINEFS_SKIPS` names (`scripts/test` reads it).

use std::io::Write;

/// What of a test is skipped.
#[derive(Clone, Copy)]
pub enum What {
    /// All of it: it is not to be counted as passed.
    Test,
    /// A part: one shell, one program.
    Part,
}

/// Notes a skip; use [`skip!`](crate::skip!) and [`skip_part!`](crate::skip_part!).
pub fn note(what: What, reason: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_string();
    println!("skipped: {reason}");
    let Some(path) = std::env::var_os("MACHINEFS_SKIPS") else { return };
    let kind = match what {
        What::Test => "test",
        What::Part => "part",
    };
    // One short write with O_APPEND: lines of several threads and processes do not mix.
    let line = format!("{kind}\t{name}: {}\n", reason.replace('\n', " "));
    if let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(path) {
        let _ = file.write_all(line.as_bytes());
    }
}

/// Ends the test here as skipped.
#[macro_export]
macro_rules! skip {
    ($($arg:tt)*) => {{
        $crate::skip::note($crate::skip::What::Test, &format!($($arg)*));
        return;
    }};
}

/// Notes that a part of the test is skipped, and goes on.
#[macro_export]
macro_rules! skip_part {
    ($($arg:tt)*) => {
        $crate::skip::note($crate::skip::What::Part, &format!($($arg)*))
    };
}
