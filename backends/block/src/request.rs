//! What a descriptor chain asks of the disk (virtio 1.2, 5.2.6).
//!
//! A request is a 16-byte header and data to write, then data to read and one status byte. How these are cut into
//! buffers is the driver's business (virtio 1.2, 2.7.4), so nothing here assumes a buffer for each.

pub(crate) mod segments;

use std::fmt;

use cleave_runtime::{Chain, GuestMemory, Segment};
use vm_memory::{Address, GuestAddress};

/// Bytes of the header: type, a reserved word, sector.
const HEADER_LEN: usize = 16;

/// Bytes of the answer to GET_ID.
pub(crate) const ID_LEN: usize = 20;

const SECTOR: u64 = 512;

mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// The last byte of a request, as the driver reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Bytes from the disk's start.
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    /// Of the ranges that the data names: [`segments::read`].
    Discard,
    WriteZeroes,
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { offset } => write!(f, "a read at sector {}", offset / SECTOR),
            Self::Write { offset } => write!(f, "a write at sector {}", offset / SECTOR),
            Self::Flush => f.write_str("a flush"),
            Self::GetId => f.write_str("to be named"),
            Self::Discard => f.write_str("a discard"),
            Self::WriteZeroes => f.write_str("a write of zeroes"),
        }
    }
}

/// A chain that has room for a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) status: GuestAddress,
    /// Bytes between the header and the status, in the direction of the work.
    pub(crate) data_len: u32,
    /// What to do, or what is wrong with it.
    pub(crate) work: Result<Work, Status>,
}

/// A chain that cannot even be answered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unanswerable {
    #[error("the request has no room for its status, or has it outside of memory")]
    NoStatus,
    #[error("the request's header is cut off, or outside of memory")]
    NoHeader,
}

/// The disk, as far as a request can be right or wrong about it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes.
    pub(crate) len: u64,
    /// Bytes.
    pub(crate) logical_block: u32,
    pub(crate) read_only: bool,
}

impl Request {
    pub(crate) fn parse(chain: &Chain, memory: &GuestMemory, limits: &Limits) -> Result<Self, Unanswerable> {
        let status = last_byte(chain.writable()).filter(|addr| memory.slice(*addr, 1).is_some());
        let status = status.ok_or(Unanswerable::NoStatus)?;
        let header = read_header(chain.readable(), memory).ok_or(Unanswerable::NoHeader)?;
        let (kind, sector) = (
            u32::from_le_bytes([header[0], header[1], header[2], header[3]]),
            u64::from_le_bytes([
                header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15],
            ]),
        );
        // A chain holds 4 GiB at most, so that these fit.
        let out_len = total(chain.readable()) - HEADER_LEN as u32;
        let in_len = total(chain.writable()) - 1;
        let (data_len, work) = match kind {
            kind::IN => (in_len, limits.check(sector, in_len.into()).map(|offset| Work::Read { offset })),
            kind::OUT if limits.read_only => (out_len, Err(Status::IoErr)),
            kind::OUT => (out_len, limits.check(sector, out_len.into()).map(|offset| Work::Write { offset })),
            kind::FLUSH => (0, Ok(Work::Flush)),
            kind::GET_ID => (in_len, Ok(Work::GetId)),
            // Not offered on media that cannot be written.
            kind::DISCARD if !limits.read_only => (out_len, Ok(Work::Discard)),
            kind::WRITE_ZEROES if !limits.read_only => (out_len, Ok(Work::WriteZeroes)),
            _ => (0, Err(Status::Unsupported)),
        };
        Ok(Self { status, data_len, work })
    }

    /// The buffers of the data, in order: what remains of the chain without its header or status.
    pub(crate) fn data(chain: &Chain, work: Work) -> impl Iterator<Item = Segment> {
        let (segments, mut skip, mut left) = match work {
            Work::Write { .. } | Work::Discard | Work::WriteZeroes => {
                (chain.readable(), HEADER_LEN as u32, u32::MAX)
            }
            Work::Read { .. } | Work::GetId => (chain.writable(), 0, total(chain.writable()) - 1),
            Work::Flush => (&[][..], 0, 0),
        };
        segments.iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len);
            skip -= skipped;
            let len = (segment.len - skipped).min(left);
            left -= len;
            // An address that overflows is caught where it is looked up.
            let addr = GuestAddress(segment.addr.raw_value().wrapping_add(skipped.into()));
            (len != 0).then_some(Segment { addr, len })
        })
    }
}

impl Limits {
    /// The byte offset of `sector`, if `len` bytes from there are whole blocks of the disk.
    fn check(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let unit = u64::from(self.logical_block);
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
        let end = offset.checked_add(len).ok_or(Status::IoErr)?;
        if end > self.len || !offset.is_multiple_of(unit) || !len.is_multiple_of(unit) {
            return Err(Status::IoErr);
        }
        Ok(offset)
    }
}

fn total(segments: &[Segment]) -> u32 {
    segments.iter().map(|segment| segment.len).sum()
}

fn last_byte(writable: &[Segment]) -> Option<GuestAddress> {
    let last = writable.iter().rev().find(|segment| segment.len != 0)?;
    last.addr.checked_add(u64::from(last.len) - 1)
}

fn read_header(readable: &[Segment], memory: &GuestMemory) -> Option<[u8; HEADER_LEN]> {
    let mut header = [0; HEADER_LEN];
    let mut filled = 0;
    for segment in readable {
        let n = (HEADER_LEN - filled).min(segment.len as usize);
        memory.read(&mut header[filled..filled + n], segment.addr).ok()?;
        filled += n;
        if filled == HEADER_LEN {
            return Some(header);
        }
    }
    None
}
