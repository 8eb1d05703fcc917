//! cleave-block is killed (SIGKILL) at random moments under verified load, and each time a successor goes on with what
//! was in flight.
//!
//! ```text
//! Loaded --SIGKILL, reaped--> Away --successor listens--> Handshake --memory, inflight region, rings, kicks--> Loaded
//!                              ^                              |
//!                              '----SIGKILL before the kicks--'
//! ```
//!
//! What is demanded: every request completes, and once (a used ring that names a head which is not outstanding is an
//! error of [`crate::driver::SplitQueue`]); no status is an error; each block read is one whole write, the last one that
//! was made to it; the device ends with nothing in flight.

use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::process::Signal;

use crate::driver::{
    Beside, BlockDriver, Daemon, DriverError, Extent, Frontend, InflightRegion, Load, PATIENCE, Result,
};

/// What is to be done to it.
#[derive(Debug, Clone)]
pub struct Campaign {
    pub kills: u32,
    pub queues: u16,
    pub depth: u16,
    pub block_size: u32,
    /// Of a hundred requests, so many are writes.
    pub write_percent: u8,
    /// The moments follow from it.
    pub seed: u64,
}

impl Default for Campaign {
    fn default() -> Self {
        Self { kills: 50, queues: 2, depth: 32, block_size: 4096, write_percent: 70, seed: 1 }
    }
}

/// What came of it, when nothing was lost.
#[derive(Debug)]
pub struct Survived {
    pub kills: u32,
    pub requests: u64,
    /// Reads under load whose content was known and right.
    pub verified: u64,
    /// Blocks that were written, and right at the end.
    pub blocks: u64,
    /// Requests that were in flight when a daemon was dead.
    pub in_flight: u64,
    pub elapsed: Duration,
    /// Microseconds from SIGKILL to the first completion of a successor.
    pub recovery: Histogram<u64>,
    /// The longest that any request took.
    pub longest: Duration,
}

/// Runs `campaign` on `daemon`, a cleave-block whose disk may be overwritten. `killed` is told of each kill.
///
/// # Errors
/// Something was lost, damaged or done twice, or a successor did not come up.
pub fn run(daemon: &mut Daemon, campaign: &Campaign, killed: impl FnMut(u32)) -> Result<Survived> {
    let frontend = Frontend::over(daemon.connect()?);
    let memory =
        (32 << 20) + 2 * u64::from(campaign.block_size) * u64::from(campaign.depth * campaign.queues);
    let memory = memory.next_multiple_of(2 << 20);
    let mut driver = BlockDriver::with_memory(frontend, u64::MAX, campaign.queues, 256, memory)?;
    let region = driver.track_inflight()?;
    let load = Load {
        random: true,
        write_percent: campaign.write_percent,
        block_size: campaign.block_size,
        depth: campaign.depth,
        extent: Extent::Beside,
        poll: false,
        verify: true,
        ..Load::default()
    };
    let mut killer = Killer {
        daemon,
        region: &region,
        random: campaign.seed | 1,
        recovery: Histogram::new_with_bounds(1, 60_000_000, 3).expect("these bounds are in order"),
        in_flight: 0,
        killed,
    };
    let (report, ()) = driver.run_load_beside(&load, |beside| killer.run(beside, campaign.kills))?;
    let Killer { recovery, in_flight, .. } = killer;
    nothing_is_left(&driver, &region)?;
    // Every block, after the last write to it.
    let pass = driver.run_load(&Load { extent: Extent::Pass, write_percent: 0, random: false, ..load })?;
    let blocks = driver.ledgers.iter().map(|ledger| ledger.written()).sum();
    if pass.verified != blocks {
        return Err(DriverError::Daemon(format!("of {blocks} blocks {} could be read back", pass.verified)));
    }
    nothing_is_left(&driver, &region)?;
    Ok(Survived {
        kills: campaign.kills,
        requests: report.requests,
        verified: report.verified,
        blocks,
        in_flight,
        elapsed: report.elapsed,
        recovery,
        longest: report.longest(),
    })
}

/// No completion that was not waited for comes, and the region says so, too.
fn nothing_is_left(driver: &BlockDriver, region: &InflightRegion) -> Result<()> {
    thread::sleep(Duration::from_millis(50));
    for (index, queue) in driver.queues.iter().enumerate() {
        let (used, available) = (queue.device_used_idx(&driver.ram)?, queue.avail_idx());
        if used != available {
            let what = format!("queue {index} has {available} requests and {used} completions (modulo 2^16)");
            return Err(DriverError::Daemon(what));
        }
        let marked = region.marked(index as u16)?;
        if !marked.is_empty() {
            let what = format!("queue {index} is idle, and the region has {marked:?} in flight");
            return Err(DriverError::Daemon(what));
        }
    }
    Ok(())
}

/// What ends daemons beside the load.
struct Killer<'a, F> {
    daemon: &'a mut Daemon,
    region: &'a InflightRegion,
    random: u64,
    recovery: Histogram<u64>,
    in_flight: u64,
    killed: F,
}

impl<F: FnMut(u32)> Killer<'_, F> {
    fn run(&mut self, beside: &mut Beside<'_>, kills: u32) -> Result<()> {
        for count in 1..=kills {
            if beside.has_failed() {
                return Ok(());
            }
            thread::sleep(self.up_to(Duration::from_millis(30)));
            let dead = Instant::now();
            let used = self.kill(beside)?;
            // One in eight successors is killed in the handshake, or before it is kicked.
            while self.one_in(8) {
                self.daemon.kill_and_restart()?;
                if self.one_in(2) {
                    beside.resume(Frontend::over(self.daemon.connect()?), self.region, false)?;
                }
                self.end()?;
            }
            self.daemon.kill_and_restart()?;
            beside.resume(Frontend::over(self.daemon.connect()?), self.region, true)?;
            // One in four at once, in the middle of what it submits again; the others when they work.
            if !self.one_in(4) {
                self.wait_for_completion(beside, &used, dead)?;
            }
            (self.killed)(count);
        }
        Ok(())
    }

    /// Ends the daemon, and says where the used rings are then.
    fn kill(&mut self, beside: &Beside<'_>) -> Result<Vec<u16>> {
        self.end()?;
        let mut used = Vec::new();
        for (vring, index) in beside.vrings.iter().zip(0..) {
            used.push(vring.device_used_idx(beside.ram)?);
            self.in_flight += self.region.marked(index)?.len() as u64;
        }
        Ok(used)
    }

    /// Nothing that it has submitted is under way any more when it has been waited for.
    fn end(&mut self) -> Result<()> {
        if !self.daemon.is_running() {
            return Err(DriverError::Daemon(format!("the daemon ended by itself: {}", self.daemon.log())));
        }
        self.daemon.signal(Signal::KILL)?;
        self.daemon.wait().map(drop)
    }

    fn wait_for_completion(&mut self, beside: &Beside<'_>, used: &[u16], dead: Instant) -> Result<()> {
        while !beside.has_failed() {
            for (vring, used) in beside.vrings.iter().zip(used) {
                if vring.device_used_idx(beside.ram)? != *used {
                    self.recovery.saturating_record(dead.elapsed().as_micros() as u64);
                    return Ok(());
                }
            }
            if dead.elapsed() > PATIENCE {
                return Err(DriverError::Daemon(format!(
                    "no completion after a kill: {}",
                    self.daemon.log()
                )));
            }
            thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    fn up_to(&mut self, most: Duration) -> Duration {
        most.mul_f64((self.next() % 1000) as f64 / 1000.0)
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 8
    }
}

/// A seed that differs from run to run.
pub fn any_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |time| time.as_nanos() as u64)
}
