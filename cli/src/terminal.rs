//! What people read: lines on the standard output and the standard error, and how names and counts are written in them.

use std::io::{self, ErrorKind, Write};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::error::Error;

/// Writes a result. A reader who has seen enough and closed the pipe is no failure.
pub fn print(text: &str) -> Result<(), Error> {
    print_bytes(text.as_bytes())
}

/// Writes a result that is made of bytes, as [`print`] does.
pub fn print_bytes(bytes: &[u8]) -> Result<(), Error> {
    let mut output = io::stdout().lock();
    let written = output.write_all(bytes).and_then(|()| output.flush());
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::write(Path::new("standard output"))(error))
        }
        _ => Ok(()),
    }
}

/// Writes a result as text, or as JSON.
pub fn report(json: bool, text: &str, value: &Value) -> Result<(), Error> {
    match json {
        true => print(&format!("{value:#}\n")),
        false => print(text),
    }
}

/// Writes a line to the standard error. It is lost where nobody reads that.
pub fn note(line: &str) {
    _ = writeln!(io::stderr(), "{}", shown(line));
}

/// A bar on the standard error, if that is a terminal, for work on so many bytes.
pub fn progress(bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{wide_bar} {bytes} of {total_bytes}, {eta} left");
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A name from a file, without the control characters that a terminal would obey.
pub fn shown(name: &str) -> String {
    name.replace(char::is_control, "\u{fffd}")
}

/// A count of things.
pub fn plural(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    }
}

/// Which rows are meant, unless all of them are.
pub fn rows_of(count: usize, start: usize, all: usize) -> String {
    match count == all {
        true => String::new(),
        false => format!("rows {start} to {} ", start + count - 1),
    }
}
