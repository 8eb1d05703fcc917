//! For what to look before sleeping: requests of a guest that has just got answers, or anything.
//!
//! ```text
//!   a rest:  the guest has fewer requests here than it had --it makes one available soon--> after answers
//!            it has as many as ever ---------------the disk completes one, in its time--> otherwise
//! ```
//!
//! Invariant: the two are learned apart. A guest that answers an answer within a microsecond or two is worth a look; the
//! disk that works meanwhile hardly ever is, and would teach the thread to sleep when a look costs less than the kick.

use std::time::Duration;

use cleave_runtime::Polling;

/// When a queue's thread looks, and how long.
#[derive(Debug)]
pub(super) struct Looks {
    after_answers: Polling,
    otherwise: Polling,
    /// Answers to which the guest has not made as many new requests available.
    owed: u32,
}

impl Looks {
    pub(super) fn new(limit: Duration) -> Self {
        Self { after_answers: Polling::new(limit), otherwise: Polling::new(limit), owed: 0 }
    }

    /// A request has been answered.
    pub(super) fn answered(&mut self) {
        self.owed = self.owed.saturating_add(1);
    }

    /// A request has been fetched.
    pub(super) fn fetched(&mut self) {
        self.owed = self.owed.saturating_sub(1);
    }

    fn polling(&mut self) -> &mut Polling {
        if self.owed == 0 { &mut self.otherwise } else { &mut self.after_answers }
    }

    /// How long to look this time; `None`: sleep at once.
    pub(super) fn next_look(&mut self) -> Option<Duration> {
        self.polling().next_look()
    }

    /// The look ended with work, or in vain. A guest from which nothing came has as many requests as it wants to have.
    pub(super) fn looked(&mut self, found: bool) {
        self.polling().looked(found);
        if !found {
            self.owed = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(3);

    /// One request at a time: answered, followed by another one that a look finds if `quick`, then waited for in vain.
    fn looks_of_100_requests(quick: bool) -> [u32; 2] {
        let mut looks = Looks::new(LIMIT);
        let mut counts = [0, 0];
        for _ in 0..100 {
            looks.answered();
            if looks.next_look().is_some() {
                counts[0] += 1;
                looks.looked(quick);
            }
            looks.fetched();
            if looks.next_look().is_some() {
                counts[1] += 1;
                looks.looked(false);
            }
        }
        counts
    }

    #[test]
    fn a_slow_disk_does_not_keep_it_from_looking_for_a_quick_guest() {
        assert_eq!(looks_of_100_requests(true), [100, 7]);
        // Both kinds of rest are in vain, and soon hardly ever looked at.
        let [after_answers, otherwise] = looks_of_100_requests(false);
        assert!(after_answers <= 7 && otherwise <= 7, "{after_answers} {otherwise}");
    }

    #[test]
    fn a_guest_that_wants_fewer_requests_is_not_looked_for() {
        let mut looks = Looks::new(LIMIT);
        (0..32).for_each(|_| looks.answered());
        looks.looked(false);
        assert_eq!(looks.owed, 0);
        looks.fetched();
        looks.answered();
        assert_eq!(looks.owed, 1);
    }
}
