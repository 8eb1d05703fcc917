//! Whether a daemon that runs still gets on with its rings.
//!
//! A daemon cannot be asked that, and a ring that stands still may have nothing to do (a network card's receive queue).
//! So a ring that has work and has not moved since the last look only makes us send a request that every daemon answers
//! at any time; the request's deadline then tells a daemon that hangs from one that waits.

use std::time::{Duration, Instant};

use super::ring::Indices;

/// Looks at the rings of one running device.
#[derive(Debug)]
pub(super) struct Watch {
    every: Duration,
    next: Instant,
    /// By ring; empty before the first look.
    last: Vec<Option<Indices>>,
}

impl Watch {
    pub(super) fn new(every: Duration) -> Self {
        Self { every, next: Instant::now() + every, last: Vec::new() }
    }

    pub(super) fn next(&self) -> Instant {
        self.next
    }

    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.next
    }

    /// Takes a look; whether some ring has work and stands still.
    pub(super) fn stands_still(&mut self, now: Vec<Option<Indices>>) -> bool {
        self.next = Instant::now() + self.every;
        let still = |(before, now): (&Option<Indices>, &Option<Indices>)| match (before, now) {
            (Some(before), Some(now)) => now.outstanding() != 0 && before.used == now.used,
            _ => false,
        };
        let stands_still = self.last.iter().zip(&now).any(still);
        self.last = now;
        stands_still
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_with_work_that_does_not_move_stands_still() {
        let mut watch = Watch::new(Duration::from_secs(3600));
        let mut look = |rings: &[(u16, u16)]| {
            watch.stands_still(
                rings.iter().map(|&(available, used)| Some(Indices { available, used })).collect(),
            )
        };
        assert!(!look(&[(5, 5), (9, 3)]), "nothing to compare with");
        assert!(!look(&[(5, 5), (12, 4)]), "it moves");
        assert!(look(&[(5, 5), (13, 4)]));
        assert!(!look(&[(5, 5), (13, 13)]), "nothing to do");
        assert!(!look(&[(5, 5), (13, 13)]));
        assert!(!watch.is_due());
    }
}
