//! Load on one queue of a block device: so many requests in flight, each completion replaced by a new request.

use std::time::{Duration, Instant};

use super::{
    BlockDriver, Buffer, DriverError, GuestRam, IoStatus, PATIENCE, RequestKind, Result, SplitQueue,
};

/// What to ask for.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub random: bool,
    pub write: bool,
    /// Bytes a request, a multiple of 512.
    pub block_size: u32,
    /// Requests in flight on each queue.
    pub depth: u16,
    pub duration: Duration,
    /// The driver looks for completions all the time, as a busy guest does, instead of sleeping until an interrupt:
    /// what is measured is the daemon, not how fast this machine wakes a thread.
    pub poll: bool,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub requests: u64,
    pub elapsed: Duration,
    pub latencies: Histogram,
    pub kicks: u64,
    pub interrupts: u64,
}

impl Report {
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// Two queues at the same time.
    pub fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
        self.latencies.merge(&other.latencies);
    }
}

/// Times in buckets that grow by an eighth: a percentile is right within that.
#[derive(Debug, Clone)]
pub struct Histogram(Vec<u64>);

impl Default for Histogram {
    fn default() -> Self {
        Self(vec![0; 64 * 8])
    }
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        let ns = (time.as_nanos() as u64).max(8);
        let power = ns.ilog2();
        let eighth = (ns >> (power - 3)) & 7;
        self.0[(power * 8) as usize + eighth as usize] += 1;
    }

    fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// The time within which `percent` of all requests completed.
    pub fn percentile(&self, percent: f64) -> Duration {
        let total: u64 = self.0.iter().sum();
        let wanted = (total as f64 * percent / 100.0).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.0.iter().enumerate() {
            seen += count;
            if seen >= wanted.max(1) {
                let (power, eighth) = (bucket / 8, bucket % 8);
                return Duration::from_nanos((8 + eighth as u64 + 1) << power >> 3);
            }
        }
        Duration::ZERO
    }
}

/// One request's place in memory.
struct Slot {
    header: u64,
    data: u64,
    submitted: Instant,
}

struct Worker<'d> {
    ram: &'d GuestRam,
    queue: &'d mut SplitQueue,
    load: Load,
    blocks: u64,
    next_block: u64,
    random_state: u64,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// By head.
    slot_of: Vec<usize>,
    report: Report,
}

const HEADER_LEN: u32 = 16;

impl BlockDriver {
    /// Puts `load` on all queues at once, each from a thread of its own.
    pub fn run_load(&mut self, load: Load) -> Result<Report> {
        let sectors = self.config()?.sectors;
        let blocks = sectors * 512 / u64::from(load.block_size);
        if blocks == 0 {
            return Err(DriverError::Missing("a disk as large as one request"));
        }
        let mut places = Vec::new();
        for _ in 0..self.queues.len() {
            let slots: Vec<Slot> = (0..load.depth)
                .map(|_| Slot {
                    header: self.ram.allocate(64, 64),
                    data: self.ram.allocate(load.block_size.into(), 4096),
                    submitted: Instant::now(),
                })
                .collect();
            places.push(slots);
        }
        let ram = &self.ram;
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .queues
                .iter_mut()
                .zip(places)
                .enumerate()
                .map(|(index, (queue, slots))| {
                    let worker = Worker::new(ram, queue, load, blocks, slots, index as u64);
                    scope.spawn(|| worker.run())
                })
                .collect();
            let mut total = Report::default();
            for thread in threads {
                let report =
                    thread.join().map_err(|_| DriverError::Daemon("a load thread failed".into()))??;
                total.merge(&report);
            }
            Ok(total)
        })
    }
}

impl<'d> Worker<'d> {
    fn new(
        ram: &'d GuestRam,
        queue: &'d mut SplitQueue,
        load: Load,
        blocks: u64,
        slots: Vec<Slot>,
        index: u64,
    ) -> Self {
        let (free, slot_of) = ((0..slots.len()).collect(), vec![0; usize::from(queue.size)]);
        let random_state = 0x9e37_79b9_7f4a_7c15 ^ (index + 1) << 17;
        // Sequential streams of several queues are far apart.
        let next_block = index * blocks / 8;
        Self {
            ram,
            queue,
            load,
            blocks,
            next_block,
            random_state,
            slots,
            free,
            slot_of,
            report: Report::default(),
        }
    }

    fn run(mut self) -> Result<Report> {
        let start = Instant::now();
        let (kicks, interrupts) = (self.queue.kicks, self.queue.interrupts);
        let end = start + self.load.duration;
        let mut now = start;
        loop {
            if now < end {
                self.submit_all(now)?;
            } else if self.free.len() == self.slots.len() {
                break;
            }
            if self.load.poll {
                self.poll_one(&mut now)?;
                continue;
            }
            self.queue.wait(self.ram, PATIENCE)?;
            now = Instant::now();
            while let Some((head, _)) = self.queue.pop_used(self.ram)? {
                self.complete(head, now)?;
            }
        }
        self.report.elapsed = start.elapsed();
        self.report.kicks = self.queue.kicks - kicks;
        self.report.interrupts = self.queue.interrupts - interrupts;
        Ok(self.report)
    }

    /// One completion at a time, so that its successor is submitted at once.
    fn poll_one(&mut self, now: &mut Instant) -> Result<()> {
        let deadline = *now + PATIENCE;
        loop {
            if let Some((head, _)) = self.queue.pop_used(self.ram)? {
                *now = Instant::now();
                return self.complete(head, *now);
            }
            std::hint::spin_loop();
            if Instant::now() > deadline {
                return Err(DriverError::Timeout);
            }
        }
    }

    fn submit_all(&mut self, now: Instant) -> Result<()> {
        while let Some(at) = self.free.pop() {
            let block = self.pick_block();
            let slot = &mut self.slots[at];
            slot.submitted = now;
            let kind = if self.load.write { RequestKind::Out } else { RequestKind::In };
            let sector = block * u64::from(self.load.block_size / 512);
            self.ram.put(slot.header, u128::from(kind as u32) | u128::from(sector) << 64)?;
            self.ram.put(slot.header + u64::from(HEADER_LEN), 0xffu8)?;
            let chain = [
                Buffer::to_read(slot.header, HEADER_LEN),
                Buffer { addr: slot.data, len: self.load.block_size, device_writes: !self.load.write },
                Buffer::to_write(slot.header + u64::from(HEADER_LEN), 1),
            ];
            let head = self.queue.add(self.ram, &chain)?.ok_or(DriverError::Missing("free descriptors"))?;
            self.slot_of[usize::from(head)] = at;
        }
        self.queue.kick(self.ram)
    }

    fn complete(&mut self, head: u16, now: Instant) -> Result<()> {
        let at = self.slot_of[usize::from(head)];
        let slot = &self.slots[at];
        let status = IoStatus::from(self.ram.read_byte(slot.header + u64::from(HEADER_LEN))?);
        if status != IoStatus::Ok {
            return Err(DriverError::Answer { request: "a request", what: format!("status {status:?}") });
        }
        self.report.latencies.add(now - slot.submitted);
        self.report.requests += 1;
        self.free.push(at);
        Ok(())
    }

    fn pick_block(&mut self) -> u64 {
        if !self.load.random {
            self.next_block = (self.next_block + 1) % self.blocks;
            return self.next_block;
        }
        self.random_state ^= self.random_state << 13;
        self.random_state ^= self.random_state >> 7;
        self.random_state ^= self.random_state << 17;
        self.random_state % self.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_within_an_eighth() {
        let mut histogram = Histogram::default();
        for microseconds in 1..=1000 {
            histogram.add(Duration::from_micros(microseconds));
        }
        for (percent, microseconds) in [(50.0, 500.0), (99.0, 990.0), (1.0, 10.0)] {
            let got = histogram.percentile(percent).as_secs_f64() * 1e6;
            assert!((got / microseconds - 1.0).abs() < 0.13, "{percent}: {got}");
        }
    }
}
