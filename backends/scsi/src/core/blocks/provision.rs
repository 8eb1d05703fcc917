//! UNMAP and WRITE SAME (SBC-3, 5.28, 5.43 and 5.44).

use super::{Extent, no_protection};
use crate::cdb::{be16, be32, be64};
use crate::sense::Sense;
use crate::task::{Cmd, Io, Outcome, Parameters, Range, Refusal, Reply};
use crate::unit::{Kind, Unit};

/// Most descriptors of one UNMAP.
pub(crate) const MAX_UNMAP_DESCRIPTORS: u32 = 256;

/// Most blocks of one UNMAP.
pub(crate) const MAX_UNMAP_BLOCKS: u32 = u32::MAX;

/// Most bytes that one WRITE SAME sets.
const MAX_WRITE_SAME: u64 = 1 << 30;

const HEADER: usize = 8;
const DESCRIPTOR: usize = 16;

pub(crate) fn max_write_same(block_size: u32) -> u64 {
    MAX_WRITE_SAME / u64::from(block_size)
}

impl Unit {
    pub(crate) fn can_unmap(&self) -> bool {
        matches!(&self.kind, Kind::Disk(disk) if disk.unmap.is_some())
    }
}

pub(crate) fn unmap(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    // ANCHOR: blocks are mapped or not.
    cmd.cdb.refuse_bit(1, 0)?;
    unit.writable()?;
    let len = usize::from(cmd.cdb.be16(7));
    if len == 0 {
        return Ok(Reply::Good);
    }
    if len < HEADER {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    match cmd.parameters(len)? {
        Parameters::Here(list) => {
            let ranges = descriptors(unit, list)?;
            let used = len as u64;
            if ranges.is_empty() {
                return Ok(Reply::Control { actions: Vec::new(), used });
            }
            Ok(Reply::Io { io: Io::Unmap { ranges, durable: unit.durable(false) }, used })
        }
        Parameters::ToGather(gather) => Ok(gather),
    }
}

/// A descriptor that is cut off is left out (SBC-3, 5.28).
fn descriptors(unit: &Unit, list: &[u8]) -> Result<Vec<Range>, Refusal> {
    let medium = unit.writable()?;
    let named = usize::from(be16(list, 2)) / DESCRIPTOR;
    let here = list[HEADER..].chunks_exact(DESCRIPTOR).take(named);
    if here.len() > MAX_UNMAP_DESCRIPTORS as usize {
        return Err(Sense::list(2).into());
    }
    let mut total = 0u64;
    let mut ranges = Vec::with_capacity(here.len());
    for (index, descriptor) in here.enumerate() {
        let extent = Extent { lba: be64(descriptor, 0), blocks: be32(descriptor, 8).into(), length_at: 0 };
        total += extent.blocks;
        if total > MAX_UNMAP_BLOCKS.into() {
            return Err(Sense::list(HEADER + index * DESCRIPTOR + 8).into());
        }
        let range = unit.range(medium, extent)?;
        if range.len != 0 {
            ranges.push(range);
        }
    }
    Ok(ranges)
}

pub(crate) fn write_same_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    write_same(unit, cmd, Extent::of_10(cmd), false)
}

pub(crate) fn write_same_16(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    /// There is no block in data-out: zeroes are meant.
    const NDOB: u8 = 0;
    write_same(unit, cmd, Extent::of_16(cmd), cmd.cdb.bit(1, NDOB))
}

fn write_same(unit: &Unit, cmd: &Cmd<'_>, extent: Extent, no_data: bool) -> Outcome {
    const ANCHOR: u8 = 4;
    const UNMAP: u8 = 3;
    const PBDATA: u8 = 2;
    const LBDATA: u8 = 1;
    no_protection(cmd)?;
    for unsupported in [ANCHOR, PBDATA, LBDATA] {
        cmd.cdb.refuse_bit(1, unsupported)?;
    }
    let unmap = cmd.cdb.bit(1, UNMAP);
    if unmap && !unit.can_unmap() {
        return Err(Sense::cdb_bit(1, UNMAP).into());
    }
    let medium = unit.writable()?;
    let extent = extent.or_rest(medium);
    extent.at_most(max_write_same(unit.block_size()))?;
    let range = unit.range(medium, extent)?;
    let durable = unit.durable(false);
    if no_data {
        return Ok(Reply::Io { io: Io::WriteZeroes { range, unmap, durable }, used: 0 });
    }
    let used = u64::from(unit.block_size());
    match cmd.parameters(unit.block_size() as usize)? {
        Parameters::ToGather(gather) => Ok(gather),
        // Blocks are given back only if they read as what was to be written: as zeroes.
        Parameters::Here(block) if block.iter().all(|byte| *byte == 0) => {
            Ok(Reply::Io { io: Io::WriteZeroes { range, unmap, durable }, used })
        }
        Parameters::Here(block) => {
            Ok(Reply::Io { io: Io::WriteSame { range, pattern: block.into(), durable }, used })
        }
    }
}
