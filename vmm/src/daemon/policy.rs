//! Whether and when a daemon that ended is started again. No clock and no process: figures in, a decision out.

use std::fmt;
use std::process::ExitStatus;
use std::time::Duration;

use crate::config::Restart;

/// The first restart is immediate; the pauses before those that follow double from this...
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// ...to this: a guest waits for it, and one start a second costs a host next to nothing...
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// ...until a daemon lives this long.
const LIVED: Duration = Duration::from_secs(1);

/// What to do about a daemon that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Start it again after this pause.
    Restart(Duration),
    GiveUp(Reason),
}

/// Why it is not started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Never,
    Success,
    Limit(u32),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("restart=never"),
            Self::Success => f.write_str("restart=on-failure, and it did not fail"),
            Self::Limit(limit) => write!(f, "restart-limit={limit}"),
        }
    }
}

/// The restarts of one daemon so far.
#[derive(Debug, Clone)]
pub struct Restarts {
    when: Restart,
    limit: Option<u32>,
    count: u32,
    /// Attempts that came to nothing.
    failed: u32,
    /// Ends in a row that came too soon.
    streak: u32,
}

impl Restarts {
    pub fn new(when: Restart, limit: Option<u32>) -> Self {
        Self { when, limit, count: 0, failed: 0, streak: 0 }
    }

    /// How many times it was started again.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// It has been started again.
    pub fn started(&mut self) {
        self.count += 1;
    }

    /// It could not even be started, and the attempt took so long: that counts as one that ended.
    pub fn failed(&mut self, took: Duration) -> Decision {
        self.failed = self.failed.saturating_add(1);
        self.after(None, took)
    }

    /// Decides about a daemon that lived this long and ended so; `None` for one of which it does not matter how.
    pub fn after(&mut self, status: Option<ExitStatus>, lived: Duration) -> Decision {
        match self.when {
            Restart::Never => return Decision::GiveUp(Reason::Never),
            Restart::OnFailure if status.is_some_and(|status| status.success()) => {
                return Decision::GiveUp(Reason::Success);
            }
            Restart::OnFailure | Restart::Always => {}
        }
        let tried = self.count.saturating_add(self.failed);
        if let Some(limit) = self.limit.filter(|limit| tried >= *limit) {
            return Decision::GiveUp(Reason::Limit(limit));
        }
        if lived >= LIVED {
            self.streak = 0;
        }
        let pause = match self.streak {
            0 => Duration::ZERO,
            // 2^7 times the first is beyond the longest.
            streak => (FIRST_PAUSE * (1 << (streak - 1).min(7))).min(LONGEST_PAUSE),
        };
        self.streak = self.streak.saturating_add(1);
        Decision::Restart(pause)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    const SOON: Duration = Duration::from_millis(3);

    fn killed() -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(9))
    }

    fn succeeded() -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(0))
    }

    #[test]
    fn pauses_grow_from_nothing_to_a_cap_while_it_ends_too_soon() {
        let mut restarts = Restarts::new(Restart::Always, None);
        let mut pauses = Vec::new();
        for _ in 0..12 {
            let Decision::Restart(pause) = restarts.after(killed(), SOON) else { panic!("it gives up") };
            pauses.push(pause.as_millis());
        }
        assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000, 1000]);
        assert_eq!(restarts.after(killed(), LIVED), Decision::Restart(Duration::ZERO), "it lived");
        assert_eq!(restarts.after(None, Duration::ZERO), Decision::Restart(FIRST_PAUSE));
        restarts.streak = u32::MAX;
        assert_eq!(restarts.after(succeeded(), SOON), Decision::Restart(LONGEST_PAUSE));
        assert_eq!(restarts.count(), 0, "nothing was started");
    }

    #[test]
    fn what_was_asked_for_is_obeyed() {
        let never = Restarts::new(Restart::Never, None).after(killed(), LIVED);
        assert_eq!(never, Decision::GiveUp(Reason::Never));
        let mut on_failure = Restarts::new(Restart::OnFailure, None);
        assert_eq!(on_failure.after(succeeded(), LIVED), Decision::GiveUp(Reason::Success));
        assert_eq!(on_failure.after(killed(), LIVED), Decision::Restart(Duration::ZERO));
        let exit_1 = Some(ExitStatus::from_raw(1 << 8));
        assert_eq!(on_failure.after(exit_1, LIVED), Decision::Restart(Duration::ZERO));
        assert_eq!(on_failure.after(None, LIVED), Decision::Restart(Duration::ZERO));
        let mut limited = Restarts::new(Restart::Always, Some(2));
        let given_up = (0..9).filter(|_| {
            let restart = limited.after(killed(), LIVED) == Decision::Restart(Duration::ZERO);
            if restart {
                limited.started();
            }
            !restart
        });
        assert_eq!(given_up.count(), 7);
        assert_eq!(limited.count(), 2);
        let mut stillborn = Restarts::new(Restart::Always, Some(2));
        assert_eq!(stillborn.after(killed(), LIVED), Decision::Restart(Duration::ZERO));
        assert!(matches!(stillborn.failed(SOON), Decision::Restart(_)));
        assert_eq!(stillborn.failed(SOON), Decision::GiveUp(Reason::Limit(2)));
        assert_eq!(stillborn.count(), 0, "it was tried twice and never ran");
        assert_eq!(
            Restarts::new(Restart::Always, Some(0)).after(killed(), LIVED),
            Decision::GiveUp(Reason::Limit(0))
        );
    }
}
