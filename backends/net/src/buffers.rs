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

// SAFETY: the entries point into memory that `memory` keeps mapped, whichever thread holds this.
unsafe impl Send for GuestBuffers {}

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
        // Not the library's function: it would make this a place where the thread can be cancelled, with two atomic steps.
        let read = unsafe { libc::syscall(libc::SYS_readv, fd.as_raw_fd(), self.entries.as_ptr(), count) };
        self.entries.pop();
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Writes all of them.
    pub(crate) fn writev(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let fd = fd.as_raw_fd();
        // SAFETY: all entries are guest memory that `self.memory` keeps mapped.
        let written = unsafe {
            match &self.entries[..] {
                // The kernel need not fetch a list, nor check it: most frames are in one piece.
                [one] => libc::syscall(libc::SYS_write, fd, one.iov_base, one.iov_len),
                all => libc::syscall(libc::SYS_writev, fd, all.as_ptr(), all.len() as libc::c_int),
            }
        };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Writes `start`, and behind it all but the first `skip` bytes.
    pub(crate) fn writev_behind(&self, fd: BorrowedFd<'_>, start: &[u8], skip: usize) -> io::Result<usize> {
        // Room for all entries: there are no more, and a kernel takes these.
        let mut entries = Vec::with_capacity(self.entries.len() + 1);
        entries.push(libc::iovec { iov_base: start.as_ptr().cast_mut().cast(), iov_len: start.len() });
        self.each_part(skip, self.len.saturating_sub(skip), |_, place, len| {
            entries.push(libc::iovec { iov_base: place.cast(), iov_len: len });
        });
        // SAFETY: the first entry is `start`, which is only read; the others are guest memory that `self.memory` keeps mapped.
        let written = unsafe { libc::writev(fd.as_raw_fd(), entries.as_ptr(), entries.len() as libc::c_int) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Copies `len` bytes from `offset` on to `to_offset` in `to`, which is another guest's memory, or at least another
    /// mapping of it; as far as there are buffers on both sides.
    pub(crate) fn copy_to(&self, offset: usize, len: usize, to: &Self, to_offset: usize) {
        self.each_part(offset, len, |at, from, part| {
            to.each_part(to_offset + at, part, |inner, place, len| {
                // SAFETY: `from` has `part` bytes, of which `inner + len` are no more; `place` has `len`. Both are guest
                // memory that stays mapped, at different addresses, for each port maps its guest's anew. Whatever the
                // guests write there meanwhile are bytes, too.
                unsafe { std::ptr::copy_nonoverlapping(from.add(inner), place, len) };
            });
        });
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
