//! Diagnostics on standard error, one line an event, in the style of a service: the journal adds the time.

use std::io::{self, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Starts logging for this process. `CLEAVE_LOG` chooses what is said (`warn` unless set), in the syntax of
/// `tracing_subscriber::filter::Targets`: `CLEAVE_LOG=debug`, `CLEAVE_LOG=info,cleave::vhost=trace`.
///
/// Not `EnvFilter`, which reads the same and more: the regular expressions it brings were a third of a daemon's memory.
pub fn init() {
    let wish = std::env::var("CLEAVE_LOG").ok().and_then(|text| text.parse().ok());
    let filter = wish.unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| NeverWaits)
        .without_time()
        .with_target(false)
        .with_ansi(false);
    // A second call (a test, an embedding program) keeps the first subscriber.
    let _ = tracing_subscriber::registry().with(lines).with(filter).try_init();
}

/// Prints lines that a person asked for on standard error, none of them if its reader does not read.
pub fn print(text: &str) {
    for line in text.lines() {
        let line = format!("{line}\n");
        if !matches!(NeverWaits.write(line.as_bytes()), Ok(len) if len == line.len()) {
            return;
        }
    }
}

/// Standard error, unless its reader does not read: a line that would have to wait is dropped. Whoever logs may be the
/// thread that everything else waits for.
struct NeverWaits;

impl Write for NeverWaits {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let stderr = rustix::stdio::stderr();
        let mut fds = [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)];
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(1) => io::stderr().write(line),
            _ => Ok(line.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
