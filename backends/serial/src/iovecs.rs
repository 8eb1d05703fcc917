//! The buffers of one chain as the kernel is given them: where in this process they are.
//!
//! Invariant: each entry lies in guest memory, which it keeps mapped.
#![expect(unsafe_code, reason = "guest memory is written and read by its address here")]

use std::sync::Arc;

use cleave_runtime::{GuestMemory, Segment};
use vm_memory::GuestMemoryError;

/// Most entries that a kernel takes at once (UIO_MAXIOV).
const MAX_ENTRIES: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum IovecError {
    #[error("a buffer is outside of memory: {0}")]
    OutsideMemory(#[from] GuestMemoryError),
    #[error("more than {MAX_ENTRIES} buffers")]
    TooMany,
}

#[derive(Debug)]
pub(crate) struct Iovecs {
    _memory: Arc<GuestMemory>,
    entries: Vec<libc::iovec>,
    /// Entries that have been taken away.
    skipped: usize,
    /// Bytes that are left.
    len: usize,
}

// SAFETY: the entries point to memory that is shared with other processes anyway, and that `_memory` keeps mapped whichever
// thread has them.
unsafe impl Send for Iovecs {}

impl Iovecs {
    pub(crate) fn new(memory: Arc<GuestMemory>, segments: &[Segment]) -> Result<Self, IovecError> {
        let mut entries = Vec::new();
        let mut len = 0;
        for segment in segments.iter().filter(|segment| segment.len != 0) {
            for slice in memory.slices(segment.addr, segment.len as usize) {
                let slice = slice?;
                if entries.len() == MAX_ENTRIES {
                    return Err(IovecError::TooMany);
                }
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                entries.push(libc::iovec { iov_base, iov_len: slice.len() });
                // A chain has less than 4 GiB.
                len += slice.len();
            }
        }
        Ok(Self { _memory: memory, entries, skipped: 0, len })
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn entries(&self) -> &[libc::iovec] {
        &self.entries[self.skipped..]
    }

    /// Takes away the first `count` bytes.
    pub(crate) fn advance(&mut self, mut count: usize) {
        while let Some(entry) = self.entries.get_mut(self.skipped).filter(|_| count != 0) {
            let part = count.min(entry.iov_len);
            // SAFETY: `part` bytes on, or one past the end, the entry is still inside its memory.
            entry.iov_base = unsafe { entry.iov_base.cast::<u8>().add(part) }.cast();
            entry.iov_len -= part;
            count -= part;
            self.len -= part;
            if entry.iov_len == 0 {
                self.skipped += 1;
            }
        }
    }

    /// Copies all of it through `take`, some at a time.
    pub(crate) fn copy_out(&self, mut take: impl FnMut(&[u8])) {
        let mut room = [0; 4096];
        for entry in self.entries() {
            for at in (0..entry.iov_len).step_by(room.len()) {
                let part = room.len().min(entry.iov_len - at);
                // SAFETY: `part` bytes from `at` on are inside the entry. Whatever the guest writes there meanwhile are
                // bytes, too.
                unsafe {
                    let from = entry.iov_base.cast::<u8>().add(at);
                    std::ptr::copy_nonoverlapping(from, room.as_mut_ptr(), part);
                }
                take(&room[..part]);
            }
        }
    }

    /// Copies `bytes` to the start, as far as there is room; says how much that is.
    pub(crate) fn copy_in(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for entry in self.entries() {
            let part = entry.iov_len.min(bytes.len() - done);
            // SAFETY: `part` bytes are inside the entry, and `bytes` has as many from `done` on.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), entry.iov_base.cast::<u8>(), part);
            }
            done += part;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use cleave_common::vhost_user::MemoryRegion;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::GuestAddress;

    use super::*;

    /// Two regions of a page with a hole between.
    fn memory() -> Arc<GuestMemory> {
        let fd = || {
            let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&fd, 4096).unwrap();
            fd
        };
        let region = |guest_addr| MemoryRegion {
            guest_addr,
            size: 4096,
            user_addr: 0x10_0000 + guest_addr,
            mmap_offset: 0,
        };
        let regions = [region(0), region(0x2000)];
        Arc::new(GuestMemory::from_table(&regions, vec![fd(), fd()]).unwrap())
    }

    fn segment(addr: u64, len: u32) -> Segment {
        Segment { addr: GuestAddress(addr), len }
    }

    #[test]
    fn bytes_go_in_and_out_in_order_and_are_taken_from_the_front() {
        let segments = [segment(10, 3), segment(0x2100, 0), segment(0x2200, 5), segment(100, 2)];
        let mut iovecs = Iovecs::new(memory(), &segments).unwrap();
        assert_eq!((iovecs.len(), iovecs.entries().len()), (10, 3));
        assert_eq!(iovecs.copy_in(b"0123456789abc"), 10);
        for taken in 0..=10 {
            let mut rest = Vec::new();
            iovecs.copy_out(|part| rest.extend_from_slice(part));
            assert_eq!(rest, b"0123456789"[taken..]);
            assert_eq!(iovecs.len(), 10 - taken);
            iovecs.advance(1);
        }
        iovecs.advance(7);
        assert!(iovecs.entries().is_empty());
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        for bad in [segment(0xfff, 2), segment(0x1800, 1), segment(u64::MAX, 8)] {
            assert!(Iovecs::new(memory(), &[segment(0, 4), bad]).is_err());
        }
        let many = vec![segment(0, 1); MAX_ENTRIES + 1];
        assert!(matches!(Iovecs::new(memory(), &many), Err(IovecError::TooMany)));
    }
}
