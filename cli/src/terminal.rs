//! What people read: lines on the standard output and the standard error, and how names and counts are written in them.

use std::io::{self, ErrorKind, Write};
use std::path::Path;

use crate::error::Error;

/// Writes a result. A reader who has seen enough and closed the pipe is no failure.
pub fn print(text: &str) -> Result<(), Error> {
    let mut output = io::stdout().lock();
    let written = output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush());
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::write(Path::new("standard output"))(error))
        }
        _ => Ok(()),
    }
}

/// Writes a line to the standard error. It is lost where nobody reads that.
pub fn note(line: &str) {
    _ = writeln!(io::stderr(), "{}", shown(line));
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
