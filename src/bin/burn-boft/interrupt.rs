//! Temporary files do not outlive an interrupt, nor another signal that asks the program to end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a shell reports of a program that an interrupt ended.
const EXIT_CODE: i32 = 130;

static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Lets an interrupt, a request to end and a terminal that closes remove what is temporary before they end the program.
pub fn handle() {
    // Without a handler an interrupt ends the program all the same.
    _ = ctrlc::set_handler(|| {
        for path in temporary().iter() {
            _ = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
        }
        process::exit(EXIT_CODE);
    });
}

/// Makes a path one that an interrupt removes.
pub fn register(path: &Path) {
    temporary().push(path.to_path_buf());
}

fn temporary() -> MutexGuard<'static, Vec<PathBuf>> {
    TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner)
}
