//! The split virtqueue, device side (virtio 1.2, 2.7).
//!
//! Written here rather than taken from a crate because the device must fetch a given head again (requests in flight
//! of a predecessor), must tell a truncated chain from a whole one, and must honour NO_INTERRUPT.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Address, Bytes, GuestAddress};

use super::inflight::InflightError;
use crate::memory::GuestMemory;

const DESCRIPTOR_LEN: u64 = 16;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;
const HEADER_LEN: u64 = SplitRing::HEADER_LEN;

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
        let size = u64::from(size);
        let [descriptors, available, used] = user;
        let part = |addr: u64, len: u64, align: u64| {
            memory.translate(addr, len).filter(|gpa| gpa.raw_value().is_multiple_of(align))
        };
        Some(Self {
            descriptors: part(descriptors, DESCRIPTOR_LEN * size, 16)?,
            // Each ring ends in a 16-bit event index.
            available: part(available, HEADER_LEN + 2 * size + 2, 2)?,
            used: part(used, HEADER_LEN + 8 * size + 2, 4)?,
        })
    }
}

#[derive(Debug)]
pub(crate) struct SplitRing {
    addresses: RingAddresses,
    /// A power of two, at most 32768.
    size: u16,
    event_idx: bool,
    next_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// `next_used` when the guest was last considered for an interrupt.
    signalled_used: Wrapping<u16>,
}

impl SplitRing {
    /// Bytes of `flags` and `idx` before both rings.
    pub(crate) const HEADER_LEN: u64 = 4;
    /// Bytes of a used element.
    pub(crate) const ELEMENT_LEN: u64 = 8;

    /// Takes the used index from the ring itself: it says what the guest has been told, whoever served the ring before.
    pub(crate) fn new(
        memory: &GuestMemory,
        addresses: RingAddresses,
        size: u16,
        next_avail: u16,
        event_idx: bool,
    ) -> Result<Self, RingError> {
        let used_idx = Wrapping(load(memory, addresses.used, 2)?);
        Ok(Self {
            addresses,
            size,
            event_idx,
            next_avail: Wrapping(next_avail),
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
    }

    pub(crate) fn descriptor_table(&self) -> GuestAddress {
        self.addresses.descriptors
    }

    fn slot(&self, index: Wrapping<u16>) -> u64 {
        u64::from(index.0 & (self.size - 1))
    }

    fn avail_idx(&self, memory: &GuestMemory) -> Result<Wrapping<u16>, RingError> {
        // Acquire: the entries and descriptors behind the index are read after it.
        Ok(Wrapping(load(memory, self.addresses.available, 2)?))
    }

    pub(crate) fn has_available(&self, memory: &GuestMemory) -> Result<bool, RingError> {
        Ok(self.avail_idx(memory)? != self.next_avail)
    }

    pub(crate) fn next_head(&mut self, memory: &GuestMemory) -> Result<Option<u16>, RingError> {
        let avail_idx = self.avail_idx(memory)?;
        if avail_idx == self.next_avail {
            return Ok(None);
        }
        if (avail_idx - self.next_avail).0 > self.size {
            let (next_avail, avail_idx, size) = (self.next_avail.0, avail_idx.0, self.size);
            return Err(RingError::AvailIndexJump { next_avail, avail_idx, size });
        }
        let head = load(memory, self.addresses.available, HEADER_LEN + 2 * self.slot(self.next_avail))?;
        if head >= self.size {
            return Err(RingError::BadHead { head, size: self.size });
        }
        self.next_avail += 1;
        Ok(Some(head))
    }

    /// Gives the offset of the element in the used ring.
    pub(crate) fn push_used(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<u64, RingError> {
        let element = u64::from(head) | u64::from(len) << 32;
        let used = self.addresses.used;
        let offset = HEADER_LEN + Self::ELEMENT_LEN * self.slot(self.next_used);
        // Not one atomic 64-bit store: used elements are aligned to 4 bytes only.
        memory.map().write_slice(&element.to_le_bytes(), used.unchecked_add(offset))?;
        self.next_used += 1;
        // Release: the guest sees the element, and the data, before the index.
        memory.map().store(self.next_used.0.to_le(), used.unchecked_add(2), Ordering::Release)?;
        Ok(offset)
    }

    /// As [`SplitRing::push_used`], for several at once: the guest sees all of them or none. Gives the offset of each.
    pub(crate) fn push_used_together(
        &mut self,
        memory: &GuestMemory,
        used: &[(u16, u32)],
        mut pushed: impl FnMut(u64),
    ) -> Result<(), RingError> {
        let ring = self.addresses.used;
        let mut next = self.next_used;
        for (head, len) in used {
            let element = u64::from(*head) | u64::from(*len) << 32;
            let offset = HEADER_LEN + Self::ELEMENT_LEN * self.slot(next);
            memory.map().write_slice(&element.to_le_bytes(), ring.unchecked_add(offset))?;
            pushed(offset);
            next += 1;
        }
        self.next_used = next;
        // Release: the guest sees the elements, and the data, before the index.
        memory.map().store(next.0.to_le(), ring.unchecked_add(2), Ordering::Release)?;
        Ok(())
    }

    /// Whether anything was pushed since [`SplitRing::should_signal`] was asked.
    pub(crate) fn has_unsignalled(&self) -> bool {
        self.signalled_used != self.next_used
    }

    /// Where the used ring ends in the index up to which kicks are of no interest.
    pub(crate) fn avail_event_offset(&self) -> u64 {
        HEADER_LEN + Self::ELEMENT_LEN * u64::from(self.size)
    }

    /// Whether an interrupt is due for the elements pushed since the last call (virtio 1.2, 2.7.7).
    pub(crate) fn should_signal(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        let old = self.signalled_used;
        if old == self.next_used {
            return Ok(false);
        }
        self.signalled_used = self.next_used;
        // The used index is visible before the guest's wish is read; the guest does it in the other order.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let used_event = load(memory, self.addresses.available, HEADER_LEN + 2 * u64::from(self.size))?;
            return Ok(self.next_used - Wrapping(used_event) - Wrapping(1) < self.next_used - old);
        }
        Ok(load(memory, self.addresses.available, 0)? & AVAIL_NO_INTERRUPT == 0)
    }

    pub(crate) fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        if self.event_idx {
            self.store_avail_event(memory)?;
        } else {
            self.store_used_flags(memory, 0)?;
        }
        // The wish is visible before the index is read; the guest does it in the other order.
        fence(Ordering::SeqCst);
        self.has_available(memory)
    }

    pub(crate) fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        // With event indices, one that is not moved on asks for no kick.
        if self.event_idx { Ok(()) } else { self.store_used_flags(memory, USED_NO_NOTIFY) }
    }

    fn store_avail_event(&self, memory: &GuestMemory) -> Result<(), RingError> {
        let at = self.addresses.used.unchecked_add(self.avail_event_offset());
        memory.map().store(self.next_avail.0.to_le(), at, Ordering::Relaxed)?;
        Ok(())
    }

    fn store_used_flags(&self, memory: &GuestMemory, flags: u16) -> Result<(), RingError> {
        memory.map().store(flags.to_le(), self.addresses.used, Ordering::Relaxed)?;
        Ok(())
    }
}

fn load(memory: &GuestMemory, ring: GuestAddress, offset: u64) -> Result<u16, RingError> {
    Ok(u16::from_le(memory.map().load(ring.unchecked_add(offset), Ordering::Acquire)?))
}
