//! What happens on an interrupt, and on every other signal that asks the program to end.
//!
//! The handler runs on a thread of its own and deletes nothing: what is temporary belongs to the thread that writes
//! it. One lock decides between a complete result and none.

use std::io;
use std::process;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, INTERRUPTED};

/// How far the program is with its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing temporary is on the disk.
    Idle,
    /// Something temporary is on the disk.
    Writing,
    /// The thread that writes, or that looks at the result, was asked to stop.
    Stopping,
    /// The result has its name.
    Complete,
}

static STATE: Mutex<State> = Mutex::new(State::Idle);

/// Lets an interrupt, a request to end and a terminal that closes end the program without leaving anything behind.
pub fn handle() {
    // Without a handler an interrupt ends the program all the same.
    _ = ctrlc::set_handler(|| {
        let mut state = state();
        match *state {
            // The lock is kept, so nothing temporary appears while the program ends.
            State::Idle => process::exit(i32::from(INTERRUPTED)),
            // After a result, the program is about to end in any case, unless it looks at the result.
            State::Writing | State::Complete => *state = State::Stopping,
            State::Stopping => {}
        }
    });
}

/// Creates what is temporary. From here on the program ends through [`check`] or [`complete`].
pub fn begin<T>(create: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let mut state = state();
    let created = create()?;
    *state = State::Writing;
    Ok(created)
}

/// Refuses to go on after an interrupt. Everything that takes long calls this again and again.
///
/// # Errors
///
/// [`Error::Interrupted`].
pub fn check() -> Result<(), Error> {
    match *state() {
        State::Stopping => Err(Error::Interrupted),
        _ => Ok(()),
    }
}

/// Gives what was temporary its name, unless an interrupt came first; one that comes later does not change the result.
///
/// # Errors
///
/// [`Error::Interrupted`], and what `place` fails with.
pub fn complete<T>(place: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let mut state = state();
    if *state == State::Stopping {
        return Err(Error::Interrupted);
    }
    let placed = place()?;
    *state = State::Complete;
    Ok(placed)
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}
