//! Descriptor chains (virtio 1.2, 2.7.5): read once, bounded, and whole or refused.

use vm_memory::{Address, GuestAddress};

use crate::memory::GuestMemory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const DESCRIPTOR_LEN: u64 = 16;

/// Most buffers one request may have, as in other implementations: the largest queue of virtio-pci frontends.
pub const MAX_SEGMENTS: usize = 1024;

/// Why a chain is no request.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    #[error("the chain loops, or is longer than {MAX_SEGMENTS} buffers or its table of {0} descriptors")]
    TooLong(u32),
    #[error("a descriptor names descriptor {next} as its next, in a table of {size}")]
    BadNext { next: u16, size: u32 },
    #[error("an indirect descriptor table of {0} bytes")]
    BadIndirect(u32),
    #[error("an indirect descriptor inside an indirect table, or with a next one")]
    NestedIndirect,
    #[error("a buffer to read follows one to write")]
    ReadableAfterWritable,
    #[error("the chain is longer than 4 GiB")]
    TooManyBytes,
    #[error("a descriptor is outside guest memory")]
    OutsideMemory(#[from] vm_memory::GuestMemoryError),
}

/// One buffer, as the guest named it: it may lie anywhere, also outside of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub addr: GuestAddress,
    /// Bytes.
    pub len: u32,
}

/// The buffers of one request: those the device reads, then those it writes. Reused from request to request.
#[derive(Debug, Default)]
pub struct Chain {
    segments: Vec<Segment>,
    /// How many of them the device reads.
    readable: usize,
}

/// A descriptor table being walked.
struct Table {
    addr: GuestAddress,
    size: u32,
    indirect: bool,
}

impl Chain {
    /// Buffers the device reads.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// Buffers the device writes.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    pub(super) fn read(
        &mut self,
        memory: &GuestMemory,
        table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<(), ChainError> {
        self.segments.clear();
        self.readable = 0;
        let mut table = Table { addr: table, size: u32::from(size), indirect: false };
        let mut index = head;
        let mut bytes = 0u32;
        let mut steps = 0;
        loop {
            let (segment, flags, next) = table.descriptor(memory, index)?;
            if flags & INDIRECT != 0 {
                table = table.enter(segment, flags)?;
                index = 0;
                steps = 0;
                continue;
            }
            if steps >= table.size || self.segments.len() >= MAX_SEGMENTS {
                return Err(ChainError::TooLong(table.size));
            }
            steps += 1;
            bytes = bytes.checked_add(segment.len).ok_or(ChainError::TooManyBytes)?;
            self.push(segment, flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = next;
        }
    }

    fn push(&mut self, segment: Segment, writable: bool) -> Result<(), ChainError> {
        if !writable {
            if self.readable != self.segments.len() {
                return Err(ChainError::ReadableAfterWritable);
            }
            self.readable += 1;
        }
        self.segments.push(segment);
        Ok(())
    }
}

impl Table {
    fn descriptor(&self, memory: &GuestMemory, index: u16) -> Result<(Segment, u16, u16), ChainError> {
        if u32::from(index) >= self.size {
            return Err(ChainError::BadNext { next: index, size: self.size });
        }
        let at = self.addr.checked_add(u64::from(index) * DESCRIPTOR_LEN);
        let at = at.ok_or(vm_memory::GuestMemoryError::InvalidGuestAddress(self.addr))?;
        let raw: u128 = memory.read_obj(at)?;
        let raw = u128::from_le(raw);
        let segment = Segment { addr: GuestAddress(raw as u64), len: (raw >> 64) as u32 };
        Ok((segment, (raw >> 96) as u16, (raw >> 112) as u16))
    }

    /// Only a direct chain may lead into one indirect table, and ends there (virtio 1.2, 2.7.5.3).
    fn enter(&self, segment: Segment, flags: u16) -> Result<Self, ChainError> {
        if self.indirect || flags & NEXT != 0 {
            return Err(ChainError::NestedIndirect);
        }
        let size = segment.len / DESCRIPTOR_LEN as u32;
        if size == 0 || size > u32::from(u16::MAX) || !u64::from(segment.len).is_multiple_of(DESCRIPTOR_LEN) {
            return Err(ChainError::BadIndirect(segment.len));
        }
        Ok(Self { addr: segment.addr, size, indirect: true })
    }
}
