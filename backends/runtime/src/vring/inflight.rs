//! Requests in flight, in memory that outlives this process (vhost-user, "Inflight I/O tracking", split virtqueue).
//!
//! ```text
//!   a head:  free --fetched: counter, inflight = 1--> in flight
//!            in flight --used: batch list, used->idx, inflight = 0, used_idx--> free
//! ```
//!
//! The frontend holds the region and gives it to whoever serves the ring next. Wherever this process dies, `used_idx`
//! against the ring's own index tells whether the last head of the batch list was used or not. Each step is a release
//! store: the compiler keeps their order, and a processor's death is not what this is about.
//!
//! Invariants: what is in the region decides nothing but which heads are in flight and in which order, and that is checked
//! when a ring starts; a batch here is what is used together, mostly one head.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cleave_common::vhost_user::Inflight;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use vm_memory::mmap::MmapRegion;
use vm_memory::{AtomicAccess, Bytes, VolatileMemory, VolatileMemoryError};

use super::QueueIndex;
use crate::shared::{SharedError, map_sealed, sealed_memfd};

/// The layout's version; 0 is a region that nobody has used.
const VERSION: u16 = 1;

/// Bytes before a queue's descriptor states, and their places.
const HEADER_LEN: usize = 16;
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;

/// Bytes of one descriptor's state, and places in it.
const STATE_LEN: usize = 16;
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Queues' regions start on cache lines of their own.
const ALIGN: usize = 64;

/// Entries of the largest split virtqueue.
const MAX_QUEUE_SIZE: u16 = 32768;

/// Why requests in flight cannot be tracked, or those of a predecessor not taken over.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    #[error("a region for {num_queues} queues of {queue_size} entries: the device has {max_queues} queues")]
    Shape { num_queues: u16, queue_size: u16, max_queues: u16 },
    #[error("a region of {given:#x} bytes, of which this backend needs {needed:#x}")]
    TooSmall { given: u64, needed: u64 },
    #[error(transparent)]
    Shared(#[from] SharedError),
    #[error(
        "the region has version {version} and features {features:#x}: version 1 without features is known"
    )]
    Version { version: u16, features: u64 },
    #[error("the region says that it is for {desc_num} entries, the frontend that it is for {queue_size}")]
    DescNum { desc_num: u16, queue_size: u16 },
    #[error("a queue of {size} entries, in a region for {desc_num}")]
    RingTooLarge { size: u16, desc_num: u16 },
    #[error("the region names descriptor {head} in a queue of {size} entries")]
    BadHead { head: u16, size: u16 },
    #[error(
        "the region is another ring's: its used index is {used_idx}, the ring's {ring_used_idx}, and {in_flight} requests are in flight; a ring that starts over needs a fresh region"
    )]
    OtherRing { used_idx: u16, ring_used_idx: u16, in_flight: usize },
}

impl From<VolatileMemoryError> for InflightError {
    fn from(error: VolatileMemoryError) -> Self {
        Self::Shared(error.into())
    }
}

/// Bytes from one queue's region to the next one's.
fn stride(queue_size: u16) -> usize {
    (HEADER_LEN + STATE_LEN * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// What the frontend keeps for the device itself: it does not know, for it keeps the whole file of which it was told the
/// first part. Zeros when nobody has used it.
#[derive(Debug)]
pub struct Kept {
    /// It cannot shrink.
    pub fd: OwnedFd,
    /// A multiple of a page.
    pub offset: u64,
}

impl Kept {
    const PAGE: u64 = 4096;

    /// `None`: `fd`, which is that of the area `given`, has no such part. Another backend has made it.
    pub(crate) fn find(given: Inflight, fd: &OwnedFd, len: u64) -> Option<Self> {
        let end = given.mmap_offset.checked_add(given.mmap_size)?;
        let offset = end.checked_next_multiple_of(Self::PAGE)?;
        let sealed = fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        let file_len = u64::try_from(fstat(fd).ok()?.st_size).ok()?;
        let fits = len != 0 && sealed && offset.checked_add(len)? <= file_len;
        fits.then(|| fd.try_clone().ok()).flatten().map(|fd| Self { fd, offset })
    }
}

/// What the frontend keeps for all queues.
#[derive(Debug, Clone)]
pub(crate) struct InflightArea {
    memory: Arc<MmapRegion>,
    num_queues: u16,
    queue_size: u16,
}

impl InflightArea {
    fn check(num_queues: u16, queue_size: u16, max_queues: u16) -> Result<u64, InflightError> {
        if !(1..=max_queues).contains(&num_queues) || !(1..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return Err(InflightError::Shape { num_queues, queue_size, max_queues });
        }
        Ok(stride(queue_size) as u64 * u64::from(num_queues))
    }

    /// GET_INFLIGHT_FD: a fresh area for the frontend to keep, with `kept` bytes of the device's behind it. It is used once it
    /// comes back.
    pub(crate) fn create(
        wanted: Inflight,
        max_queues: u16,
        kept: u64,
    ) -> Result<(Inflight, OwnedFd), InflightError> {
        let mmap_size = Self::check(wanted.num_queues, wanted.queue_size, max_queues)?;
        let file_len = if kept == 0 { mmap_size } else { mmap_size.next_multiple_of(Kept::PAGE) + kept };
        let fd = sealed_memfd("vhost-inflight", file_len)?;
        Ok((Inflight { mmap_size, mmap_offset: 0, ..wanted }, fd))
    }

    /// SET_INFLIGHT_FD.
    pub(crate) fn map(given: Inflight, fd: OwnedFd, max_queues: u16) -> Result<Self, InflightError> {
        let Inflight { mmap_size, mmap_offset, num_queues, queue_size } = given;
        let needed = Self::check(num_queues, queue_size, max_queues)?;
        if mmap_size < needed {
            return Err(InflightError::TooSmall { given: mmap_size, needed });
        }
        let memory = Arc::new(map_sealed(fd, mmap_offset, needed)?);
        Ok(Self { memory, num_queues, queue_size })
    }

    /// The part of one queue. `None`: the frontend wanted it for the first queues only.
    pub(crate) fn queue(&self, QueueIndex(index): QueueIndex) -> Option<InflightQueue> {
        let start = usize::from(index) * stride(self.queue_size);
        let region = Region { memory: self.memory.clone(), start, desc_num: self.queue_size };
        (index < self.num_queues).then_some(InflightQueue { region, counter: 0, last_batch_head: 0 })
    }
}

/// One queue's part of the area, by its fields.
#[derive(Debug)]
struct Region {
    memory: Arc<MmapRegion>,
    start: usize,
    desc_num: u16,
}

impl Region {
    fn load<T: AtomicAccess>(&self, at: usize) -> Result<T, VolatileMemoryError> {
        self.memory.as_volatile_slice().load(self.start + at, Ordering::Acquire)
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T) -> Result<(), VolatileMemoryError> {
        self.memory.as_volatile_slice().store(value, self.start + at, Ordering::Release)
    }

    fn state(head: u16) -> usize {
        HEADER_LEN + STATE_LEN * usize::from(head)
    }

    fn is_in_flight(&self, head: u16) -> Result<bool, VolatileMemoryError> {
        Ok(self.load::<u8>(Self::state(head) + INFLIGHT)? != 0)
    }

    fn clear(&self, head: u16) -> Result<(), VolatileMemoryError> {
        self.store(Self::state(head) + INFLIGHT, 0u8)
    }
}

/// What a ring finds in its region when it starts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nobody has used it: the ring starts where the frontend says.
    Fresh,
    /// Heads in flight, in the order of their fetching; the ring goes on behind them.
    Used(Vec<u16>),
}

/// One ring's record of its heads in flight.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    region: Region,
    /// Of the next head to be fetched.
    counter: u64,
    last_batch_head: u16,
}

impl InflightQueue {
    /// Takes over what the last one to serve the ring left, whose size and used index these are.
    pub(crate) fn attach(&mut self, size: u16, ring_used_idx: u16) -> Result<Found, InflightError> {
        let region = &self.region;
        if size > region.desc_num {
            return Err(InflightError::RingTooLarge { size, desc_num: region.desc_num });
        }
        let (version, features) = (region.load(VERSION_AT)?, region.load(FEATURES)?);
        match (version, features) {
            (0, _) => {
                self.initialise(ring_used_idx)?;
                return Ok(Found::Fresh);
            }
            (VERSION, 0) => {}
            _ => return Err(InflightError::Version { version, features }),
        }
        let desc_num: u16 = region.load(DESC_NUM)?;
        if desc_num != region.desc_num {
            return Err(InflightError::DescNum { desc_num, queue_size: region.desc_num });
        }
        self.repair(ring_used_idx)?;
        self.last_batch_head = self.region.load(LAST_BATCH_HEAD)?;
        let mut in_flight = self.heads_in_flight(size)?;
        in_flight.sort_unstable();
        self.counter = in_flight.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Found::Used(in_flight.into_iter().map(|(_, head)| head).collect()))
    }

    /// The used index is the ring's from the start: another one would tell a successor that a batch was cut off, and it
    /// would drop descriptor 0, where the empty batch list starts.
    fn initialise(&mut self, ring_used_idx: u16) -> Result<(), VolatileMemoryError> {
        let region = &self.region;
        let states = vec![0; STATE_LEN * usize::from(region.desc_num)];
        region.memory.as_volatile_slice().write_slice(&states, region.start + HEADER_LEN)?;
        region.store(FEATURES, 0u64)?;
        region.store(DESC_NUM, region.desc_num)?;
        region.store(LAST_BATCH_HEAD, 0u16)?;
        region.store(USED_IDX, ring_used_idx)?;
        region.store(VERSION_AT, VERSION)
    }

    /// Finishes what a predecessor died in the middle of: heads of its last batch that the guest has got are no longer in
    /// flight.
    fn repair(&self, ring_used_idx: u16) -> Result<(), InflightError> {
        let region = &self.region;
        let used_idx: u16 = region.load(USED_IDX)?;
        let batch = ring_used_idx.wrapping_sub(used_idx);
        if batch == 0 {
            return Ok(());
        }
        if batch > region.desc_num {
            // No batch is that long. Where nothing is in flight, nothing can be lost or done twice.
            let in_flight = self.heads_in_flight(region.desc_num)?.len();
            if in_flight != 0 {
                return Err(InflightError::OtherRing { used_idx, ring_used_idx, in_flight });
            }
        } else {
            let mut head: u16 = region.load(LAST_BATCH_HEAD)?;
            for _ in 0..batch {
                if head >= region.desc_num {
                    return Err(InflightError::BadHead { head, size: region.desc_num });
                }
                region.clear(head)?;
                head = region.load(Region::state(head) + NEXT)?;
            }
        }
        Ok(region.store(USED_IDX, ring_used_idx)?)
    }

    /// Heads in flight with their counters, by head.
    fn heads_in_flight(&self, size: u16) -> Result<Vec<(u64, u16)>, InflightError> {
        let mut heads = Vec::new();
        for head in 0..self.region.desc_num {
            if self.region.is_in_flight(head)? {
                if head >= size {
                    return Err(InflightError::BadHead { head, size });
                }
                heads.push((self.region.load(Region::state(head) + COUNTER)?, head));
            }
        }
        Ok(heads)
    }

    /// `head` has been fetched from the available ring. It is below the ring's size.
    pub(crate) fn fetched(&mut self, head: u16) -> Result<(), InflightError> {
        self.region.store(Region::state(head) + COUNTER, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        Ok(self.region.store(Region::state(head) + INFLIGHT, 1u8)?)
    }

    /// `head` is about to be put on the used ring.
    pub(crate) fn before_used(&mut self, head: u16) -> Result<(), InflightError> {
        self.region.store(Region::state(head) + NEXT, self.last_batch_head)?;
        self.last_batch_head = head;
        Ok(self.region.store(LAST_BATCH_HEAD, head)?)
    }

    /// The guest can see `head` on the used ring, whose index is `used_idx` now.
    pub(crate) fn after_used(&mut self, head: u16, used_idx: u16) -> Result<(), InflightError> {
        self.region.clear(head)?;
        Ok(self.region.store(USED_IDX, used_idx)?)
    }
}

#[cfg(test)]
mod tests;
