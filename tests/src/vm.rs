//! A running VMM (or any program with a console on its standard output), and what a test does to it: wait for
//! words, type, wait for the end.
//!
//! A reader thread for each of the two streams keeps all that was said; [`Vm::expect`] looks at what came
//! after the last words it found. Whatever happens, the process is gone when this is dropped.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::last_lines;

/// Failures are texts: a test shows them and nothing else is done with them.
pub type Outcome<T> = std::result::Result<T, String>;

const POLL: Duration = Duration::from_millis(10);

pub struct Vm {
    child: Child,
    stdin: Option<ChildStdin>,
    screen: Stream,
    errors: Stream,
    started: Instant,
}

/// How a process ended, with everything it said.
#[derive(Debug)]
pub struct Exit {
    /// None when a signal ended it.
    pub code: Option<i32>,
    pub screen: String,
    pub errors: String,
    pub after: Duration,
}

impl Vm {
    pub fn start(command: &mut Command) -> Outcome<Self> {
        let mut child =
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .map_err(|error| format!("cannot start {}: {error}", command.get_program().display()))?;
        let stdin = child.stdin.take();
        let screen = Stream::reading(child.stdout.take());
        let errors = Stream::reading(child.stderr.take());
        Ok(Self { child, stdin, screen, errors, started: Instant::now() })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the guest's console says `words`; gives what it said since the words expected before.
    pub fn expect(&self, words: &str, within: Duration) -> Outcome<String> {
        self.screen.expect(words, within).ok_or_else(|| self.missing("the console", words, within))
    }

    /// Waits until the program itself says `words` on its standard error.
    pub fn expect_error(&self, words: &str, within: Duration) -> Outcome<String> {
        self.errors.expect(words, within).ok_or_else(|| self.missing("standard error", words, within))
    }

    /// Types a line at the guest's console.
    pub fn send(&mut self, line: &str) -> Outcome<()> {
        self.send_bytes(format!("{line}\n").as_bytes())
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) -> Outcome<()> {
        let stdin = self.stdin.as_mut().ok_or("the console's input is closed")?;
        stdin.write_all(bytes).and_then(|()| stdin.flush()).map_err(|error| format!("cannot type: {error}"))
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end of the process.
    pub fn wait(mut self, within: Duration) -> Outcome<Exit> {
        let deadline = Instant::now() + within;
        loop {
            let status = self.child.try_wait().map_err(|error| format!("cannot wait: {error}"))?;
            if let Some(status) = status {
                let after = self.started.elapsed();
                return Ok(Exit {
                    code: status.code(),
                    screen: self.screen.whole(),
                    errors: self.errors.whole(),
                    after,
                });
            }
            if Instant::now() > deadline {
                return Err(format!("still running after {within:?}\n{}", self.said()));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits for the end and demands exit code 0.
    pub fn finish(self, within: Duration) -> Outcome<Exit> {
        let exit = self.wait(within)?;
        exit.demand(0).map(|()| exit)
    }

    fn missing(&self, place: &str, words: &str, within: Duration) -> String {
        format!("{place} did not say {words:?} within {within:?}\n{}", self.said())
    }

    fn said(&self) -> String {
        said(&self.screen.text(), &self.errors.text())
    }
}

impl Exit {
    pub fn demand(&self, code: i32) -> Outcome<()> {
        if self.code == Some(code) {
            return Ok(());
        }
        let got = self.code.map_or("a signal".to_owned(), |code| format!("exit code {code}"));
        Err(format!("ended with {got} instead of exit code {code}\n{}", said(&self.screen, &self.errors)))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn said(screen: &str, errors: &str) -> String {
    format!(
        "--- console ends\n{}\n--- standard error ends\n{}",
        last_lines(screen, 25),
        last_lines(errors, 25)
    )
}

/// What came out of one pipe so far.
struct Stream {
    shared: Arc<(Mutex<Said>, Condvar)>,
}

#[derive(Default)]
struct Said {
    bytes: Vec<u8>,
    /// Bytes up to here were found by an expectation.
    seen: usize,
    ended: bool,
}

impl Stream {
    fn reading(pipe: Option<impl Read + Send + 'static>) -> Self {
        let shared = Arc::new((Mutex::new(Said::default()), Condvar::new()));
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            let mut pipe = pipe;
            loop {
                let count = pipe.as_mut().and_then(|pipe| pipe.read(&mut buffer).ok()).unwrap_or(0);
                let mut said = locked(&theirs.0);
                said.bytes.extend_from_slice(&buffer[..count]);
                said.ended = count == 0;
                theirs.1.notify_all();
                if said.ended {
                    return;
                }
            }
        });
        Self { shared }
    }

    fn expect(&self, words: &str, within: Duration) -> Option<String> {
        let deadline = Instant::now() + within;
        let mut said = locked(&self.shared.0);
        loop {
            let fresh = &said.bytes[said.seen..];
            let found = fresh.windows(words.len()).position(|window| window == words.as_bytes());
            if let Some(at) = found {
                let text = String::from_utf8_lossy(&fresh[..at + words.len()]).into_owned();
                said.seen += at + words.len();
                return Some(text);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            if said.ended {
                return None;
            }
            said = self.shared.1.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&locked(&self.shared.0).bytes).into_owned()
    }

    /// The text once the pipe has ended. A child that outlives its parent may hold the pipe open: then what
    /// there is a second later.
    fn whole(&self) -> String {
        let deadline = Instant::now() + Duration::from_secs(1);
        while !locked(&self.shared.0).ended && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        self.text()
    }
}

fn locked(said: &Mutex<Said>) -> MutexGuard<'_, Said> {
    said.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Vm {
        Vm::start(Command::new("/bin/sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn expectations_go_forward_and_the_end_is_seen() {
        let mut vm = shell("echo one two; read x; echo got $x; echo oops >&2; exit 3");
        vm.expect("one", SOON).unwrap();
        assert!(vm.expect("one", Duration::from_millis(50)).is_err());
        vm.send("hello").unwrap();
        assert_eq!(vm.expect("got hello", SOON).unwrap(), " two\ngot hello");
        let exit = vm.wait(SOON).unwrap();
        assert_eq!(exit.code, Some(3));
        assert_eq!(exit.errors, "oops\n");
        assert!(exit.demand(0).unwrap_err().contains("oops"));
    }

    #[test]
    fn a_process_that_ends_does_not_keep_an_expectation_waiting() {
        let vm = shell("true");
        let begun = Instant::now();
        assert!(vm.expect("never", SOON).is_err());
        assert!(begun.elapsed() < SOON);
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let vm = shell("exec sleep 1000");
        let pid = vm.pid();
        drop(vm);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
