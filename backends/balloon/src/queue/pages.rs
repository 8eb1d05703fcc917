//! The inflate and the deflate queue: a request is an array of page numbers (virtio 1.2, 5.5.6).

use cleave_runtime::{Chain, GuestMemory};

use super::{Requests, Ring, gather};
use crate::config_space::PAGE;
use crate::host::Outcome;
use crate::pages::{Run, runs};
use crate::shared::Shared;

/// Most pages of one request. Linux names 256 at a time; what is beyond stays with the guest, which costs nobody but the
/// host its memory.
const MOST_PAGES: usize = 1 << 16;

/// Bytes of a page number.
const PFN: usize = 4;

/// Which of the two queues it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Inflate,
    Deflate,
}

pub(crate) struct Pages<'s> {
    shared: &'s Shared,
    direction: Direction,
    bytes: Vec<u8>,
    pfns: Vec<u32>,
}

impl<'s> Pages<'s> {
    pub(crate) fn new(shared: &'s Shared, direction: Direction) -> Self {
        Self { shared, direction, bytes: Vec::new(), pfns: Vec::new() }
    }

    /// The runs that the request names. `None`: its array is outside of memory.
    fn read(&mut self, memory: &GuestMemory, chain: &Chain) -> Option<impl Iterator<Item = Run>> {
        let len: usize = chain.readable().iter().map(|segment| segment.len as usize).sum();
        self.bytes.resize(len.min(MOST_PAGES * PFN), 0);
        let bytes = gather(memory, chain.readable(), &mut self.bytes)?;
        self.pfns.clear();
        let (numbers, _) = bytes.as_chunks::<PFN>();
        self.pfns.extend(numbers.iter().map(|bytes| u32::from_le_bytes(*bytes)));
        Some(runs(&mut self.pfns))
    }
}

impl Requests for Pages<'_> {
    fn serve(&mut self, ring: &mut Ring, chain: &Chain) -> u32 {
        let shared = self.shared;
        if self.direction == Direction::Deflate && !shared.host().follows_deflation() {
            return 0;
        }
        let memory = ring.vring.memory().clone();
        let len: usize = chain.readable().iter().map(|segment| segment.len as usize).sum();
        if len > MOST_PAGES * PFN {
            ring.complain(&format_args!("{} pages in one request: {MOST_PAGES} are looked at", len / PFN));
        }
        let direction = self.direction;
        let Some(runs) = self.read(&memory, chain) else {
            ring.complain(&"an array of page numbers is outside of memory");
            return 0;
        };
        let mut outcome = Outcome::default();
        let mut host = shared.host();
        match direction {
            Direction::Inflate => runs.for_each(|run| host.inflate(run, &mut outcome)),
            Direction::Deflate => runs.for_each(|run| host.deflate(run)),
        }
        drop(host);
        shared.counters.inflated(&outcome);
        complain(ring, &outcome);
        0
    }
}

pub(super) fn complain(ring: &mut Ring, outcome: &Outcome) {
    if outcome.refused != 0 {
        let pages = outcome.refused / PAGE;
        ring.complain(&format_args!("{pages} pages are outside of memory, or part of a ring"));
    }
    if let Some(error) = &outcome.error {
        ring.complain(&format_args!("memory cannot be given back to the host: {error}"));
    }
}
