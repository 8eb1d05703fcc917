//! Guest memory as the host has it: files, in which a hole is memory that the host has again.
//!
//! ```text
//!   inflate:  in small pages ──────────────────> a hole
//!             in huge ones, or inhibited ──────> held ──the huge page is whole, or no longer inhibited──> a hole
//!   deflate:  no longer held; the guest's next access to a hole takes memory from the host again
//!   report:   whole pages of the host ─────────> a hole, unless inhibited
//! ```
//!
//! A hole is punched in the file, and so is gone from every process that has it mapped at once: MADV_DONTNEED on a shared
//! mapping frees nothing.
//!
//! Invariants: nothing is punched outside of the regions that the frontend shares, nor where a ring of this device is, nor
//! between [`Host::set_inhibited`] and its undoing; of a huge page nothing or all is punched, for a part of one frees
//! nothing and is zeroed all the same.

use std::fs::File;
use std::io;
use std::sync::Arc;

use cleave_runtime::{GuestMemory, QueueIndex, Vring};
use rustix::fs::{FallocateFlags, fallocate, fstatfs};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::config_space::PAGE;
use crate::held::Held;
use crate::pages::Run;

const HUGETLBFS_MAGIC: i64 = 0x958458f6;

/// A region of guest memory.
#[derive(Debug)]
struct Region {
    run: Run,
    file: Arc<File>,
    /// Where the region starts in its file.
    offset: u64,
    /// Bytes of a page of the host's.
    page: u64,
}

impl Region {
    fn of(region: &impl GuestMemoryRegion) -> Option<Self> {
        let file = region.file_offset()?;
        let stat = fstatfs(file.file()).ok()?;
        // Only hugetlbfs has nothing but huge pages; in other files a huge page is split where a hole begins in it.
        let page = if stat.f_type == HUGETLBFS_MAGIC { stat.f_bsize as u64 } else { PAGE };
        let run = Run::new(region.start_addr().raw_value(), region.len())?;
        Some(Self { run, file: file.arc().clone(), offset: file.start(), page: page.max(PAGE) })
    }

    /// `run` lies in this region, and is made of whole pages of it.
    fn punch(&self, run: Run) -> io::Result<()> {
        let at = self.offset + (run.start - self.run.start);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(&*self.file, flags, at, run.len()) {
                Err(rustix::io::Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }
}

/// What came of pages that a driver named. All in bytes.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) given_back: u64,
    /// Outside of memory, or a ring's.
    pub(crate) refused: u64,
    pub(crate) error: Option<io::Error>,
}

#[derive(Debug)]
pub(crate) struct Host {
    regions: Vec<Region>,
    /// Of which the regions are.
    memory: Option<Arc<GuestMemory>>,
    /// Where the rings of this device are, whole pages; by queue.
    rings: Vec<(QueueIndex, Run)>,
    /// The same in the order of their starts.
    guarded: Vec<Run>,
    held: Held,
    inhibited: bool,
}

impl Host {
    pub(crate) fn new(inhibited: bool) -> Self {
        Self {
            regions: Vec::new(),
            memory: None,
            rings: Vec::new(),
            guarded: Vec::new(),
            held: Held::new(PAGE),
            inhibited,
        }
    }

    /// A queue starts: gives the size of memory in bytes, as far as it can be given back.
    pub(crate) fn enter(&mut self, vring: &Vring) -> u64 {
        let memory = vring.memory();
        if self.memory.as_ref().is_none_or(|known| !Arc::ptr_eq(known, memory)) {
            self.regions = memory.map().iter().filter_map(Region::of).collect();
            self.memory = Some(memory.clone());
            let block = self.regions.iter().map(|region| region.page).max().unwrap_or(PAGE);
            if Held::new(block).block() != self.held.block() {
                self.held = Held::new(block);
            }
        }
        let parts = vring.parts();
        let runs = parts.iter().filter_map(|(addr, len)| Run::new(addr.raw_value(), *len));
        self.rings.extend(runs.map(|run| (vring.index(), run.touched(PAGE))));
        self.guard();
        self.regions.iter().map(|region| region.run.len()).sum()
    }

    /// A queue has stopped. With the last one memory is let go.
    pub(crate) fn leave(&mut self, index: QueueIndex) {
        self.rings.retain(|(other, _)| *other != index);
        self.guard();
        if self.rings.is_empty() {
            self.regions.clear();
            self.memory = None;
        }
    }

    fn guard(&mut self) {
        self.guarded = self.rings.iter().map(|(_, run)| *run).collect();
        self.guarded.sort_unstable();
    }

    /// The balloon is another guest's from now on, or empty.
    pub(crate) fn forget(&mut self) {
        self.held.clear();
    }

    /// Bytes of pages in the balloon that the host does not have.
    pub(crate) fn waiting(&self) -> u64 {
        if self.inhibited { self.held.len() } else { self.held.incomplete() }
    }

    /// Whether a driver's queue runs.
    pub(crate) fn is_in_use(&self) -> bool {
        !self.rings.is_empty()
    }

    /// Bytes of the largest page of the host's that memory is made of.
    pub(crate) fn page(&self) -> u64 {
        self.regions.iter().map(|region| region.page).max().unwrap_or(PAGE)
    }

    /// Puts a run in the balloon.
    pub(crate) fn inflate(&mut self, run: Run, outcome: &mut Outcome) {
        let mut inside = 0;
        for region in &self.regions {
            let Some(part) = run.intersection(region.run) else { continue };
            inside += part.len();
            let huge = region.page > PAGE;
            if huge || self.inhibited {
                self.held.insert(part);
            }
            if self.inhibited {
                continue;
            }
            if huge {
                let blocks: Vec<Run> = self.held.complete(part).collect();
                for whole in blocks.iter().filter_map(|block| block.intersection(region.run)) {
                    give_back(region, whole, &self.guarded, outcome);
                }
            } else {
                give_back(region, part, &self.guarded, outcome);
            }
        }
        outcome.refused += run.len() - inside;
    }

    /// Takes a run out of the balloon.
    pub(crate) fn deflate(&mut self, run: Run) {
        self.held.remove(run);
    }

    /// Whether a deflate request changes anything here.
    pub(crate) fn follows_deflation(&self) -> bool {
        !self.held.is_empty()
    }

    /// Gives back a run that is free until this is acknowledged, and may be used by the guest any time after.
    pub(crate) fn report(&mut self, run: Run, outcome: &mut Outcome) {
        let mut inside = 0;
        for region in &self.regions {
            let Some(part) = run.intersection(region.run) else { continue };
            inside += part.len();
            if let Some(whole) = part.whole(region.page).filter(|_| !self.inhibited) {
                give_back(region, whole, &self.guarded, outcome);
            }
        }
        outcome.refused += run.len() - inside;
    }

    /// While inhibited nothing is given back. What the guest puts in the balloon meanwhile is, afterwards.
    pub(crate) fn set_inhibited(&mut self, inhibited: bool, outcome: &mut Outcome) {
        if std::mem::replace(&mut self.inhibited, inhibited) == inhibited || inhibited {
            return;
        }
        for region in &self.regions {
            for part in self.held.runs().into_iter().filter_map(|run| run.intersection(region.run)) {
                if let Some(whole) = part.whole(region.page) {
                    give_back(region, whole, &self.guarded, outcome);
                }
                if region.page == PAGE {
                    self.held.remove(part);
                }
            }
        }
    }
}

/// All of `run` but what is guarded.
fn give_back(region: &Region, run: Run, guarded: &[Run], outcome: &mut Outcome) {
    let mut punch = |run: Run| match region.punch(run) {
        Ok(()) => outcome.given_back += run.len(),
        Err(error) => outcome.error = Some(error),
    };
    if guarded.iter().all(|ring| ring.intersection(run).is_none()) {
        return punch(run);
    }
    let left: Vec<Run> =
        run.without(guarded).into_iter().filter_map(|part| part.whole(region.page)).collect();
    left.iter().copied().for_each(&mut punch);
    outcome.refused += run.len() - left.iter().map(|part| part.len()).sum::<u64>();
}
