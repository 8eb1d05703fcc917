//! Guest memory as the kernel is given it: where in this process the buffers of one or more chains are.
//!
//! Invariants: an entry lies in memory that this keeps mapped; there are never more than [`MAX_BUFFERS`], so that a call
//! of the kernel's takes them all, and one more.
#![expect(unsafe_code, reason = "the kernel, and this module, write to guest memory by its address here")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use cleave_runtime::{GuestMemory, Segment};

/// Entries; a kernel takes 1024 (UIO_MAXIOV).
pub(crate) const MAX_BUFFERS: usize = 1023;

/// Why a chain cannot be handed to the kernel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BufferError {
    #[error("a buffer is outside of memory: {0}")]
    OutsideMemory(#[from] vm_memory::GuestMemoryError),
    #[error("more than {MAX_BUFFERS} buffers")]
    TooMany,
}

/// Buffers in guest memory, one behind the other.
pub(crate) struct GuestBuffers {
    memory: Arc<GuestMemory>,
    entries: Vec<libc::iovec>,
    /// Bytes.
    len: usize,
}

impl GuestBuffers {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, entries: Vec::new(), len: 0 }
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Pieces of memory in all.
    pub(crate) fn entries(&self) -> usize {
        self.entries.len()
    }

    /// Takes away the last `count` entries.
    pub(crate) fn drop_last(&mut self, count: usize) {
        let kept = self.entries.len() - count;
        self.len -= self.entries.drain(kept..).map(|entry| entry.iov_len).sum::<usize>();
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.len = 0;
    }

    /// Adds a chain's buffers, and says how many entries these are. When it fails, nothing is added.
    pub(crate) fn push(&mut self, segments: &[Segment]) -> Result<usize, BufferError> {
        let (entries, len) = (self.entries.len(), self.len);
        self.push_all(segments).inspect_err(|_| {
            self.entries.truncate(entries);
            self.len = len;
        })?;
        Ok(self.entries.len() - entries)
    }

    fn push_all(&mut self, segments: &[Segment]) -> Result<(), BufferError> {
        for segment in segments.iter().filter(|segment| segment.len != 0) {
            for slice in self.memory.slices(segment.addr, segment.len as usize) {
                let slice = slice?;
                if self.entries.len() == MAX_BUFFERS {
                    return Err(BufferError::TooMany);
                }
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                self.entries.push(libc::iovec { iov_base, iov_len: slice.len() });
                self.len += slice.len();
            }
        }
        Ok(())
    }

    /// Takes away the first `count` entries.
    pub(crate) fn consume(&mut self, count: usize) {
        self.len -= self.entries.drain(..count).map(|entry| entry.iov_len).sum::<usize>();
    }

    /// Reads into all of them, and what does not fit into `spill`.
    pub(crate) fn readv(&mut self, fd: BorrowedFd<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let last = libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() };
        self.entries.push(last);
        let count = self.entries.len() as libc::c_int;
        // SAFETY: all entries but the last are guest memory that `self.memory` keeps mapped, and that nobody takes for
        // memory of Rust's; the last one is `spill`, borrowed for as long as this takes.
        let read = unsafe { libc::readv(fd.as_raw_fd(), self.entries.as_ptr(), count) };
        self.entries.pop();
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Writes all of them.
    pub(crate) fn writev(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let count = self.entries.len() as libc::c_int;
        // SAFETY: all entries are guest memory that `self.memory` keeps mapped.
        let written = unsafe { libc::writev(fd.as_raw_fd(), self.entries.as_ptr(), count) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Writes `before`, and then all of them but the first `skipped` bytes.
    pub(crate) fn writev_behind(
        &self,
        fd: BorrowedFd<'_>,
        before: &[u8],
        skipped: usize,
    ) -> io::Result<usize> {
        let first = libc::iovec { iov_base: before.as_ptr().cast_mut().cast(), iov_len: before.len() };
        let mut entries = Vec::with_capacity(self.entries.len() + 1);
        entries.push(first);
        let mut skipped = skipped;
        for entry in &self.entries {
            let part = skipped.min(entry.iov_len);
            skipped -= part;
            if part < entry.iov_len {
                // SAFETY: `part` is inside the entry.
                let iov_base = unsafe { entry.iov_base.cast::<u8>().add(part) }.cast();
                entries.push(libc::iovec { iov_base, iov_len: entry.iov_len - part });
            }
        }
        let count = entries.len() as libc::c_int;
        // SAFETY: the first entry is `before`, which is only read and borrowed for as long as this takes; the others are
        // parts of guest memory that `self.memory` keeps mapped.
        let written = unsafe { libc::writev(fd.as_raw_fd(), entries.as_ptr(), count) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Copies `bytes` to `offset` bytes from the start, as far as there are buffers.
    pub(crate) fn write_at(&self, offset: usize, bytes: &[u8]) {
        self.each_part(offset, bytes.len(), |at, place, len| {
            // SAFETY: `place` has `len` bytes, guest memory that stays mapped; `bytes` has as many from `at` on. Whatever
            // the guest writes there meanwhile are bytes, too.
            unsafe { std::ptr::copy_nonoverlapping(bytes[at..at + len].as_ptr(), place, len) };
        });
    }

    /// Copies what is `offset` bytes from the start, as far as there are buffers; says how much that is.
    pub(crate) fn read_at(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        self.each_part(offset, bytes.len(), |at, place, len| {
            // SAFETY: as in `write_at`.
            unsafe { std::ptr::copy_nonoverlapping(place, bytes[at..at + len].as_mut_ptr(), len) };
            copied = at + len;
        });
        copied
    }

    /// Calls `copy` for each part of `len` bytes from `offset` on: where in these it is, where in memory, its length.
    fn each_part(&self, mut offset: usize, len: usize, mut copy: impl FnMut(usize, *mut u8, usize)) {
        let mut at = 0;
        for entry in &self.entries {
            if at == len {
                return;
            }
            if offset >= entry.iov_len {
                offset -= entry.iov_len;
                continue;
            }
            let part = (entry.iov_len - offset).min(len - at);
            // SAFETY: `offset` is inside the entry.
            copy(at, unsafe { entry.iov_base.cast::<u8>().add(offset) }, part);
            at += part;
            offset = 0;
        }
    }
}
