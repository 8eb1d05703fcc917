//! One request on its way: which bytes are still to move.

use std::io;

use io_uring::{opcode, squeue, types};

use super::range::{Range, RangeJob, RangeOp, Support, Zeroes};
use super::ring::IMAGE;
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

/// Room for one request, reused.
#[derive(Default)]
pub(super) struct Slot {
    work: Work,
    /// The kernel does not have it.
    parked: bool,
    buffers: Vec<libc::iovec>,
    /// The first of `buffers` that is not finished; it starts where the rest does.
    first: usize,
    remaining: usize,
    bounce: Option<Box<Bounce>>,
}

impl Slot {
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
            Work::Flush => opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Transfer(transfer) => {
                let transfer = *transfer;
                self.transfer_entry(transfer)
            }
            Work::Ranges(job) => job.entry(support, zeroes),
        }
    }

    fn transfer_entry(&mut self, Transfer { direction, offset }: Transfer) -> squeue::Entry {
        let rest = &self.buffers[self.first..];
        let (base, len) = match &mut self.bounce {
            Some(bounce) => {
                let len = bounce.len().min(self.remaining);
                if matches!(direction, Direction::Write { .. }) {
                    // SAFETY: the buffers are mapped until our event, and hold the `remaining` bytes.
                    unsafe { bounce.gather(rest, len) };
                }
                (bounce.as_mut_ptr(), len)
            }
            None => match rest {
                [] => (std::ptr::null_mut(), 0),
                [one] => (one.iov_base.cast(), one.iov_len),
                [..] => return vectored(direction, rest, offset),
            },
        };
        let len = u32::try_from(len).unwrap_or(MAX_LEN).min(MAX_LEN);
        match direction {
            Direction::Read => opcode::Read::new(IMAGE, base, len).offset(offset).build(),
            Direction::Write { durable } => {
                opcode::Write::new(IMAGE, base, len).offset(offset).rw_flags(durability(durable)).build()
            }
        }
    }

    /// Takes note of what the kernel says of the last entry. A slot whose work is done is free.
    pub(super) fn advance(&mut self, result: i32, support: &mut Support) -> Progress {
        let progress = match &mut self.work {
            Work::Transfer(transfer) => {
                let transfer = *transfer;
                self.moved(transfer, result)
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

    fn moved(&mut self, transfer: Transfer, result: i32) -> Progress {
        let moved = match result {
            // The file ends before its end: somebody cut it off under us.
            0 if self.remaining != 0 => return Progress::Done(Err(io::ErrorKind::UnexpectedEof.into())),
            0.. => (result as usize).min(self.remaining),
            _ if matches!(-result, libc::EINTR | libc::EAGAIN) => return Progress::More,
            _ => return Progress::of_error(io::Error::from_raw_os_error(-result), false),
        };
        self.work = Work::Transfer(Transfer { offset: transfer.offset + moved as u64, ..transfer });
        if let (Some(bounce), Direction::Read) = (&self.bounce, transfer.direction) {
            // SAFETY: the buffers are mapped until our event, and hold the `remaining` bytes.
            unsafe { bounce.scatter(&self.buffers[self.first..], moved) };
        }
        self.skip(moved);
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

fn vectored(direction: Direction, buffers: &[libc::iovec], offset: u64) -> squeue::Entry {
    // A chain is never longer than IOV_MAX.
    let count = buffers.len().min(libc::UIO_MAXIOV as usize) as u32;
    match direction {
        Direction::Read => opcode::Readv::new(IMAGE, buffers.as_ptr(), count).offset(offset).build(),
        Direction::Write { durable } => opcode::Writev::new(IMAGE, buffers.as_ptr(), count)
            .offset(offset)
            .rw_flags(durability(durable))
            .build(),
    }
}

pub(super) fn durability(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}
