//! One request on its way: which bytes are still to move.

use std::io;

use io_uring::{opcode, squeue, types};

use super::DiskId;
use super::range::{Range, RangeJob, RangeOp, Support, Zeroes};
use crate::bounce::{Bounce, PIECE};

/// What to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// From the image to memory, or from memory to the image.
    pub direction: Direction,
    /// Bytes from the image's start.
    pub offset: u64,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Read,
    Write {
        /// Complete only once the bytes are on the disk.
        durable: bool,
    },
}

impl Transfer {
    pub fn read(offset: u64) -> Self {
        Self { direction: Direction::Read, offset }
    }

    pub fn write(offset: u64, durable: bool) -> Self {
        Self { direction: Direction::Write { durable }, offset }
    }
}

#[derive(Debug, Default)]
enum Work {
    #[default]
    Free,
    Flush,
    Transfer(Transfer),
    Ranges(Box<RangeJob>),
}

pub(super) enum Progress {
    /// Submit the rest.
    More,
    /// There is no room for it now. The rest may be submitted again.
    Full(io::Error),
    Done(io::Result<()>),
}

impl Progress {
    /// `last`: trying again would not do the same again.
    pub(super) fn of_error(error: io::Error, last: bool) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) if !last => Self::Full(error),
            _ => Self::Done(Err(error)),
        }
    }
}

/// Where the next bytes of a request are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) file: types::Fd,
    /// Bytes from the file's start.
    pub(super) offset: u64,
    /// Bytes that are there.
    pub(super) len: usize,
}

/// Room for one request, reused.
#[derive(Default)]
pub(super) struct Slot {
    work: Work,
    /// Which image it is for.
    disk: DiskId,
    /// The kernel does not have it.
    parked: bool,
    buffers: Vec<libc::iovec>,
    /// The first of `buffers` that is not finished; it starts where the rest does.
    first: usize,
    remaining: usize,
    bounce: Option<Box<Bounce>>,
    /// The buffers of a part of the rest, while the kernel has them.
    part: Vec<libc::iovec>,
}

impl Slot {
    pub(super) fn disk(&self) -> DiskId {
        self.disk
    }

    /// What begins next is for `disk`.
    pub(super) fn aim(&mut self, disk: DiskId) {
        self.disk = disk;
    }

    pub(super) fn is_busy(&self) -> bool {
        !matches!(self.work, Work::Free)
    }

    pub(super) fn is_parked(&self) -> bool {
        self.is_busy() && self.parked
    }

    pub(super) fn set_parked(&mut self, parked: bool) {
        self.parked = parked;
    }

    /// Bytes of aligned memory it holds.
    pub(super) fn bounced(&self) -> usize {
        self.bounce.as_ref().map_or(0, |bounce| bounce.len())
    }

    pub(super) fn begin_flush(&mut self) {
        (self.work, self.parked) = (Work::Flush, true);
    }

    pub(super) fn begin_ranges(&mut self, op: RangeOp, ranges: Vec<Range>) {
        (self.work, self.parked) = (Work::Ranges(Box::new(RangeJob::new(op, ranges))), true);
    }

    pub(super) fn begin(
        &mut self,
        transfer: Transfer,
        buffers: impl IntoIterator<Item = libc::iovec>,
        (memory_align, len_align): (usize, usize),
    ) {
        (self.work, self.parked) = (Work::Transfer(transfer), true);
        self.buffers.clear();
        self.buffers.extend(buffers.into_iter().filter(|buffer| buffer.iov_len != 0));
        self.first = 0;
        self.remaining = self.buffers.iter().map(|buffer| buffer.iov_len).sum();
        let misaligned = self.buffers.iter().any(|buffer| {
            !buffer.iov_base.addr().is_multiple_of(memory_align) || !buffer.iov_len.is_multiple_of(len_align)
        });
        // O_DIRECT takes whole blocks at aligned addresses only; Linux guests never need more.
        self.bounce = misaligned
            .then(|| Box::new(Bounce::new(self.remaining.min(PIECE), memory_align.max(len_align).max(4096))));
    }

    /// What to hand to the kernel next.
    pub(super) fn entry(&mut self, support: &Support, zeroes: &mut Zeroes) -> squeue::Entry {
        match &mut self.work {
            Work::Free => opcode::Nop::new().build(),
            Work::Flush => opcode::Fsync::new(support.image()).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Transfer(transfer) => {
                let Transfer { direction, offset } = *transfer;
                self.transfer_entry(direction, Target { file: support.image(), offset, len: self.remaining })
            }
            Work::Ranges(job) => job.entry(support, zeroes),
        }
    }

    /// What to hand to the kernel next of a transfer, of what is at `target`.
    pub(super) fn entry_at(&mut self, target: Target) -> squeue::Entry {
        match self.work {
            Work::Transfer(transfer) => self.transfer_entry(transfer.direction, target),
            _ => opcode::Fsync::new(target.file).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    /// What is to move, and how many bytes of it are left.
    pub(super) fn rest(&self) -> Option<(Transfer, usize)> {
        match self.work {
            Work::Transfer(transfer) => Some((transfer, self.remaining)),
            _ => None,
        }
    }

    /// What is to be done to a range, and what is left of it.
    pub(super) fn next_range(&mut self) -> Option<(RangeOp, Range)> {
        match &mut self.work {
            Work::Ranges(job) => job.next_range(),
            _ => None,
        }
    }

    pub(super) fn is_flush(&self) -> bool {
        matches!(self.work, Work::Flush)
    }

    fn transfer_entry(&mut self, direction: Direction, target: Target) -> squeue::Entry {
        let limit = target.len.min(self.remaining);
        let rest = &self.buffers[self.first..];
        let (base, len) = match &mut self.bounce {
            Some(bounce) => {
                let len = bounce.len().min(limit);
                if matches!(direction, Direction::Write { .. }) {
                    // SAFETY: the buffers are mapped until our event, and hold the `remaining` bytes.
                    unsafe { bounce.gather(rest, len) };
                }
                (bounce.as_mut_ptr(), len)
            }
            None => match rest {
                [] => (std::ptr::null_mut(), 0),
                [one, ..] if one.iov_len >= limit => (one.iov_base.cast(), limit),
                [..] if limit == self.remaining => return vectored(direction, rest, target),
                [..] => {
                    self.part.clear();
                    self.part.extend(first_bytes(rest, limit));
                    return vectored(direction, &self.part, target);
                }
            },
        };
        let len = u32::try_from(len).unwrap_or(MAX_LEN).min(MAX_LEN);
        match direction {
            Direction::Read => opcode::Read::new(target.file, base, len).offset(target.offset).build(),
            Direction::Write { durable } => opcode::Write::new(target.file, base, len)
                .offset(target.offset)
                .rw_flags(durability(durable))
                .build(),
        }
    }

    /// The next `len` bytes read as zeros.
    pub(super) fn fill_zeros(&mut self, len: usize) {
        let len = len.min(self.remaining);
        for buffer in first_bytes(&self.buffers[self.first..], len) {
            // SAFETY: the buffers are mapped until our event. A guest may change them meanwhile: it sees what it did.
            unsafe { std::ptr::write_bytes(buffer.iov_base.cast::<u8>(), 0, buffer.iov_len) };
        }
        self.skip_over(len);
    }

    /// The buffers of the next `len` bytes.
    pub(super) fn next_buffers(&self, len: usize) -> Vec<libc::iovec> {
        first_bytes(&self.buffers[self.first..], len.min(self.remaining)).collect()
    }

    /// `len` more bytes are where they belong, or a range is as it is to be.
    pub(super) fn moved(&mut self, len: usize) {
        match &mut self.work {
            Work::Ranges(job) => job.range_done(),
            _ => self.skip_over(len),
        }
    }

    fn skip_over(&mut self, len: usize) {
        if let Work::Transfer(transfer) = &mut self.work {
            transfer.offset += len as u64;
        }
        self.skip(len);
    }

    /// Takes note of what the kernel says of the last entry. A slot whose work is done is free.
    pub(super) fn advance(&mut self, result: i32, support: &mut Support) -> Progress {
        let progress = match &mut self.work {
            Work::Transfer(transfer) => {
                let transfer = *transfer;
                self.kernel_moved(transfer, result)
            }
            Work::Ranges(job) => job.advance(result, support),
            Work::Free | Work::Flush if result < 0 => {
                Progress::Done(Err(io::Error::from_raw_os_error(-result)))
            }
            Work::Free | Work::Flush => Progress::Done(Ok(())),
        };
        if matches!(progress, Progress::Done(_)) {
            self.free();
        }
        progress
    }

    fn kernel_moved(&mut self, transfer: Transfer, result: i32) -> Progress {
        let moved = match result {
            // The file ends before its end: somebody cut it off under us.
            0 if self.remaining != 0 => return Progress::Done(Err(io::ErrorKind::UnexpectedEof.into())),
            0.. => (result as usize).min(self.remaining),
            _ if matches!(-result, libc::EINTR | libc::EAGAIN) => return Progress::More,
            _ => return Progress::of_error(io::Error::from_raw_os_error(-result), false),
        };
        if let (Some(bounce), Direction::Read) = (&self.bounce, transfer.direction) {
            // SAFETY: the buffers are mapped until our event, and hold the `remaining` bytes.
            unsafe { bounce.scatter(&self.buffers[self.first..], moved) };
        }
        self.skip_over(moved);
        if self.remaining == 0 { Progress::Done(Ok(())) } else { Progress::More }
    }

    /// Gives up what is left to do.
    pub(super) fn free(&mut self) {
        self.work = Work::Free;
        self.bounce = None;
    }

    fn skip(&mut self, mut bytes: usize) {
        self.remaining -= bytes;
        while bytes != 0 {
            let buffer = &mut self.buffers[self.first];
            let n = bytes.min(buffer.iov_len);
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(n);
            buffer.iov_len -= n;
            bytes -= n;
            if buffer.iov_len == 0 {
                self.first += 1;
            }
        }
    }
}

/// Whole blocks below what one system call moves at most (2 GiB less a page).
const MAX_LEN: u32 = 1 << 30;

fn vectored(direction: Direction, buffers: &[libc::iovec], target: Target) -> squeue::Entry {
    // A chain is never longer than IOV_MAX.
    let count = buffers.len().min(libc::UIO_MAXIOV as usize) as u32;
    match direction {
        Direction::Read => {
            opcode::Readv::new(target.file, buffers.as_ptr(), count).offset(target.offset).build()
        }
        Direction::Write { durable } => opcode::Writev::new(target.file, buffers.as_ptr(), count)
            .offset(target.offset)
            .rw_flags(durability(durable))
            .build(),
    }
}

/// The first `len` bytes of `buffers`.
fn first_bytes(buffers: &[libc::iovec], mut len: usize) -> impl Iterator<Item = libc::iovec> {
    buffers.iter().map_while(move |buffer| {
        let now = buffer.iov_len.min(len);
        len -= now;
        (now != 0).then_some(libc::iovec { iov_base: buffer.iov_base, iov_len: now })
    })
}

pub(super) fn durability(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}
