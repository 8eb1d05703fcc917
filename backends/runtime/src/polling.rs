//! When to look for work before sleeping: while that pays, and hardly ever on a disk where it does not.
//!
//! ```text
//!   looked, and work came: look again the next time
//!   looked in vain:        sleep at once the next 1, 2, 4 ... 64 times, then look again
//! ```
//!
//! How long a sleep was says little: waking up may take longer than the work took to come. So this counts rests, not time;
//! an idle disk has few rests, and of those one in 64 looks.

use std::time::Duration;

/// Most rests between two looks.
const MAX_SKIPS: u32 = 64;

/// One queue's decision. A limit of zero turns polling off.
#[derive(Debug)]
pub struct Polling {
    limit: Duration,
    /// Rests left until the next look.
    skip: u32,
    /// Rests to skip after the next look in vain, less one doubling.
    last_skips: u32,
}

impl Polling {
    pub fn new(limit: Duration) -> Self {
        Self { limit, skip: 0, last_skips: 0 }
    }

    /// How long to look this time; `None`: sleep at once.
    pub fn next_look(&mut self) -> Option<Duration> {
        if self.limit.is_zero() {
            return None;
        }
        match self.skip.checked_sub(1) {
            Some(left) => {
                self.skip = left;
                None
            }
            None => Some(self.limit),
        }
    }

    /// The look ended with work, or in vain.
    pub fn looked(&mut self, found: bool) {
        self.last_skips = if found { 0 } else { (2 * self.last_skips).clamp(1, MAX_SKIPS) };
        self.skip = self.last_skips;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);

    /// Of `rests`, how many looked, where looks end as `found` says.
    fn looks(polling: &mut Polling, rests: u32, found: bool) -> u32 {
        let mut looks = 0;
        for _ in 0..rests {
            if let Some(limit) = polling.next_look() {
                assert_eq!(limit, LIMIT);
                polling.looked(found);
                looks += 1;
            }
        }
        looks
    }

    #[test]
    fn looks_always_while_it_pays_and_soon_hardly_ever_when_it_does_not() {
        let mut polling = Polling::new(LIMIT);
        assert_eq!(looks(&mut polling, 100, true), 100);
        // The last that paid, then after 1, 2, 4, 8, 16, 32 and 64 sleeps.
        assert_eq!(looks(&mut polling, 1 + 127 + 7, false), 8);
        assert_eq!(looks(&mut polling, 65 * 10, false), 10);
        // One that pays is enough to look again.
        assert_eq!(looks(&mut polling, 64 + 100, true), 100);
    }

    #[test]
    fn off_is_off() {
        assert_eq!(Polling::new(Duration::ZERO).next_look(), None);
    }
}
