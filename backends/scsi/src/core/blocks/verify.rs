//! VERIFY and COMPARE AND WRITE (SBC-3, 5.2 and 5.29 to 5.31).

use super::{Extent, data_out, no_protection};
use crate::sense::Sense;
use crate::task::{Cmd, Io, Outcome, Parameters, Reply};
use crate::unit::Unit;

/// Most blocks of one COMPARE AND WRITE: what its CDB has room for.
pub(crate) const MAX_COMPARE_AND_WRITE: u8 = u8::MAX;

pub(crate) fn verify_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    verify(unit, cmd, Extent::of_10(cmd))
}

pub(crate) fn verify_12(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    verify(unit, cmd, Extent::of_12(cmd))
}

pub(crate) fn verify_16(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    verify(unit, cmd, Extent::of_16(cmd))
}

fn verify(unit: &Unit, cmd: &Cmd<'_>, extent: Extent) -> Outcome {
    no_protection(cmd)?;
    let medium = unit.ready()?;
    extent.at_most(unit.max_transfer())?;
    let range = unit.range(medium, extent)?;
    // BYTCHK
    match (cmd.cdb.byte(1) >> 1) & 0x03 {
        2 => Err(Sense::cdb_bit(1, 2).into()),
        _ if range.len == 0 => Ok(Reply::Good),
        0 => Ok(Reply::Io { io: Io::Verify { range }, used: 0 }),
        1 => {
            data_out(cmd, range.len)?;
            Ok(Reply::Io { io: Io::Compare { range }, used: range.len })
        }
        _ => match cmd.parameters(unit.block_size() as usize)? {
            Parameters::ToGather(gather) => Ok(gather),
            Parameters::Here(block) => {
                let io = Io::CompareSame { range, pattern: block.into() };
                Ok(Reply::Io { io, used: block.len() as u64 })
            }
        },
    }
}

pub(crate) fn compare_and_write(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const FUA: u8 = 3;
    no_protection(cmd)?;
    let medium = unit.writable()?;
    let extent = Extent { lba: cmd.cdb.be64(2), blocks: cmd.cdb.byte(13).into(), length_at: 13 };
    extent.at_most(unit.max_transfer())?;
    let range = unit.range(medium, extent)?;
    if range.len == 0 {
        return Ok(Reply::Good);
    }
    let used = 2 * range.len;
    data_out(cmd, used)?;
    let durable = unit.durable(cmd.cdb.bit(1, FUA));
    Ok(Reply::Io { io: Io::CompareAndWrite { range, durable }, used })
}
