//! Discarding, and writing zeroes: by the cheapest way that the file and its file system know.
//!
//! ```text
//!   discard:             BLKDISCARD (devices) -> punch a hole -> nothing: it is advice
//!   zeroes, may unmap:   punch a hole -> zero the range -> write zeroes
//!   zeroes:              zero the range -> write zeroes
//! ```
//!
//! What turns out not to be supported is not tried again.

use std::io;
use std::os::raw::c_int;

use io_uring::{opcode, squeue, types};

use super::transfer::{Progress, durability};
use crate::bounce::{Bounce, PIECE};

/// A piece of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Bytes from the image's start, a multiple of its logical block.
    pub offset: u64,
    /// Bytes, a multiple of the logical block.
    pub len: u64,
}

/// What to do to ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeOp {
    /// Their content is no longer needed: they read as anything afterwards. Advice, which never fails for lack of support.
    Discard,
    /// They read as zeroes afterwards.
    WriteZeroes {
        /// They may be left without storage of their own.
        unmap: bool,
        /// Complete only once the zeroes are on the disk.
        durable: bool,
    },
}

/// One way to do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    BlockDiscard,
    Punch,
    Zero,
    Write,
    /// Nothing is left to try.
    Nothing,
}

/// The image's file, and what it is known not to support.
#[derive(Debug)]
pub(super) struct Support {
    image: types::Fd,
    block_discard: bool,
    punch: bool,
    zero: bool,
}

impl Support {
    pub(super) fn new(image: types::Fd, is_device: bool) -> Self {
        Self { image, block_discard: is_device, punch: true, zero: true }
    }

    #[cfg(test)]
    pub(super) fn nothing(&mut self) {
        (self.block_discard, self.punch, self.zero) = (false, false, false);
    }

    pub(super) fn image(&self) -> types::Fd {
        self.image
    }

    fn has(&self, method: Method) -> bool {
        match method {
            Method::BlockDiscard => self.block_discard,
            Method::Punch => self.punch,
            Method::Zero => self.zero,
            Method::Write | Method::Nothing => true,
        }
    }

    fn lacks(&mut self, method: Method) {
        match method {
            Method::BlockDiscard => self.block_discard = false,
            Method::Punch => self.punch = false,
            Method::Zero => self.zero = false,
            Method::Write | Method::Nothing => {}
        }
    }
}

/// Zeroes to write, aligned for O_DIRECT; made when they are first needed.
#[derive(Default)]
pub(super) struct Zeroes(Option<Bounce>);

impl Zeroes {
    fn as_ptr(&mut self) -> *const u8 {
        self.0.get_or_insert_with(|| Bounce::new(PIECE, 4096)).as_mut_ptr()
    }
}

/// One request on its way.
#[derive(Debug)]
pub(super) struct RangeJob {
    op: RangeOp,
    /// What is left, the first in part.
    ranges: Vec<Range>,
    first: usize,
    method: Method,
    syncing: bool,
}

impl RangeJob {
    pub(super) fn new(op: RangeOp, ranges: Vec<Range>) -> Self {
        Self { op, ranges, first: 0, method: preferred(op), syncing: false }
    }

    /// What to hand to the kernel next, until there is nothing to do any more.
    pub(super) fn entry(&mut self, support: &Support, zeroes: &mut Zeroes) -> squeue::Entry {
        while !support.has(self.method) {
            self.method = next_method(self.op, self.method);
        }
        while self.ranges.get(self.first).is_some_and(|range| range.len == 0) {
            self.first += 1;
        }
        let Some(Range { offset, len }) = self.ranges.get(self.first).copied() else {
            self.syncing = matches!(self.op, RangeOp::WriteZeroes { durable: true, .. });
            return match self.syncing {
                true => opcode::Fsync::new(support.image()).flags(types::FsyncFlags::DATASYNC).build(),
                false => opcode::Nop::new().build(),
            };
        };
        let fallocate =
            |mode: c_int| opcode::Fallocate::new(support.image(), len).offset(offset).mode(mode).build();
        match self.method {
            Method::BlockDiscard => {
                let mut cmd = [0; 16];
                cmd[..8].copy_from_slice(&len.to_ne_bytes());
                opcode::UringCmd16::new(support.image(), BLOCK_URING_CMD_DISCARD)
                    .addr(Some(offset))
                    .cmd(cmd)
                    .build()
            }
            Method::Punch => fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Method::Zero => fallocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
            Method::Write => {
                let durable = matches!(self.op, RangeOp::WriteZeroes { durable: true, .. });
                opcode::Write::new(support.image(), zeroes.as_ptr(), len.min(PIECE as u64) as u32)
                    .offset(offset)
                    .rw_flags(durability(durable))
                    .build()
            }
            Method::Nothing => opcode::Nop::new().build(),
        }
    }

    /// The range to go on with.
    pub(super) fn next_range(&mut self) -> Option<(RangeOp, Range)> {
        while self.ranges.get(self.first).is_some_and(|range| range.len == 0) {
            self.first += 1;
        }
        self.ranges.get(self.first).map(|range| (self.op, *range))
    }

    /// That range is done with.
    pub(super) fn range_done(&mut self) {
        self.first += 1;
    }

    /// Takes note of what the kernel says of the last entry.
    pub(super) fn advance(&mut self, result: i32, support: &mut Support) -> Progress {
        if result < 0 {
            return self.failed(-result, support);
        }
        let Some(range) = self.ranges.get_mut(self.first) else { return Progress::Done(Ok(())) };
        let moved = match self.method {
            Method::Write if result == 0 => return Progress::Done(Err(io::ErrorKind::WriteZero.into())),
            Method::Write => range.len.min(result as u64),
            _ => range.len,
        };
        range.offset += moved;
        range.len -= moved;
        let durable = matches!(self.op, RangeOp::WriteZeroes { durable: true, .. });
        let all_done = self.ranges[self.first..].iter().all(|range| range.len == 0);
        if all_done && !durable { Progress::Done(Ok(())) } else { Progress::More }
    }

    fn failed(&mut self, errno: i32, support: &mut Support) -> Progress {
        let error = io::Error::from_raw_os_error(errno);
        if matches!(errno, libc::EINTR | libc::EAGAIN) {
            return Progress::More;
        }
        // A failed fsync has forgotten what it failed for: another one would succeed without reason.
        if self.syncing || self.method == Method::Write {
            return Progress::of_error(error, self.syncing);
        }
        match errno {
            libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV => support.lacks(self.method),
            // Kernels before 6.12 know no such command; file systems differ about ranges.
            libc::EINVAL if self.method == Method::BlockDiscard => support.lacks(self.method),
            libc::EINVAL => {}
            _ => return Progress::of_error(error, false),
        }
        self.method = next_method(self.op, self.method);
        Progress::More
    }
}

fn preferred(op: RangeOp) -> Method {
    match op {
        RangeOp::Discard => Method::BlockDiscard,
        RangeOp::WriteZeroes { unmap: true, .. } => Method::Punch,
        RangeOp::WriteZeroes { unmap: false, .. } => Method::Zero,
    }
}

fn next_method(op: RangeOp, method: Method) -> Method {
    match (op, method) {
        (RangeOp::Discard, Method::BlockDiscard) => Method::Punch,
        (RangeOp::Discard, _) => Method::Nothing,
        (RangeOp::WriteZeroes { .. }, Method::Punch) => Method::Zero,
        (RangeOp::WriteZeroes { .. }, _) => Method::Write,
    }
}

/// `_IO(0x12, 0)` of linux/blkdev.h: BLKDISCARD as a ring command.
const BLOCK_URING_CMD_DISCARD: u32 = 0x12 << 8;
