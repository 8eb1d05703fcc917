//! What a successor has to know: which part of a chain has gone already, and what the driver has been told. It is in a page
//! that the frontend keeps beside the requests in flight, or, where it keeps none, in one that dies with this process.
//!
//! ```text
//!   a call:  none --base, queue--> pending --the kernel writes the count--> pending, counted --record--> none
//! ```
//!
//! **Bytes leave once.** A process that is killed just behind `write` has no chance to note how much was written. So for
//! sockets the kernel notes it: `sendmmsg` and `recvmmsg` store each message's count before they return, and no signal
//! comes between (net/socket.c). The struct that they store it in has its last field, the count, on the first bytes of the
//! kept page, and all that is before on the last bytes of a private one, for nobody who shares memory with us is to choose
//! what the kernel reads and writes here. A file that is only appended to says by its length what was written. Other ends
//! (terminals, pipes) say nothing: what was being written when the process was killed is written again.
//!
//! Invariants: one call is pending at most; wherever this process dies, [`Kept::adopt`] makes the same record of it; what is
//! in the page decides nothing but how much of a chain is skipped, and that is checked against the chain.
#![expect(unsafe_code, reason = "two mappings side by side, and calls of which libc has no safe form")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use cleave_common::port::MAX_PORTS;
use cleave_runtime::QueueIndex;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Bytes of a page.
const PAGE: usize = 4096;

/// The layout's version; 0 is a page that nobody has used.
const VERSION: u32 = 1;

/// Places in the page.
const COUNT: usize = 0;
const PENDING: usize = 4;
const BASE: usize = 8;
const KIND: usize = 12;
const POSITION: usize = 16;
const VERSION_AT: usize = 24;
const BITS: usize = 64;
const RECORDS: usize = 256;
/// Bytes of a record.
const RECORD: usize = 8;

/// Of a pending call: who counts what it does.
const BY_KERNEL: u32 = 1;
const BY_FILE: u32 = 2;

/// Queues that have a record.
const MAX_QUEUES: usize = 2 * (MAX_PORTS as usize + 1);
const _: () =
    assert!(RECORDS + RECORD * MAX_QUEUES <= PAGE && BITS + 4 * (MAX_PORTS as usize + 1) <= RECORDS);
const _: () = assert!(size_of::<libc::msghdr>() == std::mem::offset_of!(libc::mmsghdr, msg_len));

#[derive(Debug)]
pub(crate) struct Kept {
    /// A private page, and behind it the kept one.
    pages: NonNull<u8>,
}

// SAFETY: the pages stay mapped until it is dropped, whichever thread has it; the kept one is accessed atomically only.
unsafe impl Send for Kept {}

impl Kept {
    /// Bytes that a frontend is to keep.
    pub(crate) const LEN: u64 = PAGE as u64;

    /// One that dies with this process.
    pub(crate) fn private() -> io::Result<Self> {
        // SAFETY: a new mapping, which nothing else knows of.
        let pages = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                2 * PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let pages = NonNull::new(pages.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { pages })
    }

    /// Goes on in the page that `kept` names. If nobody has used it, what is known here moves there; else what is there
    /// counts, and `length` says how long the file of a queue's port is now.
    pub(crate) fn adopt(
        &mut self,
        kept: &cleave_runtime::Kept,
        length: impl FnOnce(QueueIndex) -> Option<u64>,
    ) -> io::Result<()> {
        let new = Self::private()?;
        let at = new.pages.as_ptr().wrapping_add(PAGE).cast::<c_void>();
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: it replaces the second page of a mapping that is ours alone. The file cannot shrink below it.
        unsafe { mmap(at, PAGE, ProtFlags::READ | ProtFlags::WRITE, flags, kept.fd.as_fd(), kept.offset) }?;
        if new.word(VERSION_AT).load(Ordering::Acquire) == VERSION {
            new.settle(length);
        } else {
            // No call is pending between two of this thread's.
            for at in (BITS..PAGE).step_by(4) {
                new.store(at, self.load(at));
            }
            new.store(PENDING, 0);
            new.store(VERSION_AT, VERSION);
        }
        *self = new;
        Ok(())
    }

    /// Whether there is something of a predecessor's, or our own.
    pub(crate) fn bits(&self) -> Vec<u32> {
        (0..=MAX_PORTS as usize).map(|at| self.load(BITS + 4 * at)).collect()
    }

    /// The flags of all ports, of which there are at most [`MAX_PORTS`], and of the driver.
    pub(crate) fn set_bits(&self, bits: impl IntoIterator<Item = u32>) {
        let places = (BITS..RECORDS).step_by(4).take(MAX_PORTS as usize + 1);
        for (at, bits) in places.zip(bits) {
            if self.load(at) != bits {
                self.store(at, bits);
            }
        }
    }

    /// The chain of `queue` of which some has gone, by its head, and how many bytes of it.
    pub(crate) fn record(&self, queue: QueueIndex) -> Option<(u16, u32)> {
        let at = record(queue)?;
        let head = self.load(at).checked_sub(1)?;
        Some((u16::try_from(head).ok()?, self.load(at + 4)))
    }

    /// The chain of `head` is the one that is being served, `done` bytes of it.
    pub(crate) fn set_record(&self, queue: QueueIndex, head: u16, done: u32) {
        let Some(at) = record(queue) else { return };
        self.store(at, 0);
        self.store(at + 4, done);
        self.store(at, u32::from(head) + 1);
    }

    /// No chain is.
    pub(crate) fn clear_record(&self, queue: QueueIndex) {
        if let Some(at) = record(queue) {
            self.store(at, 0);
        }
    }

    fn set_done(&self, queue: QueueIndex, done: u32) {
        if let Some(at) = record(queue) {
            self.store(at + 4, done);
        }
    }

    /// Sends `entries`, the chain of the queue's record from byte `base` on, to a socket, without waiting.
    pub(crate) fn send(
        &self,
        socket: BorrowedFd<'_>,
        queue: QueueIndex,
        base: u32,
        entries: &[libc::iovec],
    ) -> io::Result<usize> {
        self.begin(queue, base, BY_KERNEL, 0);
        let message = self.message(entries);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `message` is valid, its entries are guest memory that their owner keeps mapped.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), message, 1, flags) };
        self.end(queue, base, sent)
    }

    /// Receives into `entries`, the chain of the queue's record. 0: nothing more will come.
    pub(crate) fn receive(
        &self,
        socket: BorrowedFd<'_>,
        queue: QueueIndex,
        entries: &[libc::iovec],
    ) -> io::Result<usize> {
        self.begin(queue, 0, BY_KERNEL, 0);
        let message = self.message(entries);
        // SAFETY: as in `send`; nobody takes guest memory for memory of Rust's.
        let received = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), message, 1, libc::MSG_DONTWAIT, std::ptr::null_mut())
        };
        self.end(queue, 0, received)
    }

    /// Writes `entries` to an end that is no socket. `length`: of a file that this only appends to.
    pub(crate) fn write(
        &self,
        fd: BorrowedFd<'_>,
        queue: QueueIndex,
        base: u32,
        entries: &[libc::iovec],
        length: Option<u64>,
    ) -> io::Result<usize> {
        if let Some(length) = length {
            self.begin(queue, base, BY_FILE, length);
        }
        // SAFETY: the entries are guest memory that their owner keeps mapped.
        let written = unsafe { libc::writev(fd.as_raw_fd(), entries.as_ptr(), entries.len() as libc::c_int) };
        let written = usize::try_from(written).map_err(|_| io::Error::last_os_error());
        if let Ok(count) = written {
            self.set_done(queue, base + count as u32);
        }
        self.store(PENDING, 0);
        written
    }

    /// Reads from an end that is no socket. 0: nothing more will come.
    pub(crate) fn read(
        &self,
        fd: BorrowedFd<'_>,
        queue: QueueIndex,
        entries: &[libc::iovec],
    ) -> io::Result<usize> {
        // SAFETY: as in `receive`.
        let read = unsafe { libc::readv(fd.as_raw_fd(), entries.as_ptr(), entries.len() as libc::c_int) };
        let count = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        self.set_done(queue, count as u32);
        Ok(count)
    }

    fn begin(&self, queue: QueueIndex, base: u32, kind: u32, position: u64) {
        self.store(COUNT, 0);
        self.store(BASE, base);
        self.store(KIND, kind);
        self.position().store(position, Ordering::Release);
        self.store(PENDING, u32::from(queue.0) + 1);
    }

    /// `messages`: what the call gave back.
    fn end(&self, queue: QueueIndex, base: u32, messages: libc::c_int) -> io::Result<usize> {
        let error = io::Error::last_os_error();
        if messages != 1 {
            self.store(PENDING, 0);
            return Err(error);
        }
        let count = self.load(COUNT);
        self.set_done(queue, base.saturating_add(count));
        self.store(PENDING, 0);
        Ok(count as usize)
    }

    /// Makes a record of the call in which a predecessor died.
    fn settle(&self, length: impl FnOnce(QueueIndex) -> Option<u64>) {
        let queue = self.load(PENDING).checked_sub(1).and_then(|queue| u16::try_from(queue).ok());
        if let Some(queue) = queue.map(QueueIndex) {
            let count = match self.load(KIND) {
                BY_KERNEL => Some(self.load(COUNT)),
                BY_FILE => {
                    let before = self.position().load(Ordering::Acquire);
                    length(queue).and_then(|now| now.checked_sub(before)?.try_into().ok())
                }
                _ => None,
            };
            if let Some(count) = count {
                self.set_done(queue, self.load(BASE).saturating_add(count));
            }
        }
        self.store(PENDING, 0);
    }

    /// The message whose count is in the kept page.
    fn message(&self, entries: &[libc::iovec]) -> *mut libc::mmsghdr {
        let at = self.pages.as_ptr().wrapping_add(PAGE - size_of::<libc::msghdr>()).cast::<libc::msghdr>();
        // SAFETY: zeros are a valid msghdr; `at` is aligned for one, and it lies at the end of the private page.
        unsafe {
            let mut header: libc::msghdr = std::mem::zeroed();
            header.msg_iov = entries.as_ptr().cast_mut();
            header.msg_iovlen = entries.len();
            at.write(header);
        }
        at.cast()
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= PAGE, "an access at {at}");
        // SAFETY: inside the kept page, aligned, mapped as long as this is, and only ever accessed atomically by us.
        unsafe { AtomicU32::from_ptr(self.pages.as_ptr().wrapping_add(PAGE + at).cast()) }
    }

    fn position(&self) -> &AtomicU64 {
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.pages.as_ptr().wrapping_add(PAGE + POSITION).cast()) }
    }

    fn load(&self, at: usize) -> u32 {
        self.word(at).load(Ordering::Acquire)
    }

    /// In the order of the program: a process that is killed has done all before, and none after.
    fn store(&self, at: usize, value: u32) {
        self.word(at).store(value, Ordering::SeqCst);
    }
}

fn record(QueueIndex(queue): QueueIndex) -> Option<usize> {
    (usize::from(queue) < MAX_QUEUES).then_some(RECORDS + RECORD * usize::from(queue))
}

impl Drop for Kept {
    fn drop(&mut self) {
        // SAFETY: these two pages are ours, and nobody has a reference into them any more.
        let _ = unsafe { munmap(self.pages.as_ptr().cast(), 2 * PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    const QUEUE: QueueIndex = QueueIndex(5);

    fn page() -> cleave_runtime::Kept {
        let fd = memfd_create("kept", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 2 * Kept::LEN).unwrap();
        cleave_runtime::Kept { fd, offset: Kept::LEN }
    }

    fn in_page(page: &cleave_runtime::Kept) -> Kept {
        let mut kept = Kept::private().unwrap();
        kept.adopt(page, |_| Some(1000)).unwrap();
        kept
    }

    fn iovec(bytes: &mut [u8]) -> [libc::iovec; 1] {
        [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }]
    }

    #[test]
    fn the_kernel_counts_what_it_sends_and_receives_in_the_kept_page() {
        let page = page();
        let kept = in_page(&page);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        kept.set_record(QUEUE, 7, 100);
        assert_eq!(kept.send(ours.as_fd(), QUEUE, 100, &iovec(&mut [1, 2, 3])).unwrap(), 3);
        assert_eq!(kept.record(QUEUE), Some((7, 103)));
        // As if the process had died behind the call.
        kept.set_record(QUEUE, 7, 100);
        kept.store(PENDING, u32::from(QUEUE.0) + 1);
        let successor = in_page(&page);
        assert_eq!(successor.record(QUEUE), Some((7, 103)));
        assert_eq!(in_page(&page).record(QUEUE), Some((7, 103)), "once");
        let mut seen = [0; 3];
        theirs.read_exact(&mut seen).unwrap();
        assert_eq!(seen, [1, 2, 3]);
        // Nothing is there: nothing is counted.
        successor.set_record(QUEUE, 9, 0);
        let mut room = [0; 8];
        let error = successor.receive(ours.as_fd(), QUEUE, &iovec(&mut room)).unwrap_err();
        assert_eq!((error.kind(), successor.record(QUEUE)), (io::ErrorKind::WouldBlock, Some((9, 0))));
        rustix::io::write(&theirs, b"abcd").unwrap();
        assert_eq!(successor.receive(ours.as_fd(), QUEUE, &iovec(&mut room)).unwrap(), 4);
        assert_eq!((&room[..4], successor.record(QUEUE)), (&b"abcd"[..], Some((9, 4))));
        drop(theirs);
        assert_eq!(successor.receive(ours.as_fd(), QUEUE, &iovec(&mut room)).unwrap(), 0);
        successor.clear_record(QUEUE);
        assert_eq!(successor.record(QUEUE), None);
    }

    #[test]
    fn a_file_says_by_its_length_what_was_written_before_its_writer_died() {
        let page = page();
        let kept = in_page(&page);
        kept.set_record(QUEUE, 0, 10);
        // The length is 1000 now: of the 20 bytes, 15 have been written.
        kept.begin(QUEUE, 10, BY_FILE, 985);
        assert_eq!(in_page(&page).record(QUEUE), Some((0, 25)));
    }

    #[test]
    fn what_is_known_moves_into_a_fresh_page_and_whatever_is_in_a_used_one_is_taken() {
        let mut kept = Kept::private().unwrap();
        kept.set_bits([1, 2, 3]);
        kept.set_record(QUEUE, 65535, 1);
        let page = page();
        kept.adopt(&page, |_| None).unwrap();
        assert_eq!((kept.bits()[..4].to_vec(), kept.record(QUEUE)), (vec![1, 2, 3, 0], Some((65535, 1))));
        for value in [0u8, 0x7f, 0xff] {
            let mut bytes = [value; PAGE];
            bytes[VERSION_AT..VERSION_AT + 4].copy_from_slice(&VERSION.to_le_bytes());
            rustix::io::pwrite(&page.fd, &bytes, page.offset).unwrap();
            let kept = in_page(&page);
            kept.clear_record(QUEUE);
            assert_eq!((kept.record(QUEUE), kept.record(QueueIndex(9999))), (None, None));
        }
    }
}
