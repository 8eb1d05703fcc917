//! Whether to give way to whoever else wants this processor, once, before asking for a kick.
//!
//! ```text
//!   shallow --a burst of 8 requests--> deep --64 rests without one--> shallow
//!   deep:     a rest gives way, unless that took long lately
//! ```
//!
//! Where a guest and its disk's threads share processors, a thread that sleeps as soon as it has caught up is woken by the
//! next request, and takes the guest's processor from it before the guest has made another one available: both change
//! places for each request. A thread that gives way comes back when the guest has as many requests in its ring as it likes
//! to have in flight. That costs time until then, and so is only for guests that are after throughput: those that have
//! many.

use std::time::{Duration, Instant};

use crate::polling::Polling;

/// Requests between two rests that say that a guest has many in flight.
const BURST: u32 = 8;

/// Rests for which that is remembered.
const MEMORY: u32 = 64;

/// Longer than the turn of one other thread. Where it takes as long as that, giving way does not pay.
const LONG: Duration = Duration::from_millis(4);

/// One queue's decision.
#[derive(Debug)]
pub struct Way {
    /// Requests since the last rest.
    burst: u32,
    /// Rests left until the last burst is forgotten.
    deep: u32,
    pays: Polling,
}

impl Default for Way {
    fn default() -> Self {
        Self { burst: 0, deep: 0, pays: Polling::new(LONG) }
    }
}

impl Way {
    /// A request has been fetched.
    pub fn fetched(&mut self) {
        self.burst = self.burst.saturating_add(1);
    }

    /// The thread is about to sleep with nothing left to do. `true`: it has given way, and should look again.
    pub fn give(&mut self) -> bool {
        if !self.is_due() {
            return false;
        }
        let start = Instant::now();
        std::thread::yield_now();
        self.pays.looked(start.elapsed() < LONG);
        true
    }

    fn is_due(&mut self) -> bool {
        let deep = std::mem::take(&mut self.burst) >= BURST;
        self.deep = if deep { MEMORY } else { self.deep.saturating_sub(1) };
        self.deep != 0 && self.pays.next_look().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_with_many_requests_is_given_way_to_for_a_while() {
        let mut way = Way::default();
        assert!(!way.is_due());
        (0..BURST).for_each(|_| way.fetched());
        for _ in 0..MEMORY {
            assert!(way.is_due());
            way.fetched();
        }
        assert!(!way.is_due());
    }

    #[test]
    fn not_where_it_takes_long() {
        let mut way = Way::default();
        way.pays.looked(false);
        (0..BURST).for_each(|_| way.fetched());
        assert!(!way.is_due());
        assert!(way.is_due());
    }
}
