//! Rate limits of one port: leaky buckets for each direction, of all its queues together.
//!
//! ```text
//!   a frame:  is there room in all buckets of its direction? --yes--> passes, and fills them
//!                                                            --no---> waits where it is until there is
//! ```
//!
//! What the guest sends waits in its ring, what it is to receive with whoever has it for the port: of a tap device the kernel,
//! whose queue drops what does not fit. Nothing is kept here.
//!
//! A frame is counted when it has passed, so several queues of one direction may each let one too many pass; what comes after
//! it waits the longer.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cleave_common::throttle::{Bucket, DirectionLimits, NANO, NetThrottleConfig};

/// Which way frames go, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Receive,
    Transmit,
}

/// Both directions.
#[derive(Debug, Default)]
pub(crate) struct Limits {
    receive: Option<Limiter>,
    transmit: Option<Limiter>,
}

impl Limits {
    pub(crate) fn new(config: &NetThrottleConfig) -> Self {
        Self { receive: Limiter::new(config.rx()), transmit: Limiter::new(config.tx()) }
    }

    pub(crate) fn of(&self, direction: Direction) -> Option<&Limiter> {
        match direction {
            Direction::Receive => self.receive.as_ref(),
            Direction::Transmit => self.transmit.as_ref(),
        }
    }
}

/// One direction, which is limited.
#[derive(Debug)]
pub(crate) struct Limiter {
    begun: Instant,
    /// Packets, bytes.
    buckets: Mutex<[Option<Bucket>; 2]>,
    counts_packets: bool,
}

impl Limiter {
    /// `None`: nothing is limited.
    fn new(limits: DirectionLimits) -> Option<Self> {
        let buckets = [limits.packets, limits.bytes].map(|limit| limit.map(Bucket::new));
        buckets.iter().any(Option::is_some).then(|| Self {
            begun: Instant::now(),
            counts_packets: buckets[0].is_some(),
            buckets: Mutex::new(buckets),
        })
    }

    /// Whether it matters how many packets a frame is.
    pub(crate) fn counts_packets(&self) -> bool {
        self.counts_packets
    }

    /// How long the next frame has to wait; `None`: it may pass.
    pub(crate) fn wait(&self) -> Option<Duration> {
        self.wait_at(self.begun.elapsed())
    }

    fn wait_at(&self, now: Duration) -> Option<Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = buckets.iter_mut().flatten().map(|bucket| bucket.wait(now)).max().unwrap_or(0);
        (wait != 0).then(|| Duration::from_nanos(wait.try_into().unwrap_or(u64::MAX)))
    }

    /// A frame has passed.
    pub(crate) fn passed(&self, packets: u32, bytes: usize) {
        let units = [u128::from(packets), bytes as u128];
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        for (bucket, units) in buckets.iter_mut().zip(units) {
            if let Some(bucket) = bucket {
                bucket.fill(units * NANO);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cleave_common::options;

    use super::*;

    fn limits(text: &str) -> Limits {
        Limits::new(&options::parse(text, None).unwrap())
    }

    /// How many frames of `packets` and `bytes` pass in `seconds`.
    fn passing(limiter: &Limiter, seconds: u64, packets: u32, bytes: usize) -> u64 {
        let (mut now, mut count) = (Duration::ZERO, 0);
        while now <= Duration::from_secs(seconds) {
            match limiter.wait_at(now) {
                Some(wait) => now += wait,
                None => {
                    limiter.passed(packets, bytes);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn each_direction_and_unit_has_its_own() {
        let limits = limits("pps-rx=1000,bps-tx=1M");
        let (receive, transmit) =
            (limits.of(Direction::Receive).unwrap(), limits.of(Direction::Transmit).unwrap());
        assert!(receive.counts_packets() && !transmit.counts_packets());
        // A tenth of a second's more, and one.
        assert_eq!(passing(receive, 10, 1, 1 << 20), 10_101);
        let passed = passing(transmit, 10, 1000, 1024);
        assert!((10_342..=10_344).contains(&passed), "{passed}");
        assert!(self::limits("pps-rx=0").of(Direction::Receive).is_none());
    }

    #[test]
    fn a_large_frame_counts_as_its_packets() {
        let limits = limits("pps-tx=1000");
        let passed = passing(limits.of(Direction::Transmit).unwrap(), 9, 45, 65_000);
        assert!((201..=204).contains(&passed), "{passed}");
    }
}
