//! Aligned memory for the few transfers whose own is not, and the copies to and from it.
#![expect(unsafe_code, reason = "copies to and from memory that a guest may write at the same time")]

/// Most bytes that one transfer moves through aligned memory at once.
pub(crate) const PIECE: usize = 128 << 10;

/// A buffer aligned for O_DIRECT.
#[derive(Debug)]
pub(crate) struct Bounce {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    pub(crate) fn new(len: usize, align: usize) -> Self {
        let memory = vec![0; len + align];
        let start = memory.as_ptr().align_offset(align);
        Self { memory, start, len }
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.memory[self.start..].as_mut_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Fills the first `len` bytes from `buffers`.
    ///
    /// # Safety
    /// `buffers` are mapped, and hold `len` bytes or more.
    pub(crate) unsafe fn gather(&mut self, buffers: &[libc::iovec], len: usize) {
        let mut to = &mut self.memory[self.start..self.start + len];
        for buffer in buffers {
            let n = to.len().min(buffer.iov_len);
            // SAFETY: `buffer` holds `iov_len` mapped bytes by the caller's word. A guest may change them meanwhile:
            // they are bytes, of which any mixture is written to its own disk.
            unsafe { std::ptr::copy_nonoverlapping(buffer.iov_base.cast::<u8>(), to.as_mut_ptr(), n) };
            to = &mut to[n..];
        }
    }

    /// Copies the first `len` bytes to `buffers`.
    ///
    /// # Safety
    /// `buffers` are mapped for writing, and hold `len` bytes or more.
    pub(crate) unsafe fn scatter(&self, buffers: &[libc::iovec], len: usize) {
        let mut from = &self.memory[self.start..self.start + len];
        for buffer in buffers {
            let n = from.len().min(buffer.iov_len);
            // SAFETY: as in `gather`, in the other direction.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), buffer.iov_base.cast::<u8>(), n) };
            from = &from[n..];
        }
    }
}
