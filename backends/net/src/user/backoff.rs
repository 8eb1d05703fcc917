//! When passt is started again. The first time at once, for it may have been bad luck; then later and later, as long as it
//! does not live.

use std::time::Duration;

const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// A guest waits for it, and one start a second costs a host next to nothing.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// One that served for so long has lived.
const LIVED: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Backoff {
    /// Ends in a row that came too soon.
    streak: u32,
}

impl Backoff {
    /// How long to wait after one that served for `served`, or not at all.
    pub(super) fn pause_after(&mut self, served: Option<Duration>) -> Duration {
        if served.is_some_and(|served| served >= LIVED) {
            self.streak = 0;
        }
        let pause = match self.streak {
            0 => Duration::ZERO,
            // 2^7 times the first is beyond the longest.
            streak => (FIRST_PAUSE * (1 << (streak - 1).min(7))).min(LONGEST_PAUSE),
        };
        self.streak = self.streak.saturating_add(1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_cap_until_one_lives() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..11).map(|_| backoff.pause_after(None).as_millis()).collect();
        assert_eq!(pauses, [0, 10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000]);
        assert_eq!(backoff.pause_after(Some(LIVED)), Duration::ZERO);
        assert_eq!(backoff.pause_after(Some(LIVED / 2)), FIRST_PAUSE);
    }
}
