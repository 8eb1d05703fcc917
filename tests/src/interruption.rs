//! What a program that is interrupted (SIGINT, SIGTERM, SIGHUP) leaves behind: neither its processes nor its files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

static MADE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// An interruption removes `path` and everything in it, if there is any by then. Without [`tidy_up`] nothing does.
pub fn removes(path: &Path) {
    MADE.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
}

/// From now on an interruption ends the processes that this one has started and removes what was named to [`removes`],
/// then it ends this one, as it would have anyway.
///
/// # Errors
/// When the system refuses a thread or a signal handler.
pub fn tidy_up() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::Builder::new().name("interruption".to_owned()).spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        kill_children();
        let made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        for path in made.iter() {
            // Most are gone already.
            let _ = fs::remove_dir_all(path);
        }
        // What the other threads have started meanwhile. They make no files any more: `made` stays locked.
        kill_children();
        let _ = emulate_default_handler(signal);
    })?;
    Ok(())
}

fn kill_children() {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    for task in tasks {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|id| Pid::from_raw(id.parse().ok()?)) {
            let _ = kill_process(child, Signal::KILL);
        }
    }
}
