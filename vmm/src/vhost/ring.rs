//! One virtqueue as it goes to the daemon: checked against guest memory where it enters.

use std::sync::Arc;

use super::MemoryTable;
use crate::bus::Event;

/// Guest-physical addresses of the three parts of a split virtqueue (virtio 1.2, 2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingAddresses {
    pub descriptor: u64,
    pub available: u64,
    pub used: u64,
}

/// How far a virtqueue has got: `idx` of the available ring, which the driver moves, and of the used ring, which the
/// device moves (virtio 1.2, 2.7.6 and 2.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Indices {
    pub(super) available: u16,
    pub(super) used: u16,
}

impl Indices {
    /// Buffers that the driver made available and the device has not used.
    pub(super) fn outstanding(self) -> u16 {
        self.available.wrapping_sub(self.used)
    }
}

/// A guest's virtqueue that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error("the {part} of queue {index} ({len} bytes at {address:#x}) is not in the guest's memory")]
    NotInMemory { index: u8, part: &'static str, address: u64, len: u64 },
    #[error("the {part} of queue {index} at {address:#x} is not aligned to {align} bytes")]
    Misaligned { index: u8, part: &'static str, address: u64, align: u64 },
    #[error("queue {index} has {size} entries, which is no power of two")]
    Size { index: u8, size: u16 },
}

/// A virtqueue whose parts lie in guest memory.
#[derive(Debug, Clone)]
pub struct Ring {
    pub index: u8,
    /// Descriptors, a power of two.
    pub size: u16,
    /// User addresses.
    pub(super) addresses: RingAddresses,
    pub kick: Arc<Event>,
    /// `None`: the guest polls.
    pub call: Option<Arc<Event>>,
}

impl Ring {
    /// # Errors
    /// When the size is none or a part is misaligned or not in one piece of RAM (virtio 1.2, 2.7).
    pub fn new(
        memory: &MemoryTable,
        index: u8,
        size: u16,
        guest: RingAddresses,
        kick: Arc<Event>,
        call: Option<Arc<Event>>,
    ) -> Result<Self, RingError> {
        if !size.is_power_of_two() {
            return Err(RingError::Size { index, size });
        }
        let entries = u64::from(size);
        let user = |part, address: u64, len, align| {
            if !address.is_multiple_of(align) {
                return Err(RingError::Misaligned { index, part, address, align });
            }
            memory.user_address(address, len).ok_or(RingError::NotInMemory { index, part, address, len })
        };
        // Two bytes at the end of each ring hold the event index.
        let addresses = RingAddresses {
            descriptor: user("descriptor table", guest.descriptor, 16 * entries, 16)?,
            available: user("available ring", guest.available, 6 + 2 * entries, 2)?,
            used: user("used ring", guest.used, 6 + 8 * entries, 4)?,
        };
        Ok(Self { index, size, addresses, kick, call })
    }

    /// As guest memory has them now; `None` if it cannot be read.
    pub(super) fn indices(&self, memory: &MemoryTable) -> Option<Indices> {
        const IDX: u64 = 2;
        let read = |ring: u64| memory.read_u16(ring + IDX);
        Some(Indices { available: read(self.addresses.available)?, used: read(self.addresses.used)? })
    }
}
