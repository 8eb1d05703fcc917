//! MODE SELECT (SPC-4, 6.11 and 6.12). All of a list is looked at before any of it is done.

use super::{CACHING, CONTROL, D_SENSE, Modes, SWP, Values, WCE, flag};
use crate::attention::Attention;
use crate::cdb::{be16, be32, be64};
use crate::sense::Sense;
use crate::task::{Action, Cmd, Outcome, Parameters, Reply};
use crate::unit::Unit;

pub(crate) fn mode_select_6(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    select(unit, cmd, cmd.cdb.byte(4).into(), 4)
}

pub(crate) fn mode_select_10(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    select(unit, cmd, cmd.cdb.be16(7).into(), 8)
}

/// `header`: bytes before the block descriptors.
fn select(unit: &mut Unit, cmd: &Cmd<'_>, len: usize, header: usize) -> Outcome {
    const PF: u8 = 4;
    const SP: u8 = 0;
    cmd.cdb.refuse_bit(1, SP)?;
    if !cmd.cdb.bit(1, PF) {
        return Err(Sense::cdb_bit(1, PF).into());
    }
    if len == 0 {
        return Ok(Reply::Good);
    }
    if len < header {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    let list = match cmd.parameters(len)? {
        Parameters::Here(list) => list,
        Parameters::ToGather(gather) => return Ok(gather),
    };
    let pages_at = header + descriptor(unit, list, header)?;
    let modes = pages(unit, list, pages_at)?;
    let mut actions = Vec::new();
    if modes != unit.modes {
        if unit.modes.write_cache && !modes.write_cache {
            // What is in the cache is not to stay there (SBC-3, caching page).
            actions.push(Action::Flush);
        }
        unit.modes = modes;
        unit.tell_others(cmd.nexus, Attention::ModeParametersChanged);
        actions.push(unit.saved());
    }
    Ok(Reply::Control { actions, used: len as u64 })
}

/// Bytes of block descriptors, which may say only what is so.
fn descriptor(unit: &Unit, list: &[u8], header: usize) -> Result<usize, Sense> {
    let (len, len_at, long) = match header {
        4 => (usize::from(list[3]), 3, false),
        _ => (usize::from(be16(list, 6)), 6, list[4] & 1 != 0),
    };
    let whole = if long { 16 } else { 8 };
    if len == 0 {
        return Ok(0);
    }
    if len != whole || unit.is_cd() {
        return Err(Sense::list(len_at));
    }
    let Some(descriptor) = list.get(header..header + len) else {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
    };
    let blocks = unit.medium.map_or(0, |medium| medium.blocks);
    let (named, unlimited, block_size, size_at) = match long {
        true => (be64(descriptor, 0), u64::MAX, be32(descriptor, 12), 12),
        false => (be32(descriptor, 0).into(), u32::MAX.into(), be32(descriptor, 4) & 0xff_ffff, 5),
    };
    // Zero leaves the number as it is, all ones are as many as possible (SBC-3).
    if named != 0 && named != unlimited && named != blocks {
        return Err(Sense::list(header));
    }
    if block_size != unit.block_size() {
        return Err(Sense::list(header + size_at));
    }
    Ok(len)
}

/// What the modes are after all pages from `at`.
fn pages(unit: &Unit, list: &[u8], mut at: usize) -> Result<Modes, Sense> {
    const SPF: u8 = 1 << 6;
    let mut modes = unit.modes;
    while at < list.len() {
        let rest = &list[at..];
        let code = rest[0] & 0x3f;
        if rest[0] & SPF != 0 || !unit.page_codes().contains(&code) {
            return Err(Sense::list_bit(at, if rest[0] & SPF != 0 { 6 } else { 5 }));
        }
        let current = unit.page(code, Values::Current);
        let Some(&len) = rest.get(1) else {
            return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
        };
        if usize::from(len) + 2 != current.len() {
            return Err(Sense::list(at + 1));
        }
        let Some(page) = rest.get(..current.len()) else {
            return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
        };
        let changeable = unit.page(code, Values::Changeable);
        for (index, byte) in page.iter().enumerate().skip(2) {
            let wrong = (byte ^ current[index]) & !changeable[index];
            if wrong != 0 {
                return Err(Sense::list_bit(at + index, wrong.ilog2() as u8));
            }
        }
        match code {
            CACHING => modes.write_cache = flag(WCE, page),
            CONTROL => {
                modes.descriptor_sense = flag(D_SENSE, page);
                modes.software_write_protect = flag(SWP, page);
            }
            _ => {}
        }
        at += current.len();
    }
    Ok(modes)
}
