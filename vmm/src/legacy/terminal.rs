//! The person's terminal: raw while the machine has it, and always given back as it was.

use std::os::fd::AsFd;
use std::sync::OnceLock;

use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{
    LocalModes, OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};

/// How the terminal was, for whoever ends this process: the guard below, or the panic hook (a panic aborts, and
/// no destructor runs).
static BEFORE: OnceLock<Termios> = OnceLock::new();

/// Standard input in raw mode, until this is dropped.
pub struct RawTerminal(());

impl RawTerminal {
    /// Takes the terminal, if standard input is one and it is ours: a process in the background that touched it
    /// would be stopped.
    pub fn take() -> Option<Self> {
        let terminal = stdin();
        if !isatty(terminal) || tcgetpgrp(terminal).ok()? != getpgrp() {
            return None;
        }
        let before =
            BEFORE.get_or_init(|| tcgetattr(terminal).expect("isatty said that it is a terminal")).clone();
        let mut raw = before;
        raw.make_raw();
        // Our own log lines share the screen, and they end in a bare newline.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        raw.local_modes -= LocalModes::ISIG;
        tcsetattr(terminal, OptionalActions::Now, &raw).ok()?;
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            hook(panic);
        }));
        Some(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = BEFORE.get() {
        // Nothing is left to do where even this fails: the terminal is gone.
        let _ = tcsetattr(stdin().as_fd(), OptionalActions::Drain, before);
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
