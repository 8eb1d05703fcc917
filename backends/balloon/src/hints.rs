//! Free page hinting (virtio 1.2, 5.5.6.5): which pages the guest had no use for at some moment, for whoever copies its
//! memory.
//!
//! ```text
//!   stopped ──start──> wanted ──the driver says its number──> hinting ──the driver says STOP──> complete ──done──> done
//!      ^ └── stop, in any state ──────────────────────────────────┘
//! ```
//!
//! Nothing is given back: the driver may use a hinted page again at any time, without a word. Until `done` it holds what it
//! can spare of them.

use serde::Serialize;

use crate::config_space::{CMD_ID_DONE, CMD_ID_STOP};
use crate::pages::{Run, RunSet};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    #[default]
    Stopped,
    /// The driver has been asked, and has not begun.
    Wanted,
    Hinting,
    /// All that the driver wanted to hint is known.
    Complete,
    /// The driver may use them all again.
    Done,
}

#[derive(Debug, Default)]
pub(crate) struct Hints {
    stage: Stage,
    /// Of the hinting that was started last; 0 before the first.
    number: u32,
    free: RunSet,
}

impl Hints {
    /// `free_page_hint_cmd_id`.
    pub(crate) fn command(&self) -> u32 {
        match self.stage {
            Stage::Stopped | Stage::Complete => CMD_ID_STOP,
            Stage::Wanted | Stage::Hinting => self.number,
            Stage::Done => CMD_ID_DONE,
        }
    }

    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    pub(crate) fn free(&self) -> &RunSet {
        &self.free
    }

    pub(crate) fn start(&mut self) {
        self.number = self.number.wrapping_add(1).max(CMD_ID_DONE + 1);
        self.stage = Stage::Wanted;
        self.free = RunSet::default();
    }

    pub(crate) fn stop(&mut self) {
        *self = Self { number: self.number, ..Self::default() };
    }

    pub(crate) fn done(&mut self) {
        self.stop();
        self.stage = Stage::Done;
    }

    /// The driver says a number: that of the hinting it begins, or STOP.
    pub(crate) fn said(&mut self, number: u32) {
        self.stage = match self.stage {
            Stage::Wanted | Stage::Hinting if number == self.number => Stage::Hinting,
            Stage::Hinting if number == CMD_ID_STOP => Stage::Complete,
            other => other,
        };
    }

    /// The driver has no use for these pages.
    pub(crate) fn hint(&mut self, run: Run) {
        if self.stage == Stage::Hinting {
            self.free.insert(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_count_between_the_drivers_number_and_its_stop() {
        let run = |at: u64| Run { start: at << 22, end: (at + 1) << 22 };
        let mut hints = Hints::default();
        hints.hint(run(0));
        hints.start();
        let number = hints.command();
        assert!(number > CMD_ID_DONE);
        hints.hint(run(1));
        hints.said(number + 1);
        hints.said(CMD_ID_STOP);
        assert_eq!(hints.stage(), Stage::Wanted, "it is of another hinting");
        hints.said(number);
        hints.hint(run(2));
        hints.hint(run(3));
        hints.said(CMD_ID_STOP);
        hints.hint(run(4));
        assert_eq!((hints.stage(), hints.command()), (Stage::Complete, CMD_ID_STOP));
        assert_eq!(hints.free().runs(), [Run { start: 2 << 22, end: 4 << 22 }]);
        hints.done();
        assert_eq!((hints.command(), hints.free().len()), (CMD_ID_DONE, 0));
        hints.start();
        assert_eq!(hints.command(), number + 1);
        hints.stop();
        assert_eq!(hints.command(), CMD_ID_STOP);
    }
}
