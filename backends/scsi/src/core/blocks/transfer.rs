//! READ and WRITE (SBC-3, 5.11 to 5.13 and 5.33 to 5.35; those of six bytes are in SBC-2).

use super::{Extent, data_out, no_protection};
use crate::task::{Cmd, Io, Outcome, Refusal, Reply};
use crate::unit::Unit;

/// Bit of byte 1.
const FUA: u8 = 3;

pub(crate) fn read_6(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    read(unit, cmd, Extent::of_6(cmd), false)
}

pub(crate) fn read_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    no_protection(cmd)?;
    read(unit, cmd, Extent::of_10(cmd), cmd.cdb.bit(1, FUA))
}

pub(crate) fn read_12(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    no_protection(cmd)?;
    read(unit, cmd, Extent::of_12(cmd), cmd.cdb.bit(1, FUA))
}

pub(crate) fn read_16(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    no_protection(cmd)?;
    read(unit, cmd, Extent::of_16(cmd), cmd.cdb.bit(1, FUA))
}

pub(crate) fn write_6(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    write(unit, cmd, Extent::of_6(cmd), false)
}

pub(crate) fn write_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    no_protection(cmd)?;
    write(unit, cmd, Extent::of_10(cmd), cmd.cdb.bit(1, FUA))
}

pub(crate) fn write_12(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    no_protection(cmd)?;
    write(unit, cmd, Extent::of_12(cmd), cmd.cdb.bit(1, FUA))
}

pub(crate) fn write_16(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    no_protection(cmd)?;
    write(unit, cmd, Extent::of_16(cmd), cmd.cdb.bit(1, FUA))
}

fn read(unit: &Unit, cmd: &Cmd<'_>, extent: Extent, fua: bool) -> Outcome {
    let medium = unit.ready()?;
    extent.at_most(unit.max_transfer())?;
    let range = unit.range(medium, extent)?;
    if range.len == 0 {
        return Ok(Reply::Good);
    }
    if range.len > cmd.data_in {
        return Err(Refusal::Overrun { needed: range.len });
    }
    // What cannot be written has nothing in a cache that is not on it.
    let fua = fua && !unit.is_cd();
    Ok(Reply::Io { io: Io::Read { range, fua }, used: range.len })
}

fn write(unit: &Unit, cmd: &Cmd<'_>, extent: Extent, fua: bool) -> Outcome {
    let medium = unit.writable()?;
    extent.at_most(unit.max_transfer())?;
    let range = unit.range(medium, extent)?;
    if range.len == 0 {
        return Ok(Reply::Good);
    }
    data_out(cmd, range.len)?;
    Ok(Reply::Io { io: Io::Write { range, durable: unit.durable(fua) }, used: range.len })
}
