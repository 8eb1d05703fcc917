//! The log of guest pages that this backend has written (vhost-user, "Migration").
//!
//! One bit for each 4 KiB of guest-physical address space from 0, in memory that the frontend shares and reads while it
//! copies a running guest. A bit is set after its page was written: the frontend takes the bit first and the page then, so
//! that one that was set before the write would be lost.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering, fence};

use cleave_common::vhost_user::LogBase;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, VolatileMemory};

use crate::shared::{SharedError, map_sealed};

/// VHOST_LOG_PAGE.
const PAGE: u64 = 4096;

#[derive(Debug)]
pub(crate) struct DirtyLog {
    bits: MmapRegion,
}

impl DirtyLog {
    /// SET_LOG_BASE.
    pub(crate) fn map(base: LogBase, fd: OwnedFd) -> Result<Self, SharedError> {
        Ok(Self { bits: map_sealed(fd, base.offset, base.size)? })
    }

    /// `len` bytes from `addr` have been written. Pages past the log's end have no bit.
    pub(crate) fn mark(&self, addr: GuestAddress, len: u64) {
        if len == 0 {
            return;
        }
        let last = addr.0.saturating_add(len - 1) / PAGE;
        let slice = self.bits.as_volatile_slice();
        // What was written is visible before its bit is looked at; the frontend does it in the other order.
        fence(Ordering::SeqCst);
        for page in addr.0 / PAGE..=last {
            let Ok(at) = usize::try_from(page / 8) else { return };
            let Ok(byte) = slice.get_atomic_ref::<AtomicU8>(at) else { return };
            let bit = 1 << (page % 8);
            // Most pages are written again and again: no need to take the cache line each time.
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }
}
