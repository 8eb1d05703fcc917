//! One part of a ring, found in guest memory once: when the ring starts, and not again with each access.
//!
//! Invariants: all of `start..start + len` is mapped for reading and writing as long as `memory` is held, which is as long
//! as the part is; `start` is aligned for every access; accesses are atomic, for the guest makes its own at the same time.
#![expect(unsafe_code, reason = "atomic accesses to memory that is shared with the guest")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use vm_memory::GuestAddress;

use crate::memory::GuestMemory;

#[derive(Debug)]
pub(super) struct RingPart {
    start: NonNull<u8>,
    /// Bytes.
    len: usize,
    _memory: Arc<GuestMemory>,
}

// SAFETY: it points to memory that is shared with other processes anyway, stays mapped whichever thread holds the part, and
// is accessed atomically only.
unsafe impl Send for RingPart {}

impl RingPart {
    /// `None`: it does not lie in one region of memory.
    pub(super) fn find(memory: &Arc<GuestMemory>, addr: GuestAddress, len: usize) -> Option<Self> {
        let start = NonNull::new(memory.slice(addr, len)?.ptr_guard_mut().as_ptr())?;
        Some(Self { start, len, _memory: memory.clone() })
    }

    /// # Panics
    /// When the access is misaligned, or reaches past the part's end: offsets are never the guest's to choose.
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.len, "an access at {offset} of {} bytes", self.len);
        let place = self.start.as_ptr().wrapping_add(offset).cast::<T>();
        assert!(place.is_aligned(), "an access at {place:?}");
        place
    }

    /// What is read after this was written no earlier than what is read by this.
    pub(super) fn load(&self, offset: usize) -> u16 {
        // SAFETY: mapped and aligned by `at`, and only ever accessed atomically on this side.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.at(offset)) }.load(Ordering::Acquire))
    }

    /// What was written before this can be read by whoever reads this.
    pub(super) fn store(&self, offset: usize, value: u16) {
        // SAFETY: as in `load`.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }.store(value.to_le(), Ordering::Release);
    }

    /// In any order with what else is written, before the next [`RingPart::store`].
    pub(super) fn put(&self, offset: usize, value: u32) {
        // SAFETY: as in `load`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }.store(value.to_le(), Ordering::Relaxed);
    }
}
