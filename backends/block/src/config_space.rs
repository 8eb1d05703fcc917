//! Config space and feature bits of virtio-blk (virtio 1.2, 5.2.3 and 5.2.4).

use cleave_storage::Topology;

use crate::request::segments::{MAX_SECTORS, MAX_SEGMENTS};

/// Device feature bits.
pub(crate) mod feature {
    pub(crate) const SIZE_MAX: u64 = 1 << 1;
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
}

/// The only byte a guest may write: whether the write cache is on.
pub(crate) const WRITEBACK: usize = 32;

/// Bytes up to the fields of WRITE_ZEROES. Those of SECURE_ERASE, which is not offered, would follow.
const LEN: usize = 60;

/// What config space says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConfigSpace {
    /// Sectors of 512 bytes, whatever the block size.
    pub(crate) capacity: u64,
    /// Most bytes in one buffer.
    pub(crate) size_max: u32,
    /// Most data buffers in one request.
    pub(crate) seg_max: u32,
    /// Bytes in a logical block.
    pub(crate) blk_size: u32,
    /// Bytes in a physical block.
    pub(crate) physical_block: u32,
    pub(crate) topology: Topology,
    pub(crate) writeback: bool,
    pub(crate) num_queues: u16,
    /// DISCARD and WRITE_ZEROES are offered.
    pub(crate) deallocates: bool,
}

impl ConfigSpace {
    pub(crate) fn bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let blocks = self.physical_block / self.blk_size;
        let in_blocks = |bytes: u32| bytes / self.blk_size;
        put(0, &self.capacity.to_le_bytes());
        put(8, &self.size_max.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        // 16: the geometry of cylinders, heads and sectors is not offered.
        put(20, &self.blk_size.to_le_bytes());
        // How many logical blocks in a physical one, and which of those is the first that starts one.
        let first = in_blocks(self.topology.alignment_offset) % blocks;
        put(24, &[blocks.ilog2() as u8, first.try_into().unwrap_or(0)]);
        // The smallest I/O without a penalty, and the best; 0 where it is not known.
        let min_io = in_blocks(self.topology.min_io).max(blocks);
        put(26, &u16::try_from(min_io).unwrap_or(blocks as u16).to_le_bytes());
        put(28, &in_blocks(self.topology.opt_io).to_le_bytes());
        put(WRITEBACK, &[self.writeback.into()]);
        put(34, &self.num_queues.to_le_bytes());
        if self.deallocates {
            put(36, &MAX_SECTORS.to_le_bytes());
            put(40, &MAX_SEGMENTS.to_le_bytes());
            put(44, &(self.physical_block / 512).to_le_bytes());
            put(48, &MAX_SECTORS.to_le_bytes());
            put(52, &MAX_SEGMENTS.to_le_bytes());
            put(56, &[1]); // Zeroing may unmap.
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let mut config = ConfigSpace {
            capacity: 0x0102_0304,
            size_max: 0x0040_0000,
            seg_max: 126,
            blk_size: 512,
            physical_block: 4096,
            topology: Topology::default(),
            writeback: true,
            num_queues: 4,
            deallocates: false,
        };
        let bytes = config.bytes();
        assert_eq!(bytes[0..8], [4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(bytes[8..16], [0, 0, 0x40, 0, 126, 0, 0, 0]);
        assert_eq!(bytes[20..32], [0, 2, 0, 0, 3, 0, 8, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[32..36], [1, 0, 4, 0]);
        assert_eq!(bytes[36..60], [0; 24]);

        config.deallocates = true;
        config.topology = Topology { min_io: 64 << 10, opt_io: 256 << 10, alignment_offset: 3584 };
        let bytes = config.bytes();
        assert_eq!(bytes[24..32], [3, 7, 128, 0, 0, 2, 0, 0]);
        assert_eq!(bytes[36..48], [0, 0, 0x20, 0, 64, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(bytes[48..60], [0, 0, 0x20, 0, 64, 0, 0, 0, 1, 0, 0, 0]);
    }
}
