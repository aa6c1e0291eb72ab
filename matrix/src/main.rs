//! Checks every model with both methods and prints the table of the README.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use burn_boft_matrix::{Method, entries, table};

fn main() -> ExitCode {
    let mut results = Vec::new();
    for entry in entries() {
        for method in [Method::Boft, Method::Oft] {
            // A model that panics must not hide the ones after it.
            let result = catch_unwind(AssertUnwindSafe(|| (entry.run)(method)))
                .map_err(|_| "it panicked, and the message is above".to_string())
                .and_then(|result| result.map_err(|failure| failure.to_string()));
            results.push((entry.name, method, result));
        }
    }
    println!("{}", table(&results));
    match results.iter().all(|(_, _, result)| result.is_ok()) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
