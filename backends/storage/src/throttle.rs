//! Rate limits: leaky buckets with the meaning of QEMU's throttling, in exact integers, with time as an argument.
//!
//! ```text
//!   a request:  asked for --all buckets have room--> goes, and fills them
//!                   `--one is full--> waits at the end of its direction's line --its queue is first, and time--> goes
//! ```
//!
//! Invariants: units leave a bucket at its rate and enter when a request goes, so that in any span no more than
//! `rate * span` and what the bucket holds pass; requests of a queue and direction go in their order, and queues that
//! wait take turns, so that none starves another.

use std::collections::VecDeque;
use std::time::Duration;

use cleave_common::throttle::{Bucket, NANO, ThrottleConfig};

/// Which way data goes. Discarding and writing zeroes count as writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Read,
    Write,
}

impl Direction {
    pub const ALL: [Self; 2] = [Self::Read, Self::Write];
}

/// The answer to a queue that wants to let a request go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It may go and is counted. `next`: the queue that is first in line now and is to be told.
    Go { next: Option<u16> },
    /// It is first in line; ask again when so much time has passed.
    After(Duration),
    /// Others are before it; it will be told.
    InLine,
}

/// All limits of one disk.
#[derive(Debug)]
pub struct Throttle {
    /// By unit: requests, bytes.
    buckets: [Buckets; 2],
    iops_size: u64,
    /// By direction: queues with a request that waits.
    lines: [VecDeque<u16>; 2],
}

#[derive(Debug)]
struct Buckets {
    total: Option<Bucket>,
    read: Option<Bucket>,
    write: Option<Bucket>,
}

impl Buckets {
    fn of(&mut self, direction: Direction) -> impl Iterator<Item = &mut Bucket> {
        let own = match direction {
            Direction::Read => &mut self.read,
            Direction::Write => &mut self.write,
        };
        self.total.iter_mut().chain(own)
    }
}

impl Throttle {
    /// `None`: nothing is limited.
    pub fn new(config: &ThrottleConfig) -> Option<Self> {
        if config.is_empty() {
            return None;
        }
        let buckets = [config.iops(), config.bps()].map(|limits| Buckets {
            total: limits.total.map(Bucket::new),
            read: limits.read.map(Bucket::new),
            write: limits.write.map(Bucket::new),
        });
        Some(Self { buckets, iops_size: config.iops_size(), lines: Default::default() })
    }

    /// Whether a request of `bytes` from `queue` may go at `now`, a time since any fixed moment.
    pub fn ask(&mut self, now: Duration, queue: u16, direction: Direction, bytes: u64) -> Turn {
        let line = &mut self.lines[direction as usize];
        if line.front().is_some_and(|first| *first != queue) {
            if !line.contains(&queue) {
                line.push_back(queue);
            }
            return Turn::InLine;
        }
        let units = [self.request_units(bytes), u128::from(bytes) * NANO];
        let mut wait = 0;
        for bucket in self.buckets.iter_mut().flat_map(|buckets| buckets.of(direction)) {
            wait = wait.max(bucket.wait(now));
        }
        let line = &mut self.lines[direction as usize];
        if wait != 0 {
            if line.is_empty() {
                line.push_back(queue);
            }
            return Turn::After(Duration::from_nanos(wait.try_into().unwrap_or(u64::MAX)));
        }
        line.pop_front();
        let next = line.front().copied();
        self.fill(direction, units);
        Turn::Go { next }
    }

    /// Counts a request that goes at `now` whether there is room or not: those after it wait the longer.
    pub fn charge(&mut self, now: Duration, direction: Direction, bytes: u64) {
        for bucket in self.buckets.iter_mut().flat_map(|buckets| buckets.of(direction)) {
            bucket.wait(now);
        }
        self.fill(direction, [self.request_units(bytes), u128::from(bytes) * NANO]);
    }

    fn fill(&mut self, direction: Direction, units: [u128; 2]) {
        for (buckets, units) in self.buckets.iter_mut().zip(units) {
            buckets.of(direction).for_each(|bucket| bucket.fill(units));
        }
    }

    /// `queue` has nothing that waits any more. The queue that is first in line by that is to be told.
    pub fn leave(&mut self, queue: u16, direction: Direction) -> Option<u16> {
        let line = &mut self.lines[direction as usize];
        let was_first = line.front() == Some(&queue);
        line.retain(|other| *other != queue);
        line.front().copied().filter(|_| was_first)
    }

    /// In billionths of a request.
    fn request_units(&self, bytes: u64) -> u128 {
        if self.iops_size == 0 || bytes <= self.iops_size {
            return NANO;
        }
        u128::from(bytes) * NANO / u128::from(self.iops_size)
    }
}

#[cfg(test)]
mod tests;
