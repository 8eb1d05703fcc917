//! The terminal of an interactive run, and its settings before it.

use std::io::{IsTerminal, stdin};

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

use super::Place;
use crate::error::{Context, Result};

pub(super) struct Terminal {
    before: Option<Termios>,
}

impl Terminal {
    /// Remembers the settings. QEMU makes the terminal raw but lets it turn each newline into carriage return
    /// and newline; L1's own terminal has done that already.
    pub(super) fn prepare(place: Place) -> Result<Self> {
        if !stdin().is_terminal() {
            return Ok(Self { before: None });
        }
        let before = tcgetattr(stdin()).context(|| "read the terminal's settings")?;
        if place == Place::L1 {
            let mut plain = before.clone();
            plain.output_modes.remove(OutputModes::ONLCR);
            tcsetattr(stdin(), OptionalActions::Now, &plain).context(|| "change the terminal's settings")?;
        }
        Ok(Self { before: Some(before) })
    }

    /// Puts the settings back, also those that a killed QEMU left changed.
    pub(super) fn restore(self) -> Result<()> {
        match self.before {
            Some(before) => tcsetattr(stdin(), OptionalActions::Now, &before)
                .context(|| "restore the terminal's settings"),
            None => Ok(()),
        }
    }
}
