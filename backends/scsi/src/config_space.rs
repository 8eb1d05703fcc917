//! Config space and feature bits of virtio-scsi (virtio 1.2, 5.6.3 and 5.6.4).

use std::sync::atomic::{AtomicU32, Ordering};

use crate::address::MAX_TARGET;

/// Device feature bits.
pub(crate) mod feature {
    /// Units come and go while the device runs.
    pub(crate) const HOTPLUG: u64 = 1 << 1;
    /// Changes of a unit's parameters are reported.
    pub(crate) const CHANGE: u64 = 1 << 2;
}

/// Bytes of config space.
const LEN: usize = 36;
/// The two fields that a driver may write.
const SENSE_SIZE: usize = 20;
const CDB_SIZE: usize = 24;

/// Bytes that a driver may ask for: [`cleave_scsi`] looks at 32 bytes of a CDB and has 28 of sense data.
pub(crate) const MAX_CDB_SIZE: u32 = 256;
pub(crate) const MAX_SENSE_SIZE: u32 = 256;

/// Bytes of an event (virtio 1.2, 5.6.6.3).
pub(crate) const EVENT_LEN: usize = 16;

/// Requests that a driver may have on one unit at once, as far as we care.
const CMD_PER_LUN: u32 = 128;

/// What the driver has chosen.
#[derive(Debug)]
pub(crate) struct Sizes {
    cdb: AtomicU32,
    sense: AtomicU32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { cdb: AtomicU32::new(32), sense: AtomicU32::new(96) }
    }
}

impl Sizes {
    /// Bytes of a CDB in each request.
    pub(crate) fn cdb(&self) -> usize {
        self.cdb.load(Ordering::Relaxed) as usize
    }

    /// Bytes of sense data in each response.
    pub(crate) fn sense(&self) -> usize {
        self.sense.load(Ordering::Relaxed) as usize
    }

    pub(crate) fn reset(&self) {
        let Self { cdb, sense } = Self::default();
        self.cdb.store(cdb.into_inner(), Ordering::Relaxed);
        self.sense.store(sense.into_inner(), Ordering::Relaxed);
    }
}

/// What config space says.
#[derive(Debug)]
pub(crate) struct ConfigSpace<'s> {
    pub(crate) num_queues: u16,
    pub(crate) seg_max: u32,
    pub(crate) sizes: &'s Sizes,
}

/// A driver has written what cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("only sense_size and cdb_size can be written")]
    ReadOnly,
    #[error("a cdb_size of {0} bytes is not possible: it is 1 to {MAX_CDB_SIZE}")]
    CdbSize(u32),
    #[error("a sense_size of {0} bytes is not possible: it is at most {MAX_SENSE_SIZE}")]
    SenseSize(u32),
}

impl ConfigSpace<'_> {
    pub(crate) fn bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(0, self.num_queues.into());
        put(4, self.seg_max);
        // max_sectors: what one engine request moves at most is no limit of ours.
        put(8, 0xffff);
        put(12, CMD_PER_LUN);
        put(16, EVENT_LEN as u32);
        put(SENSE_SIZE, self.sizes.sense() as u32);
        put(CDB_SIZE, self.sizes.cdb() as u32);
        // 28: max_channel is 0; 30: max_target.
        put(28, u32::from(MAX_TARGET) << 16);
        put(32, cleave_scsi::Lun::MAX.number().into());
        bytes
    }

    /// A driver's write of `data` at `offset`, which lies inside.
    pub(crate) fn write(&self, offset: usize, data: &[u8]) -> Result<(), WriteError> {
        let old = self.bytes();
        let mut new = old;
        new[offset..offset + data.len()].copy_from_slice(data);
        let word = |at: usize| u32::from_le_bytes([new[at], new[at + 1], new[at + 2], new[at + 3]]);
        if new[..SENSE_SIZE] != old[..SENSE_SIZE] || new[CDB_SIZE + 4..] != old[CDB_SIZE + 4..] {
            return Err(WriteError::ReadOnly);
        }
        let (sense, cdb) = (word(SENSE_SIZE), word(CDB_SIZE));
        if !(1..=MAX_CDB_SIZE).contains(&cdb) {
            return Err(WriteError::CdbSize(cdb));
        }
        if sense > MAX_SENSE_SIZE {
            return Err(WriteError::SenseSize(sense));
        }
        self.sizes.cdb.store(cdb, Ordering::Relaxed);
        self.sizes.sense.store(sense, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let sizes = Sizes::default();
        let space = ConfigSpace { num_queues: 4, seg_max: 126, sizes: &sizes };
        let bytes = space.bytes();
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        assert_eq!((word(0), word(4), word(16), word(20), word(24)), (4, 126, 16, 96, 32));
        assert_eq!((bytes[28..32].to_vec(), word(32)), (vec![0, 0, MAX_TARGET, 0], 16383));
    }

    #[test]
    fn a_driver_chooses_two_sizes_and_nothing_else() {
        let sizes = Sizes::default();
        let space = ConfigSpace { num_queues: 4, seg_max: 126, sizes: &sizes };
        space.write(20, &[64, 0, 0, 0, 16, 0, 0, 0]).unwrap();
        assert_eq!((sizes.sense(), sizes.cdb()), (64, 16));
        assert!(matches!(space.write(24, &[0]), Err(WriteError::CdbSize(0))));
        assert!(matches!(space.write(21, &[2]), Err(WriteError::SenseSize(_))));
        assert!(matches!(space.write(0, &[1]), Err(WriteError::ReadOnly)));
        assert_eq!((sizes.sense(), sizes.cdb()), (64, 16));
        sizes.reset();
        assert_eq!((sizes.sense(), sizes.cdb()), (96, 32));
    }
}
