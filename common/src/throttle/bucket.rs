//! Leaky buckets for rate limits, with the meaning of QEMU's throttling, in exact integers, with time as an argument.
//!
//! Units leave a bucket at its rate and enter when something goes; it may go when the bucket is not full. So in any span no
//! more than `rate * span` and what the bucket holds pass, and one thing more.
//!
//! A bucket without a burst holds a tenth of a second's units: short bursts, which every guest makes, are not torn apart.
//! One with a burst holds all that the burst may move, and a second one limits the burst's own rate.

use std::time::Duration;

use super::Limit;

/// Levels are in billionths of a unit, so that a rate times nanoseconds is one.
pub const NANO: u128 = 1_000_000_000;

#[derive(Debug)]
pub struct Bucket {
    limit: Limit,
    level: u128,
    /// Of what limits the burst.
    burst_level: u128,
    /// When the levels were these.
    at: Duration,
}

impl Bucket {
    pub fn new(limit: Limit) -> Self {
        Self { limit, level: 0, burst_level: 0, at: Duration::ZERO }
    }

    /// Nanoseconds from `now`, a time since any fixed moment, until something may go.
    pub fn wait(&mut self, now: Duration) -> u128 {
        let passed = now.saturating_sub(self.at).as_nanos();
        self.at = self.at.max(now);
        let (rate, burst) = (u128::from(self.limit.rate), u128::from(self.limit.burst_rate));
        self.level = self.level.saturating_sub(rate.saturating_mul(passed));
        self.burst_level = self.burst_level.saturating_sub(burst.saturating_mul(passed));
        if burst == 0 {
            return self.level.saturating_sub(rate * NANO / 10).div_ceil(rate);
        }
        let capacity = (burst * NANO).saturating_mul(self.limit.burst_seconds.into());
        let wait = self.level.saturating_sub(capacity).div_ceil(rate);
        if self.limit.burst_seconds == 1 {
            return wait;
        }
        wait.max(self.burst_level.saturating_sub(burst * NANO / 10).div_ceil(burst))
    }

    /// Something of so many billionths of a unit goes.
    pub fn fill(&mut self, units: u128) {
        self.level = self.level.saturating_add(units);
        self.burst_level = self.burst_level.saturating_add(units);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_numbers_make_it_panic(rate in 1u64..=1_000_000_000_000_000, length: u64, bytes: u64, ns: u64) {
            let limit = Limit { rate, burst_rate: rate, burst_seconds: length.clamp(1, 1_000_000_000_000_000) };
            let mut bucket = Bucket::new(limit);
            for _ in 0..3 {
                bucket.fill(u128::from(bytes) * NANO);
                bucket.wait(Duration::from_nanos(ns));
                bucket.wait(Duration::MAX);
            }
        }
    }
}
