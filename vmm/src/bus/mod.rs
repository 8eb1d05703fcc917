//! An address space of emulated devices: port I/O or memory-mapped I/O, by address.
//!
//! Invariants: ranges never overlap; an access reaches a device only if all of it lies in that device's range; the
//! lock is held to look up, never while a device works, so a device may change the bus it is on.

mod caught;
mod event;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

pub use caught::Caught;
pub use event::Event;

/// A device that answers accesses to a range of addresses. vCPU threads call it at the same time.
pub trait BusDevice: Send + Sync {
    /// Fills `data` (1, 2, 4 or 8 bytes) from `offset` bytes into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data` (1, 2, 4 or 8 bytes) written at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range of addresses, which is never empty and never goes past the last address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    start: u64,
    last: u64,
}

impl Range {
    /// `None` for a range of no bytes or one that goes past the last address.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let last = start.checked_add(len.checked_sub(1)?)?;
        Some(Self { start, last })
    }

    const fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.last)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    #[error("the addresses {wanted} overlap those of another device, {taken}")]
    Overlap { wanted: Range, taken: Range },
    #[error("{len} bytes at {start:#x} are no range of addresses")]
    NoRange { start: u64, len: u64 },
}

struct Entry {
    range: Range,
    device: Arc<dyn BusDevice>,
}

/// One address space. What nobody answers reads as all ones, and writes to it are lost.
#[derive(Default)]
pub struct Bus {
    /// By first address.
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `len` addresses from `start` on to `device`.
    ///
    /// # Errors
    /// When another device has one of them, or they are no range.
    pub fn insert(&self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let range = Range::new(start, len).ok_or(BusError::NoRange { start, len })?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, below)) = entries.range(..=range.last).next_back()
            && below.range.overlaps(range)
        {
            return Err(BusError::Overlap { wanted: range, taken: below.range });
        }
        entries.insert(start, Entry { range, device });
        Ok(())
    }

    /// Takes the range that starts at `start` off the bus; false if there is none. An access that found its device
    /// before may still reach it.
    pub fn remove(&self, start: u64) -> bool {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(&start).is_some()
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let access = Range::new(address, len as u64)?;
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let (_, entry) = entries.range(..=address).next_back()?;
        (access.last <= entry.range.last).then(|| (Arc::clone(&entry.device), address - entry.range.start))
    }
}

#[cfg(test)]
mod tests;
