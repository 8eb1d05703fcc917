//! Guest memory as a daemon sees it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cleave_common::vhost_user::{self as wire, MAX_TABLE_REGIONS, MemoryRegion};

use rustix::io::pread;

use crate::memory::GuestRam;

/// User addresses on the wire are guest-physical addresses plus this, never addresses of ours: a daemon that forgets
/// to translate, or that translates twice, hits nothing.
const USER_BASE: u64 = 0x5000_0000_0000;

/// A range of RAM in a file.
#[derive(Debug, Clone)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    pub file: Arc<OwnedFd>,
    /// Where in the file it starts, in bytes.
    pub offset: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error("{0} regions of guest memory; vhost-user daemons take 1 to {MAX_TABLE_REGIONS}")]
    Regions(usize),
    #[error("guest memory at {start:#x} ends beyond what can be addressed")]
    TooHigh { start: u64 },
    #[error("cannot share the file of guest memory")]
    File(#[from] io::Error),
}

/// All of guest memory, at most [`MAX_TABLE_REGIONS`] regions that end below the address limit.
#[derive(Debug)]
pub struct MemoryTable {
    regions: Vec<Region>,
}

impl MemoryTable {
    /// All of `ram`.
    ///
    /// # Errors
    /// As [`MemoryTable::new`], or when the process has no file descriptor left.
    pub fn of(ram: &GuestRam) -> Result<Self, TableError> {
        let file: Arc<OwnedFd> = Arc::new(ram.file().try_clone()?.into());
        let regions = ram.regions().map(|region| Region {
            start: region.gpa,
            len: region.size,
            file: Arc::clone(&file),
            offset: region.file_offset,
        });
        Self::new(regions.collect())
    }

    /// # Errors
    /// When there are no regions or more than a message carries, or one ends beyond 2^46.
    pub fn new(regions: Vec<Region>) -> Result<Self, TableError> {
        const LIMIT: u64 = 1 << 46;
        if regions.is_empty() || regions.len() > MAX_TABLE_REGIONS {
            return Err(TableError::Regions(regions.len()));
        }
        match regions.iter().find(|region| region.start.checked_add(region.len).is_none_or(|end| end > LIMIT))
        {
            Some(region) => Err(TableError::TooHigh { start: region.start }),
            None => Ok(Self { regions }),
        }
    }

    /// The user address of `len` bytes of RAM at the guest-physical address `start`; `None` unless one region holds
    /// all of them.
    pub fn user_address(&self, start: u64, len: u64) -> Option<u64> {
        let end = start.checked_add(len)?;
        let holds = |region: &&Region| region.start <= start && end <= region.start + region.len;
        self.regions.iter().find(holds).map(|_| USER_BASE + start)
    }

    /// Two bytes of RAM at a user address. Through the file: this module has no mapping of its own.
    pub(super) fn read_u16(&self, user: u64) -> Option<u16> {
        let start = user.checked_sub(USER_BASE)?;
        let end = start.checked_add(2)?;
        let holds = |region: &&Region| region.start <= start && end <= region.start + region.len;
        let region = self.regions.iter().find(holds)?;
        let mut bytes = [0; 2];
        let got = pread(&region.file, &mut bytes, region.offset + (start - region.start)).ok()?;
        (got == bytes.len()).then(|| u16::from_le_bytes(bytes))
    }

    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub(super) fn payload(&self) -> wire::MemoryTable {
        let regions = self.regions.iter().map(|region| MemoryRegion {
            guest_addr: region.start,
            size: region.len,
            user_addr: USER_BASE + region.start,
            mmap_offset: region.offset,
        });
        wire::MemoryTable { regions: regions.collect() }
    }
}
