//! MODE SENSE (SPC-4, 6.13 and 6.14).

use super::{ALL, Values};
use crate::cdb::put;
use crate::sense::Sense;
use crate::task::{Cmd, Outcome, Reply};
use crate::unit::Unit;

/// Of byte 1.
const DBD: u8 = 3;
const LLBAA: u8 = 4;

pub(crate) fn mode_sense_6(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let pages = pages(unit, cmd)?;
    let descriptor = descriptor(unit, cmd, false);
    let mut bytes = vec![0, 0, device_specific(unit), descriptor.len() as u8];
    bytes.extend(descriptor);
    bytes.extend(pages);
    // All pages together are far from 255 bytes.
    bytes[0] = (bytes.len() - 1) as u8;
    Ok(Reply::Data { bytes, allocation: cmd.cdb.byte(4).into() })
}

pub(crate) fn mode_sense_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let pages = pages(unit, cmd)?;
    let long = cmd.cdb.bit(1, LLBAA) && !unit.is_cd();
    let descriptor = descriptor(unit, cmd, long);
    let mut bytes = vec![0, 0, 0, device_specific(unit), 0, 0, 0, descriptor.len() as u8];
    // LONGLBA is for descriptors that are there.
    bytes[4] = u8::from(long && !descriptor.is_empty());
    bytes.extend(descriptor);
    bytes.extend(pages);
    let len = (bytes.len() - 2) as u16;
    put(&mut bytes, 0, len.to_be_bytes());
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be16(7).into() })
}

/// WP and DPOFUA (SBC-3, device-specific parameter).
fn device_specific(unit: &Unit) -> u8 {
    match unit.is_cd() {
        true => 0,
        false => u8::from(unit.is_write_protected()) << 7 | 1 << 4,
    }
}

/// SBC-3, mode parameter block descriptors. CD-ROM drives have none (MMC-6).
fn descriptor(unit: &Unit, cmd: &Cmd<'_>, long: bool) -> Vec<u8> {
    if unit.is_cd() || cmd.cdb.bit(1, DBD) {
        return Vec::new();
    }
    let blocks = unit.medium.map_or(0, |medium| medium.blocks);
    if long {
        let mut bytes = vec![0; 16];
        put(&mut bytes, 0, blocks.to_be_bytes());
        put(&mut bytes, 12, unit.block_size().to_be_bytes());
        bytes
    } else {
        let mut bytes = vec![0; 8];
        put(&mut bytes, 4, unit.block_size().to_be_bytes());
        put(&mut bytes, 0, u32::try_from(blocks).unwrap_or(u32::MAX).to_be_bytes());
        bytes
    }
}

fn pages(unit: &Unit, cmd: &Cmd<'_>) -> Result<Vec<u8>, Sense> {
    let (code, subpage) = (cmd.cdb.byte(2) & 0x3f, cmd.cdb.byte(3));
    let values = match cmd.cdb.byte(2) >> 6 {
        0 => Values::Current,
        1 => Values::Changeable,
        2 => Values::Default,
        _ => return Err(Sense::SAVING_NOT_SUPPORTED),
    };
    // No page has subpages: all of them are the page.
    if subpage != 0x00 && subpage != 0xff {
        return Err(Sense::cdb(3));
    }
    // Header and block descriptor only (SPC-4, 6.13.1).
    if code == 0 && values == Values::Current {
        return Ok(Vec::new());
    }
    let wanted: Vec<u8> =
        unit.page_codes().iter().copied().filter(|page| code == ALL || code == *page).collect();
    if wanted.is_empty() {
        return Err(Sense::cdb_bit(2, 5));
    }
    Ok(wanted.into_iter().flat_map(|page| unit.page(page, values)).collect())
}
