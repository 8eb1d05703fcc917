//! The split virtqueue, device side (virtio 1.2, 2.7).
//!
//! Written here rather than taken from a crate because the device must fetch a given head again (requests in flight
//! of a predecessor), must tell a truncated chain from a whole one, and must honour NO_INTERRUPT.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Address, GuestAddress, GuestMemoryError};

use super::inflight::InflightError;
use super::part::RingPart;
use crate::memory::GuestMemory;

const DESCRIPTOR_LEN: u64 = 16;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Both rings start with `flags`, then `idx`, then the entries.
const FLAGS: usize = 0;
const IDX: usize = 2;
const HEADER_LEN: usize = 4;

/// Bytes of an entry of the available ring, and of the used ring.
const AVAIL_LEN: usize = 2;
const USED_LEN: usize = 8;

/// Bytes of the available ring, the used ring. Each ends in a 16-bit event index.
fn ring_lens(size: u16) -> [usize; 2] {
    [AVAIL_LEN, USED_LEN].map(|entry| HEADER_LEN + entry * usize::from(size) + 2)
}

/// A ring that cannot be served any more.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("the available index jumped from {next_avail} to {avail_idx}, in a queue of {size} entries")]
    AvailIndexJump { next_avail: u16, avail_idx: u16, size: u16 },
    #[error("the available ring names descriptor {head}, in a queue of {size} entries")]
    BadHead { head: u16, size: u16 },
    #[error("the ring is outside guest memory")]
    OutsideMemory(#[from] vm_memory::GuestMemoryError),
    #[error("requests in flight: {0}")]
    Inflight(#[from] InflightError),
}

/// Where a ring's parts are in guest-physical memory. `RingAddresses` exist only for parts that lie in it whole.
#[derive(Debug, Clone, Copy)]
pub struct RingAddresses {
    pub descriptors: GuestAddress,
    pub available: GuestAddress,
    pub used: GuestAddress,
}

impl RingAddresses {
    /// Translates the frontend's user addresses, with the alignment of virtio 1.2, 2.7.
    pub(crate) fn translate(memory: &GuestMemory, user: [u64; 3], size: u16) -> Option<Self> {
        let [descriptors, available, used] = user;
        let [available_len, used_len] = ring_lens(size).map(|len| len as u64);
        let part = |addr: u64, len: u64, align: u64| {
            memory.translate(addr, len).filter(|gpa| gpa.raw_value().is_multiple_of(align))
        };
        Some(Self {
            descriptors: part(descriptors, DESCRIPTOR_LEN * u64::from(size), 16)?,
            available: part(available, available_len, 2)?,
            used: part(used, used_len, 4)?,
        })
    }
}

#[derive(Debug)]
pub(crate) struct SplitRing {
    addresses: RingAddresses,
    available: RingPart,
    used: RingPart,
    /// A power of two, at most 32768.
    size: u16,
    event_idx: bool,
    next_avail: Wrapping<u16>,
    /// The available ring's index when it was last looked at; the heads before it are there to be fetched.
    seen_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// `next_used` when the guest was last considered for an interrupt.
    signalled_used: Wrapping<u16>,
}

impl SplitRing {
    /// Bytes of `flags` and `idx` before both rings.
    pub(crate) const HEADER_LEN: u64 = HEADER_LEN as u64;
    /// Bytes of a used element.
    pub(crate) const ELEMENT_LEN: u64 = USED_LEN as u64;

    /// Takes the used index from the ring itself: it says what the guest has been told, whoever served the ring before.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        addresses: RingAddresses,
        size: u16,
        next_avail: u16,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        let [available_len, used_len] = ring_lens(size);
        let part =
            |addr, len| RingPart::find(memory, addr, len).ok_or(GuestMemoryError::InvalidGuestAddress(addr));
        let (available, used) = (part(addresses.available, available_len)?, part(addresses.used, used_len)?);
        let used_idx = Wrapping(used.load(IDX));
        Ok(Self {
            addresses,
            available,
            used,
            size,
            event_idx,
            next_avail: Wrapping(next_avail),
            seen_avail: Wrapping(next_avail),
            next_used: used_idx,
            signalled_used: used_idx,
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail.0
    }

    /// The ring's used index.
    pub(crate) fn next_used(&self) -> u16 {
        self.next_used.0
    }

    /// Goes on behind `unfinished` heads that have been fetched already.
    pub(crate) fn skip(&mut self, unfinished: u16) {
        self.next_avail = self.next_used + Wrapping(unfinished);
        self.seen_avail = self.next_avail;
    }

    /// Goes back by `count` heads, which will be fetched again.
    pub(crate) fn rewind(&mut self, count: u16) {
        self.next_avail -= count;
        self.seen_avail = self.next_avail;
    }

    pub(crate) fn descriptor_table(&self) -> GuestAddress {
        self.addresses.descriptors
    }

    /// Where its parts are, and how many bytes each has.
    pub(crate) fn parts(&self) -> [(GuestAddress, u64); 3] {
        let RingAddresses { descriptors, available, used } = self.addresses;
        let [available_len, used_len] = ring_lens(self.size).map(|len| len as u64);
        let table_len = DESCRIPTOR_LEN * u64::from(self.size);
        [(descriptors, table_len), (available, available_len), (used, used_len)]
    }

    /// Where the entry of `index` is in a ring of entries of `entry_len` bytes.
    fn entry(&self, index: Wrapping<u16>, entry_len: usize) -> usize {
        HEADER_LEN + entry_len * usize::from(index.0 & (self.size - 1))
    }

    /// Where a ring of such entries has its event index.
    fn event(&self, entry_len: usize) -> usize {
        HEADER_LEN + entry_len * usize::from(self.size)
    }

    /// The index is the line of memory that both sides want most: it is looked at only when what was seen is used up.
    pub(crate) fn has_available(&mut self) -> Result<bool, RingError> {
        if self.seen_avail != self.next_avail {
            return Ok(true);
        }
        // The entries and descriptors behind the index are read after it.
        let avail_idx = Wrapping(self.available.load(IDX));
        if (avail_idx - self.next_avail).0 > self.size {
            let (next_avail, avail_idx, size) = (self.next_avail.0, avail_idx.0, self.size);
            return Err(RingError::AvailIndexJump { next_avail, avail_idx, size });
        }
        self.seen_avail = avail_idx;
        Ok(avail_idx != self.next_avail)
    }

    pub(crate) fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if !self.has_available()? {
            return Ok(None);
        }
        let head = self.available.load(self.entry(self.next_avail, AVAIL_LEN));
        if head >= self.size {
            return Err(RingError::BadHead { head, size: self.size });
        }
        self.next_avail += 1;
        Ok(Some(head))
    }

    /// Puts an element behind the used ring's last one, and gives its offset. The guest sees it with the next
    /// [`SplitRing::publish_used`].
    pub(crate) fn put_used(&mut self, head: u16, len: u32) -> u64 {
        let at = self.entry(self.next_used, USED_LEN);
        self.used.put(at, head.into());
        self.used.put(at + 4, len);
        self.next_used += 1;
        at as u64
    }

    /// The guest sees the elements, and what they are about, before the index.
    pub(crate) fn publish_used(&self) {
        self.used.store(IDX, self.next_used.0);
    }

    /// Whether anything was pushed since [`SplitRing::should_signal`] was asked.
    pub(crate) fn has_unsignalled(&self) -> bool {
        self.signalled_used != self.next_used
    }

    /// Where the used ring ends in the index up to which kicks are of no interest.
    pub(crate) fn avail_event_offset(&self) -> u64 {
        self.event(USED_LEN) as u64
    }

    /// Whether an interrupt is due for the elements pushed since the last call (virtio 1.2, 2.7.7).
    pub(crate) fn should_signal(&mut self) -> bool {
        let old = self.signalled_used;
        if old == self.next_used {
            return false;
        }
        self.signalled_used = self.next_used;
        // The used index is visible before the guest's wish is read; the guest does it in the other order.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let used_event = Wrapping(self.available.load(self.event(AVAIL_LEN)));
            return self.next_used - used_event - Wrapping(1) < self.next_used - old;
        }
        self.available.load(FLAGS) & AVAIL_NO_INTERRUPT == 0
    }

    pub(crate) fn enable_kicks(&mut self) -> Result<bool, RingError> {
        if self.event_idx {
            self.used.store(self.event(USED_LEN), self.next_avail.0);
        } else {
            self.used.store(FLAGS, 0);
        }
        // The wish is visible before the index is read; the guest does it in the other order.
        fence(Ordering::SeqCst);
        self.has_available()
    }

    pub(crate) fn disable_kicks(&mut self) {
        if self.event_idx {
            // One that has been passed. Left where it was, it would ask for a kick by the next chain.
            self.used.store(self.event(USED_LEN), (self.next_avail - Wrapping(1)).0);
        } else {
            self.used.store(FLAGS, USED_NO_NOTIFY);
        }
    }
}
