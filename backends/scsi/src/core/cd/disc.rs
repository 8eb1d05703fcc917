//! What the disc is, and the odd ways of reading it (MMC-6).

use super::is_dvd;
use crate::cdb::put;
use crate::config::{CD_BLOCK, Medium};
use crate::sense::Sense;
use crate::task::{Cmd, Io, Outcome, Range, Refusal, Reply};
use crate::unit::Unit;

/// READ DISC INFORMATION: one complete session on a finalized disc.
pub(crate) fn read_disc_information(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const COMPLETE_SESSION: u8 = 3 << 2;
    const FINALIZED: u8 = 2;
    unit.ready()?;
    // DATA TYPE: track and POW resources are for discs that can be written.
    if cmd.cdb.byte(1) & 0x07 != 0 {
        return Err(Sense::cdb_bit(1, 2).into());
    }
    let mut bytes = vec![0; 34];
    put(&mut bytes, 0, 32u16.to_be_bytes());
    bytes[2] = COMPLETE_SESSION | FINALIZED;
    // First track, sessions, first and last track of the last session.
    bytes[3..7].fill(1);
    // Where another session would start: nowhere.
    bytes[17..20].fill(0xff);
    bytes[21..24].fill(0xff);
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be16(7).into() })
}

/// READ DISC STRUCTURE: of a CD there is none, of a DVD the physical format and that it is not protected.
pub(crate) fn read_disc_structure(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const PHYSICAL: u8 = 0x00;
    const COPYRIGHT: u8 = 0x01;
    // MEDIA TYPE: of DVDs.
    if cmd.cdb.byte(1) & 0x0f != 0 {
        return Err(Sense::cdb_bit(1, 3).into());
    }
    let medium = unit.ready()?;
    if !is_dvd(medium) {
        return Err(Sense::INCOMPATIBLE_MEDIUM.into());
    }
    let body = match cmd.cdb.byte(7) {
        // LAYER NUMBER
        PHYSICAL if cmd.cdb.byte(6) != 0 => return Err(Sense::cdb(6).into()),
        PHYSICAL => physical_format(medium),
        COPYRIGHT => vec![0; 4],
        _ => return Err(Sense::cdb(7).into()),
    };
    let [high, low] = (body.len() as u16 + 2).to_be_bytes();
    let mut bytes = vec![high, low, 0, 0];
    bytes.extend(body);
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be16(8).into() })
}

/// Format 00h: a DVD-ROM of one layer.
fn physical_format(medium: Medium) -> Vec<u8> {
    /// Of 120 mm, any rate.
    const SIZE_AND_RATE: u8 = 0x0f;
    const READ_ONLY_LAYER: u8 = 0x01;
    /// Physical sector of the first block.
    const FIRST: u64 = 0x03_0000;
    let mut body = vec![0; 2048];
    // DVD-ROM, version 1.
    body[0] = 0x01;
    body[1] = SIZE_AND_RATE;
    body[2] = READ_ONLY_LAYER;
    put(&mut body, 4, (FIRST as u32).to_be_bytes());
    let last = u32::try_from(FIRST + medium.blocks - 1).unwrap_or(u32::MAX).min(0xff_ffff);
    put(&mut body, 8, last.to_be_bytes());
    body
}

/// MECHANISM STATUS, without slots.
pub(crate) fn mechanism_status(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const DOOR_OPEN: u8 = 1 << 4;
    let mut bytes = vec![0; 8];
    bytes[1] = if unit.is_tray_open() { DOOR_OPEN } else { 0 };
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be16(8).into() })
}

/// READ CD, of user data: there is nothing else in an image.
pub(crate) fn read_cd(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const USER_DATA: u8 = 0x10;
    const MODE_1: u8 = 2;
    let medium = unit.ready()?;
    // EXPECTED SECTOR TYPE: any, or mode 1.
    match (cmd.cdb.byte(1) >> 2) & 0x07 {
        0 | MODE_1 => {}
        _ => return Err(Sense::ILLEGAL_MODE_FOR_THIS_TRACK.into()),
    }
    let (lba, blocks) = (u64::from(cmd.cdb.be32(2)), u64::from(cmd.cdb.be24(6)));
    if lba >= medium.blocks || blocks > medium.blocks - lba {
        return Err(Sense::out_of_range(lba, medium.blocks).into());
    }
    match cmd.cdb.byte(9) & 0xfe {
        0 => return Ok(Reply::Good),
        USER_DATA => {}
        _ => return Err(Sense::cdb_bit(9, 7).into()),
    }
    // Sub-channel data.
    if cmd.cdb.byte(10) & 0x07 != 0 {
        return Err(Sense::cdb_bit(10, 2).into());
    }
    let bytes = u64::from(CD_BLOCK);
    let range = Range { offset: lba * bytes, len: blocks * bytes };
    if range.len == 0 {
        return Ok(Reply::Good);
    }
    if range.len > cmd.data_in {
        return Err(Refusal::Overrun { needed: range.len });
    }
    Ok(Reply::Io { io: Io::Read { range, fua: false }, used: range.len })
}

/// SET CD SPEED: any speed is as good.
pub(crate) fn set_cd_speed(_: &mut Unit, _: &Cmd<'_>) -> Outcome {
    Ok(Reply::Good)
}

/// SEEK (10): there is no head to move.
pub(crate) fn seek_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let medium = unit.ready()?;
    let lba = u64::from(cmd.cdb.be32(2));
    if lba >= medium.blocks {
        return Err(Sense::out_of_range(lba, medium.blocks).into());
    }
    Ok(Reply::Good)
}
