//! Load on a block device: so many requests in flight on each queue, each completion replaced by a new request.
//!
//! ```text
//!   Submit (Aim picks a block) --> in flight --> complete (Ledger checks it) --> Submit ... until Stop
//! ```

mod aim;
mod ledger;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::scsi::REQUESTS;
use super::{
    BlockDriver, DriverError, Frontend, GuestRam, InflightRegion, Negotiated, Result, ScsiDriver, SplitQueue,
    Vring,
};
pub use ledger::Ledger;
use worker::{Dialect, ENVELOPE, Slot, Worker};

/// What to ask for.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub random: bool,
    /// Of a hundred requests, so many are writes.
    pub write_percent: u8,
    /// Bytes a request, a multiple of 512.
    pub block_size: u32,
    /// Requests in flight on each queue.
    pub depth: u16,
    pub extent: Extent,
    /// The driver looks for completions all the time, as a busy guest does, instead of sleeping until an interrupt:
    /// what is measured is the daemon, not how fast this machine wakes a thread.
    pub poll: bool,
    /// Threads that share the queues when the driver polls; otherwise each queue has its own.
    pub threads: usize,
    /// Each block that is written says where it belongs and which write it came from, and each block that is read
    /// is checked. No block has two requests in flight then, and each queue has blocks of its own.
    pub verify: bool,
}

/// When a load is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    Time(Duration),
    /// Every block once, in order.
    Pass,
    /// When what runs beside it has returned.
    Beside,
}

impl Default for Load {
    /// 4 KiB random reads for a second, one at a time.
    fn default() -> Self {
        Self {
            random: true,
            write_percent: 0,
            block_size: 4096,
            depth: 1,
            extent: Extent::Time(Duration::from_secs(1)),
            poll: true,
            threads: usize::MAX,
            verify: false,
        }
    }
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Report {
    pub requests: u64,
    pub elapsed: Duration,
    /// Nanoseconds from submission to the completion being seen.
    pub reads: Histogram<u64>,
    pub writes: Histogram<u64>,
    pub kicks: u64,
    pub interrupts: u64,
    /// Blocks read whose content was known and right.
    pub verified: u64,
}

/// Three digits of anything up to a minute.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("these bounds are in order")
}

impl Default for Report {
    fn default() -> Self {
        Self {
            requests: 0,
            elapsed: Duration::ZERO,
            reads: histogram(),
            writes: histogram(),
            kicks: 0,
            interrupts: 0,
            verified: 0,
        }
    }
}

impl Report {
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// The time within which `percent` of the requests completed; of a mixed load, the worse of its two sides.
    pub fn percentile(&self, percent: f64) -> Duration {
        let of =
            |side: &Histogram<u64>| if side.is_empty() { 0 } else { side.value_at_quantile(percent / 100.0) };
        Duration::from_nanos(of(&self.reads).max(of(&self.writes)))
    }

    /// The longest that any request took.
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.reads.max().max(self.writes.max()))
    }

    /// Two queues at the same time.
    fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
        self.verified += other.verified;
        for (mine, theirs) in [(&mut self.reads, &other.reads), (&mut self.writes, &other.writes)] {
            mine.add(theirs).expect("all have the same bounds");
        }
    }
}

/// When the workers are to end.
struct Stop {
    end: Option<Instant>,
    /// No new requests.
    asked: AtomicBool,
    /// Something failed: what is in flight is not waited for either.
    abandoned: AtomicBool,
}

impl Stop {
    fn is_due(&self, now: Instant) -> bool {
        self.end.is_some_and(|end| now >= end)
            || self.asked.load(Ordering::Relaxed)
            || self.abandoned.load(Ordering::Relaxed)
    }
}

/// What is free to be used while a load runs: all but the queues' driver side.
pub struct Beside<'a> {
    pub frontend: &'a mut Frontend,
    pub negotiated: &'a mut Negotiated,
    pub ram: &'a GuestRam,
    pub vrings: Vec<Arc<Vring>>,
    stop: &'a Stop,
}

impl Beside<'_> {
    /// Whether the load has ended with an error.
    pub fn has_failed(&self) -> bool {
        self.stop.abandoned.load(Ordering::Relaxed)
    }

    /// Goes on with a successor of the backend on the rings as they are: their base is the used index, and each is kicked
    /// once, unless `kick` is not set.
    pub fn resume(&mut self, frontend: Frontend, region: &InflightRegion, kick: bool) -> Result<()> {
        *self.frontend = frontend;
        *self.negotiated =
            self.frontend.resume(self.negotiated.acked, self.ram, &self.vrings, Some(region))?;
        for vring in &self.vrings {
            // The last backend may have ended between a completion and its interrupt.
            vring.call_now()?;
            if kick {
                vring.kick_now()?;
            }
        }
        Ok(())
    }
}

impl BlockDriver {
    /// Puts `load` on all queues at once.
    ///
    /// # Errors
    /// A request failed, or had the wrong content, or did not complete within [`super::PATIENCE`].
    pub fn run_load(&mut self, load: &Load) -> Result<Report> {
        self.run_load_beside(load, |_| Ok(())).map(|(report, ())| report)
    }

    /// Puts `load` on all queues while `beside` does something else to the device.
    ///
    /// # Errors
    /// Those of [`BlockDriver::run_load`], before those of `beside`.
    pub fn run_load_beside<T>(
        &mut self,
        load: &Load,
        beside: impl FnOnce(&mut Beside<'_>) -> Result<T>,
    ) -> Result<(Report, T)> {
        let sectors = self.config()?.sectors;
        let Self { frontend, ram, queues, negotiated, ledgers, .. } = self;
        let device = Loaded { frontend, ram, queues, negotiated, ledgers, dialect: Dialect::Block, sectors };
        device.run(load, beside)
    }
}

impl ScsiDriver {
    /// Puts `load` on all request queues at once, on the disk of `sectors` blocks of 512 bytes that is the unit `lun`.
    ///
    /// # Errors
    /// As those of [`BlockDriver::run_load`].
    pub fn run_load(&mut self, load: &Load, lun: [u8; 8], sectors: u64) -> Result<Report> {
        let Self { frontend, ram, queues, negotiated, ledgers, .. } = self;
        let (queues, dialect) = (&mut queues[REQUESTS..], Dialect::Scsi(lun));
        let device = Loaded { frontend, ram, queues, negotiated, ledgers, dialect, sectors };
        device.run(load, |_| Ok(())).map(|(report, ())| report)
    }
}

/// A device under load.
struct Loaded<'d> {
    frontend: &'d mut Frontend,
    ram: &'d mut GuestRam,
    queues: &'d mut [SplitQueue],
    negotiated: &'d mut Negotiated,
    ledgers: &'d mut Vec<Ledger>,
    dialect: Dialect,
    sectors: u64,
}

impl Loaded<'_> {
    fn run<T>(
        mut self,
        load: &Load,
        beside: impl FnOnce(&mut Beside<'_>) -> Result<T>,
    ) -> Result<(Report, T)> {
        let aims = aim::of_queues(load, self.sectors, self.queues.len())?;
        let mark = self.ram.mark();
        let slots: Vec<Vec<Slot>> = (0..self.queues.len()).map(|_| self.slots(load)).collect();
        self.prepare_ledgers(load, &aims);
        let stop = Stop {
            end: if let Extent::Time(time) = load.extent { Some(Instant::now() + time) } else { None },
            asked: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        };
        let vrings = self.queues.iter().map(SplitQueue::vring).collect();
        let Self { frontend, ram, queues, negotiated, ledgers, dialect, .. } = self;
        let stop = &stop;
        let outcome = {
            let ram = &*ram;
            let threads = if load.poll { load.threads.clamp(1, queues.len()) } else { queues.len() };
            let mut shares: Vec<Vec<Worker<'_>>> = (0..threads).map(|_| Vec::new()).collect();
            let parts = queues.iter_mut().zip(ledgers).zip(slots).zip(aims);
            for (at, (((queue, ledger), slots), aim)) in parts.enumerate() {
                let ledger = load.verify.then_some(ledger);
                shares[at % threads].push(Worker::new(ram, queue, (load, dialect), aim, ledger, slots));
            }
            under_load(shares, stop, |stop| {
                let mut beside_it = Beside { frontend, negotiated, ram, vrings, stop };
                let outcome = beside(&mut beside_it);
                if load.extent == Extent::Beside {
                    stop.asked.store(true, Ordering::Relaxed);
                }
                outcome
            })
        }?;
        // Nothing is in flight any more.
        ram.release(mark);
        Ok(outcome)
    }

    /// Places in memory for the requests of one queue.
    fn slots(&mut self, load: &Load) -> Vec<Slot> {
        (0..load.depth)
            .map(|_| {
                Slot::new(self.ram.allocate(ENVELOPE, 64), self.ram.allocate(load.block_size.into(), 4096))
            })
            .collect()
    }

    /// What earlier verified loads have written is known to later ones with the same block size.
    fn prepare_ledgers(&mut self, load: &Load, aims: &[aim::Aim]) {
        if load.verify && !self.ledgers_fit(load, aims) {
            let run = ledger::new_run();
            *self.ledgers = aims.iter().map(|aim| Ledger::new(run, load.block_size, aim)).collect();
        }
        self.ledgers.resize_with(self.queues.len(), Ledger::default);
    }

    fn ledgers_fit(&self, load: &Load, aims: &[aim::Aim]) -> bool {
        self.ledgers.iter().zip(aims).all(|(ledger, aim)| ledger.fits(load.block_size, aim))
            && self.ledgers.len() == aims.len()
    }
}

/// Works on all shares, while `beside` does something else.
fn under_load<'d, T>(
    shares: Vec<Vec<Worker<'d>>>,
    stop: &'d Stop,
    beside: impl FnOnce(&'d Stop) -> Result<T>,
) -> Result<(Report, T)> {
    std::thread::scope(|scope| {
        let running: Vec<_> =
            shares.into_iter().map(|share| scope.spawn(move || worker::run(share, stop))).collect();
        let outcome = beside(stop);
        if outcome.is_err() {
            stop.abandoned.store(true, Ordering::Relaxed);
        }
        let mut total = Report::default();
        let mut failed = None;
        for thread in running {
            match thread.join().map_err(|_| DriverError::Daemon("a load thread failed".into()))? {
                Ok(report) => total.merge(&report),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok((total, outcome?)),
        }
    })
}
