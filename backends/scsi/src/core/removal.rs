//! Starting, stopping, locking and ejecting (SPC-4, 6.47; SBC-3, 5.10 and 5.25; MMC-6, START STOP UNIT).

use crate::sense::Sense;
use crate::task::{Action, Cmd, Outcome, Reply};
use crate::unit::Unit;

pub(crate) fn test_unit_ready(unit: &mut Unit, _: &Cmd<'_>) -> Outcome {
    unit.ready()?;
    Ok(Reply::Good)
}

/// With IMMED the answer may come before the end; it need not.
pub(crate) fn start_stop_unit(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const NO_FLUSH: u8 = 2;
    const LOEJ: u8 = 1;
    const START: u8 = 0;
    // POWER CONDITION: there is one, active.
    if cmd.cdb.byte(4) >> 4 != 0 {
        return Err(Sense::cdb_bit(4, 7).into());
    }
    let start = cmd.cdb.bit(4, START);
    match (cmd.cdb.bit(4, LOEJ), start) {
        (true, _) if !unit.is_removable() => Err(Sense::cdb_bit(4, LOEJ).into()),
        (true, true) => Ok(load(unit)),
        (true, false) => eject(unit),
        // A drive that does not turn is always at speed.
        (false, _) if unit.is_cd() => {
            if start {
                unit.ready()?;
            }
            Ok(Reply::Good)
        }
        (false, _) if !unit.has_medium() => {
            Err(unit.ready().err().unwrap_or(Sense::MEDIUM_NOT_PRESENT).into())
        }
        (false, start) => Ok(spin(unit, start, !start && !cmd.cdb.bit(4, NO_FLUSH))),
    }
}

fn spin(unit: &mut Unit, start: bool, flush: bool) -> Reply {
    let mut actions = Vec::new();
    if flush {
        actions.push(Action::Flush);
    }
    if unit.stopped == start {
        unit.stopped = !start;
        actions.push(unit.saved());
    }
    Reply::Control { actions, used: 0 }
}

fn load(unit: &mut Unit) -> Reply {
    let mut actions = Vec::new();
    if std::mem::take(&mut unit.tray_open) || !unit.has_medium() {
        actions.extend([unit.saved(), Action::Closed]);
    }
    Reply::Control { actions, used: 0 }
}

/// Whoever has locked it: an initiator unlocks it first if it means it (MMC-6, PREVENT ALLOW MEDIUM REMOVAL).
fn eject(unit: &mut Unit) -> Outcome {
    if unit.is_locked() {
        return Err(Sense::MEDIUM_REMOVAL_PREVENTED.into());
    }
    if unit.is_tray_open() {
        return Ok(Reply::Good);
    }
    let mut actions = Vec::new();
    if unit.has_medium() && !unit.is_cd() {
        actions.push(Action::Flush);
    }
    unit.take_out();
    actions.extend([unit.saved(), Action::Ejected]);
    Ok(Reply::Control { actions, used: 0 })
}

/// Each initiator holds the tray by itself (SBC-3, 5.10). A fixed disk is held anyway.
pub(crate) fn prevent_allow(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    // PREVENT: a persistent one is for changers (MMC-6).
    if cmd.cdb.bit(4, 1) {
        return Err(Sense::cdb_bit(4, 1).into());
    }
    let prevents = cmd.cdb.bit(4, 0);
    let state = unit.nexus_mut(cmd.nexus);
    let changed = std::mem::replace(&mut state.prevents, prevents) != prevents;
    let actions = if changed { vec![unit.saved()] } else { Vec::new() };
    Ok(Reply::Control { actions, used: 0 })
}
