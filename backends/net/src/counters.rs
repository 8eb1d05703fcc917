//! What the queues of each pair have done since the daemon started.
//!
//! Invariant: one thread at a time writes a count, the queue's or whoever has its lock, so that it needs no more than to be seen
//! by whoever reports.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// By the one thread that writes it now.
    pub(crate) fn add_one(&self) {
        self.0.store(self.get() + 1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Frames of a receive queue. Aligned, so that no two threads write to one line of memory.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Received {
    pub(crate) delivered: Count,
    /// The driver's filters do not let them through.
    pub(crate) unwanted: Count,
    /// The driver has no buffers that would hold them.
    pub(crate) too_long: Count,
    /// It has none now. Where frames can wait, they do.
    pub(crate) no_room: Count,
    pub(crate) failed: Count,
}

/// Frames of a transmit queue.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Sent {
    pub(crate) sent: Count,
    pub(crate) malformed: Count,
    pub(crate) failed: Count,
}

#[derive(Debug, Default)]
pub(crate) struct PairCounters {
    pub(crate) received: Received,
    pub(crate) sent: Sent,
}

/// All pairs, in words.
pub(crate) struct Total<'c>(pub(crate) &'c [PairCounters]);

impl fmt::Display for Total<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum =
            |count: fn(&PairCounters) -> &Count| -> u64 { self.0.iter().map(|pair| count(pair).get()).sum() };
        write!(
            f,
            "{} frames received (dropped: {} not wanted, {} too long, {} without room, {} failed), \
             {} sent (dropped: {} malformed, {} failed)",
            sum(|pair| &pair.received.delivered),
            sum(|pair| &pair.received.unwanted),
            sum(|pair| &pair.received.too_long),
            sum(|pair| &pair.received.no_room),
            sum(|pair| &pair.received.failed),
            sum(|pair| &pair.sent.sent),
            sum(|pair| &pair.sent.malformed),
            sum(|pair| &pair.sent.failed),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_pairs_are_summed() {
        let pairs = [PairCounters::default(), PairCounters::default()];
        pairs[0].received.delivered.add_one();
        pairs[1].received.delivered.add_one();
        pairs[1].received.unwanted.add_one();
        pairs[0].sent.malformed.add_one();
        assert_eq!(
            Total(&pairs).to_string(),
            "2 frames received (dropped: 1 not wanted, 0 too long, 0 without room, 0 failed), 0 sent (dropped: 1 malformed, 0 failed)"
        );
    }
}
