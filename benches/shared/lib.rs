//! What several benchmarks share.

mod server;

use std::process::ExitCode;

pub use server::Server;

/// Prints an error on one line, and tells the shell how a program ended.
pub fn exit_code(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
