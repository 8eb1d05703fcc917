//! READ CAPACITY (SBC-3, 5.15 and 5.16; MMC-6).

use crate::cdb::put;
use crate::sense::Sense;
use crate::task::{Cmd, Outcome, Reply};
use crate::unit::{Kind, Unit};

/// Bytes of the answer to READ CAPACITY (10), which has no allocation length.
const SHORT: usize = 8;

pub(crate) fn read_capacity_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let medium = unit.ready()?;
    // Of an address only PMI would make something.
    if cmd.cdb.be32(2) != 0 && !cmd.cdb.bit(8, 0) {
        return Err(Sense::cdb(2).into());
    }
    let last = u32::try_from(medium.blocks - 1).unwrap_or(u32::MAX);
    let mut bytes = vec![0; SHORT];
    put(&mut bytes, 0, last.to_be_bytes());
    put(&mut bytes, 4, unit.block_size().to_be_bytes());
    Ok(Reply::Data { bytes, allocation: SHORT as u64 })
}

pub(crate) fn read_capacity_16(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const LBPME: u16 = 1 << 15;
    const LBPRZ: u16 = 1 << 14;
    let medium = unit.ready()?;
    if cmd.cdb.be64(2) != 0 && !cmd.cdb.bit(14, 0) {
        return Err(Sense::cdb(2).into());
    }
    let mut bytes = vec![0; 32];
    put(&mut bytes, 0, (medium.blocks - 1).to_be_bytes());
    put(&mut bytes, 8, unit.block_size().to_be_bytes());
    if let Kind::Disk(disk) = &unit.kind {
        bytes[13] = disk.physical_exponent;
        let provisioning = match disk.unmap {
            None => 0,
            Some(unmap) if unmap.reads_zeroes => LBPME | LBPRZ,
            Some(_) => LBPME,
        };
        put(&mut bytes, 14, (provisioning | (disk.lowest_aligned & 0x3fff)).to_be_bytes());
    }
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be32(10).into() })
}
