//! A look at an image's tables before they are relied on.
//!
//! What a file says of itself is checked once, when it is opened, in time that grows with its tables and not with its
//! data: that every table is inside of the file and used once, and, for an image that will be written, that nothing in
//! use is counted as free. The latter is how an image looks whose host lost power between two flushes: an allocation
//! would give the same cluster away twice.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::{Header, HeaderError};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Most bytes of tables that are looked at: those of a disk of 8 TiB with the usual clusters. An image that has more is
/// believed in the rest.
const MAX_BYTES: u64 = 1 << 30;

struct Check<'f> {
    file: &'f File,
    header: &'f Header,
    file_len: u64,
    /// By cluster of the file: something refers to it that nothing else may refer to.
    used: Bits,
}

/// Checks the tables of `file`. `writable`: refcounts as well.
pub(super) fn tables(file: &File, header: &Header, file_len: u64, writable: bool) -> Result<(), HeaderError> {
    let clusters = file_len.div_ceil(header.cluster_size());
    let mut check = Check { file, header, file_len, used: Bits::new(clusters)? };
    check.claim("header", 0)?;
    check.claim_range("L1 table", header.l1_range())?;
    check.claim_range("refcount table", header.reftable_range())?;
    let blocks =
        check.entries(header.reftable_offset, u64::from(header.reftable_clusters) << header.cluster_bits)?;
    for block in blocks.iter().map(|block| block & !0x1ff).filter(|block| *block != 0) {
        check.claim("refcount block", block)?;
    }
    let l1 = check.entries(header.l1_offset, u64::from(header.l1_entries) * 8)?;
    let mut left = MAX_BYTES;
    for entry in l1.iter().filter(|entry| *entry & OFFSET != 0) {
        let table = entry & OFFSET;
        // One that is not exclusively ours is shared with a snapshot, not with another entry.
        check.claim("L2 table", table)?;
        if writable && left > 0 {
            check.l2_table(table)?;
            left = left.saturating_sub(header.cluster_size());
        }
    }
    if writable && left > 0 { check.refcounts(&blocks) } else { Ok(()) }
}

impl Check<'_> {
    /// The numbers of a table.
    fn entries(&self, offset: u64, len: u64) -> Result<Vec<u64>, HeaderError> {
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, offset).map_err(|error| self.unreadable(offset, &error))?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }

    fn unreadable(&self, offset: u64, error: &io::Error) -> HeaderError {
        HeaderError::Damaged(format!("a table at {offset:#x} cannot be read ({error})"))
    }

    fn claim_range(&mut self, what: &str, range: std::ops::Range<u64>) -> Result<(), HeaderError> {
        let mut at = range.start;
        while at < range.end {
            self.claim(what, at)?;
            at += self.header.cluster_size();
        }
        Ok(())
    }

    /// The cluster at `offset` is inside of the file, and nobody else's.
    fn claim(&mut self, what: &str, offset: u64) -> Result<(), HeaderError> {
        if !offset.is_multiple_of(self.header.cluster_size()) || offset >= self.file_len {
            return Err(HeaderError::Damaged(format!(
                "a {what} is said to be at {offset:#x}, but the file has {} bytes; is it cut off?",
                self.file_len
            )));
        }
        if self.used.set(offset >> self.header.cluster_bits) {
            return Err(HeaderError::Damaged(format!("the {what} at {offset:#x} has two uses")));
        }
        Ok(())
    }

    fn l2_table(&mut self, offset: u64) -> Result<(), HeaderError> {
        for entry in self.entries(offset, self.header.cluster_size())? {
            let cluster = entry & OFFSET;
            // A preallocated cluster that reads as zeros need not be there yet.
            let absent = entry & ZERO != 0 && cluster >= self.file_len;
            if entry & COMPRESSED != 0 || cluster == 0 || absent {
                continue;
            }
            if entry & COPIED != 0 {
                self.claim("data cluster", cluster)?;
            } else if !cluster.is_multiple_of(self.header.cluster_size()) || cluster >= self.file_len {
                return Err(HeaderError::Damaged(format!(
                    "a data cluster is said to be at {cluster:#x}, but the file has {} bytes; is it cut off?",
                    self.file_len
                )));
            }
        }
        Ok(())
    }

    /// What is in use is counted.
    fn refcounts(&self, blocks: &[u64]) -> Result<(), HeaderError> {
        let bits = 1u64 << self.header.refcount_order;
        let per_block = (8 << self.header.cluster_bits) / bits;
        let mut block_bytes = vec![0; self.header.cluster_size() as usize];
        for (index, block) in blocks.iter().map(|block| block & !0x1ff).enumerate() {
            let first = index as u64 * per_block;
            if first >= self.used.len {
                break;
            }
            if block == 0 {
                block_bytes.fill(0);
            } else {
                self.file
                    .read_exact_at(&mut block_bytes, block)
                    .map_err(|error| self.unreadable(block, &error))?;
            }
            let clusters = first..(first + per_block).min(self.used.len);
            if let Some(free) =
                clusters.clone().find(|at| self.used.get(*at) && is_zero(&block_bytes, bits, at - first))
            {
                return Err(HeaderError::Miscounted(free << self.header.cluster_bits));
            }
        }
        let counted = blocks.len() as u64 * per_block;
        match (counted..self.used.len).find(|at| self.used.get(*at)) {
            Some(at) => Err(HeaderError::Miscounted(at << self.header.cluster_bits)),
            None => Ok(()),
        }
    }
}

fn is_zero(block: &[u8], bits: u64, index: u64) -> bool {
    let bit = index * bits;
    let at = (bit / 8) as usize;
    if bits < 8 {
        let mask = ((1u16 << bits) - 1) as u8;
        (block[at] >> (bit % 8)) & mask == 0
    } else {
        block[at..at + (bits / 8) as usize].iter().all(|byte| *byte == 0)
    }
}

/// A bit for each cluster of a file.
struct Bits {
    words: Vec<u64>,
    len: u64,
}

impl Bits {
    /// Most clusters: 32 MiB of bits, 16 TiB of the usual clusters. A sparse file may claim to be any size.
    const MAX: u64 = 256 << 20;

    fn new(len: u64) -> Result<Self, HeaderError> {
        if len > Self::MAX {
            return Err(HeaderError::Damaged(format!("a file of {len} clusters")));
        }
        Ok(Self { words: vec![0; len.div_ceil(64) as usize], len })
    }

    fn get(&self, at: u64) -> bool {
        self.words[(at / 64) as usize] & 1 << (at % 64) != 0
    }

    /// Whether it was set before.
    fn set(&mut self, at: u64) -> bool {
        let was = self.get(at);
        self.words[(at / 64) as usize] |= 1 << (at % 64);
        was
    }
}
