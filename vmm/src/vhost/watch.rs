//! Whether a daemon that runs still gets on with its rings.
//!
//! A daemon cannot be asked that, and a ring that stands still may have nothing to do (a network card's receive queue).
//! So a ring that has work and has not moved since the last look only makes us send a request that every daemon answers
//! at any time; the request's deadline then tells a daemon whose session hangs from one that waits.
//!
//! One whose session answers may have a queue that hangs, or a disk that is slow: from here they look the same. Only
//! whoever knows the disk can say when it is too slow to be true, and then ([`Watch::new`]'s `patience`) a ring that has
//! had work at every look for so long, and of which nothing was completed, is stuck.

use std::time::{Duration, Instant};

use super::ring::Indices;

/// How the rings get on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gait {
    Moves,
    /// Some ring has work and has not moved since the last look.
    StandsStill,
    /// The one at this place has not for longer than there is patience.
    Stuck {
        ring: usize,
        still: Duration,
    },
}

/// Looks at the rings of one running device.
#[derive(Debug)]
pub(super) struct Watch {
    every: Duration,
    patience: Option<Duration>,
    next: Instant,
    /// By ring; empty before the first look.
    last: Vec<Look>,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    indices: Option<Indices>,
    /// The first of the looks without a completion in between at which it had work.
    still_since: Option<Instant>,
}

impl Watch {
    pub(super) fn new(every: Duration, patience: Option<Duration>) -> Self {
        // Several looks, before anything is stuck: an index of 16 bits may be by chance where it was.
        let every = patience.map_or(every, |patience| every.min(patience / 4));
        Self { every, patience, next: Instant::now() + every, last: Vec::new() }
    }

    pub(super) fn next(&self) -> Instant {
        self.next
    }

    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.next
    }

    /// Takes a look at `now`.
    pub(super) fn look(&mut self, now: Instant, rings: Vec<Option<Indices>>) -> Gait {
        // One that comes late is one of a host that slept, or of a machine that was stopped with its daemons.
        let is_late = now.saturating_duration_since(self.next) > self.every;
        self.next = now + self.every;
        let mut gait = Gait::Moves;
        let mut looks = Vec::with_capacity(rings.len());
        for (ring, indices) in rings.into_iter().enumerate() {
            let before = self.last.get(ring).copied();
            let has_work = indices.is_some_and(|now| now.outstanding() != 0);
            let used = |indices: Option<Indices>| indices.map(|indices| indices.used);
            let is_still = has_work && before.is_some_and(|before| used(before.indices) == used(indices));
            let since = before.and_then(|before| before.still_since).filter(|_| is_still && !is_late);
            let still_since = has_work.then(|| since.unwrap_or(now));
            let still = now.saturating_duration_since(still_since.unwrap_or(now));
            gait = match gait {
                Gait::Stuck { .. } => gait,
                _ if has_work && self.patience.is_some_and(|patience| still >= patience) => {
                    Gait::Stuck { ring, still }
                }
                _ if is_still => Gait::StandsStill,
                _ => gait,
            };
            looks.push(Look { indices, still_since });
        }
        self.last = looks;
        gait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(3);

    fn rings(rings: &[(u16, u16)]) -> Vec<Option<Indices>> {
        rings.iter().map(|&(available, used)| Some(Indices { available, used })).collect()
    }

    #[test]
    fn a_ring_with_work_that_does_not_move_stands_still() {
        let mut watch = Watch::new(EVERY, None);
        assert!(!watch.is_due());
        let mut look = |indices: &[(u16, u16)]| watch.look(watch.next(), rings(indices));
        assert_eq!(look(&[(5, 5), (9, 3)]), Gait::Moves, "nothing to compare with");
        assert_eq!(look(&[(5, 5), (12, 4)]), Gait::Moves);
        assert_eq!(look(&[(5, 5), (13, 4)]), Gait::StandsStill);
        assert_eq!(look(&[(5, 5), (13, 13)]), Gait::Moves, "nothing to do");
        assert_eq!(look(&[(5, 5), (13, 13)]), Gait::Moves);
        for _ in 0..1000 {
            assert!(!matches!(look(&[(5, 5), (14, 13)]), Gait::Stuck { .. }), "a disk may be that slow");
        }
    }

    #[test]
    fn one_that_completes_nothing_for_too_long_is_stuck_if_there_is_an_end_to_patience() {
        let mut watch = Watch::new(EVERY, Some(4 * EVERY));
        let mut look = |indices: &[(u16, u16)]| watch.look(watch.next(), rings(indices));
        assert_eq!(look(&[(5, 5), (5, 5)]), Gait::Moves);
        // A slow disk: of ring 1 something is completed every 9 s. More to do is no progress.
        for used in 6..20 {
            assert_eq!(look(&[(used, used), (used + 3, used)]), Gait::Moves);
            assert_eq!(look(&[(used, used), (used + 4, used)]), Gait::StandsStill);
            assert_eq!(look(&[(used, used), (used + 5, used)]), Gait::StandsStill);
        }
        assert_eq!(look(&[(30, 25), (24, 24)]), Gait::Moves);
        // A request comes just before a look: the time before is not its. The other ring's progress does not help it.
        let gaits: Vec<Gait> = (0..5).map(|more| look(&[(31 + more, 26 + more), (25, 24)])).collect();
        let (still, stuck) = (Gait::StandsStill, Gait::Stuck { ring: 1, still: 4 * EVERY });
        assert_eq!(gaits, [still, still, still, still, stuck]);
    }

    #[test]
    fn time_that_nobody_looked_is_not_held_against_the_daemon() {
        let mut watch = Watch::new(EVERY, Some(4 * EVERY));
        watch.look(watch.next(), rings(&[(6, 5)]));
        let after_sleep = watch.next() + Duration::from_secs(3600);
        assert_eq!(watch.look(after_sleep, rings(&[(6, 5)])), Gait::StandsStill);
        assert_eq!(watch.look(watch.next(), rings(&[(6, 5)])), Gait::StandsStill);
    }

    #[test]
    fn looks_are_closer_than_a_short_patience() {
        let watch = Watch::new(EVERY, Some(Duration::from_secs(1)));
        assert!(watch.next() < Instant::now() + Duration::from_secs(1));
    }
}
