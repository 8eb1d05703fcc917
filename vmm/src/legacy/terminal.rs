//! The person's terminal: raw while the machine has it, and always given back as it was.
//!
//! ```text
//!              foreground                     SIGTSTP: given back, then we stop
//!   Elsewhere ───────────> Raw ───────────────────────────────────────────────────> stopped
//!       ^                  ^ └─ SIGSTOP: somebody else sets it as he likes ────────────>│
//!       │                  │ SIGCONT, foreground                                        │
//!       └──────────────────┴────────────────────────────────────────────────────────────┘
//!        SIGCONT, background
//! ```
//!
//! Invariant: in the background it is neither set nor read, since a process that did would be stopped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{
    LocalModes, OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};
use signal_hook::consts::{SIGCONT, SIGTSTP};
use signal_hook::low_level::emulate_default_handler;

use crate::bus::Caught;

/// How the terminal was, for whoever ends this process: the guard below, the panic hook (a panic aborts, and no
/// destructor runs), or the sandbox.
static BEFORE: OnceLock<Termios> = OnceLock::new();

/// Standard input that is a terminal: raw whenever it is ours, until this is dropped.
pub struct Terminal {
    raw: Option<RawMode>,
    stop: Caught,
    resume: Caught,
}

impl Terminal {
    /// Takes the terminal, if standard input is one.
    pub fn take() -> io::Result<Option<Self>> {
        if !isatty(stdin()) {
            return Ok(None);
        }
        let (stop, resume) = (Caught::of(&[SIGTSTP])?, Caught::of(&[SIGCONT])?);
        Ok(Some(Self { raw: RawMode::set(), stop, resume }))
    }

    /// Whether what is typed is ours to read.
    pub fn is_ours(&self) -> bool {
        self.raw.is_some()
    }

    /// Readable when [`Terminal::serve`] has something to do.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.stop.as_fd(), self.resume.as_fd()]
    }

    /// Does what a signal asked for, and looks whether the terminal has become ours.
    pub fn serve(&mut self) {
        if self.stop.take() > 0 {
            self.raw = None;
            // The process stops in here, until somebody continues it.
            if let Err(error) = emulate_default_handler(SIGTSTP) {
                tracing::debug!("SIGTSTP: {error}");
            }
        }
        if self.resume.take() > 0 || self.raw.is_none() {
            // Whoever had the terminal meanwhile may have left it in any mode. The old guard goes first: it sets it too.
            drop(self.raw.take());
            self.raw = RawMode::set();
        }
    }
}

/// Raw mode, until this is dropped.
struct RawMode(());

impl RawMode {
    fn set() -> Option<Self> {
        static PANIC_HOOK: OnceLock<()> = OnceLock::new();
        let terminal = stdin();
        if !in_foreground() {
            return None;
        }
        let before = match BEFORE.get() {
            Some(before) => before,
            None => {
                let now = tcgetattr(terminal).ok()?;
                BEFORE.get_or_init(|| now)
            }
        };
        let mut raw = before.clone();
        raw.make_raw();
        // Our own log lines share the screen, and they end in a bare newline.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        raw.local_modes -= LocalModes::ISIG;
        tcsetattr(terminal, OptionalActions::Now, &raw).ok()?;
        PANIC_HOOK.get_or_init(|| {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                hook(panic);
            }));
        });
        Some(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn in_foreground() -> bool {
    tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp())
}

/// Gives the terminal back as it was. A signal handler may call it.
pub fn restore() {
    if let Some(before) = BEFORE.get()
        && in_foreground()
    {
        // At once, not when all output is gone: a terminal that is not read would hold us. Nothing is left to do where
        // even this fails: the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

/// What a person asks of cleave itself, behind Ctrl-A.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Quit,
    PowerButton,
    Help,
}

pub const HELP: &str = "\
Ctrl-A x  quit: stop the machine at once
Ctrl-A p  press the power button
Ctrl-A a  send Ctrl-A to the guest
Ctrl-A h  this help";

/// Tells the guest's keys from ours.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

const CTRL_A: u8 = 1;

impl Keys {
    /// Sorts `typed` into what the guest gets, appended to `guest`, and the commands among it.
    pub fn sort(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for &key in typed {
            match (std::mem::take(&mut self.escaped), key) {
                (false, CTRL_A) => self.escaped = true,
                (false, key) => guest.push(key),
                (true, b'x' | b'X') => commands.push(Command::Quit),
                (true, b'p' | b'P') => commands.push(Command::PowerButton),
                (true, b'a' | b'A' | CTRL_A) => guest.push(CTRL_A),
                (true, _) => commands.push(Command::Help),
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_follows_ctrl_a_is_ours() {
        let mut keys = Keys::default();
        let mut guest = Vec::new();
        assert_eq!(keys.sort(b"ls x\n\x01", &mut guest), []);
        assert_eq!(keys.sort(b"hx\x01a\x01\x01\x01p", &mut guest), [Command::Help, Command::PowerButton]);
        assert_eq!(guest, b"ls x\nx\x01\x01");
        assert_eq!(keys.sort(b"\x01x", &mut guest), [Command::Quit]);
    }
}
