//! REQUEST SENSE, REPORT LUNS, and what commands there are (SPC-4, 6.33, 6.35, 6.36 and 6.39).

use crate::cdb::Cdb;
use crate::commands::{self, Command};
use crate::sense::Sense;
use crate::target::Lun;
use crate::task::{Cmd, Outcome, Reply};
use crate::unit::Unit;

/// A pending unit attention is reported with this, too (SPC-4, 6.39).
pub(crate) fn request_sense(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let sense = unit.nexus_mut(cmd.nexus).attentions.take().unwrap_or(Sense::NONE);
    Ok(sense_data(cmd, sense))
}

/// `sense` as the parameter data of REQUEST SENSE.
pub(crate) fn sense_data(cmd: &Cmd<'_>, sense: Sense) -> Reply {
    const DESC: u8 = 0;
    let sense = sense.encode(cmd.cdb.bit(1, DESC));
    Reply::Data { bytes: sense.as_bytes().to_vec(), allocation: cmd.cdb.byte(4).into() }
}

/// A unit by itself is LUN 0; [`crate::Target`] knows better.
pub(crate) fn luns_of_one(_: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    luns(cmd, &[Lun::ZERO])
}

/// SPC-4, 6.33.
pub(crate) fn luns(cmd: &Cmd<'_>, luns: &[Lun]) -> Outcome {
    // SELECT REPORT: all but well known ones, these only (there are none), all.
    let luns = match cmd.cdb.byte(2) {
        0x00 | 0x02 => luns,
        0x01 => &[],
        _ => return Err(Sense::cdb(2).into()),
    };
    let mut bytes = (luns.len() as u32 * 8).to_be_bytes().to_vec();
    bytes.extend([0; 4]);
    for lun in luns {
        bytes.extend(lun.encode());
        bytes.extend([0; 6]);
    }
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be32(6).into() })
}

/// Of a command timeouts descriptor; no command has any (SPC-4, 6.35.4).
const TIMEOUTS: [u8; 12] = [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// SPC-4, 6.35.
pub(crate) fn operation_codes(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const RCTD: u8 = 7;
    let timeouts = cmd.cdb.bit(2, RCTD);
    let bytes = match cmd.cdb.byte(2) & 0x07 {
        0 => all_codes(unit, timeouts),
        options @ 1..=3 => one_code(unit, cmd.cdb, options, timeouts)?,
        _ => return Err(Sense::cdb_bit(2, 2).into()),
    };
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be32(6).into() })
}

fn all_codes(unit: &Unit, timeouts: bool) -> Vec<u8> {
    const SERVACTV: u8 = 1 << 0;
    const CTDP: u8 = 1 << 1;
    let mut body = Vec::new();
    for command in commands::commands(unit) {
        let [high, low] = (command.usage.len() as u16).to_be_bytes();
        let flags = if command.service_action.is_some() { SERVACTV } else { 0 };
        let flags = flags | if timeouts { CTDP } else { 0 };
        body.extend([command.opcode, 0, 0, command.service_action.unwrap_or(0), 0, flags, high, low]);
        if timeouts {
            body.extend(TIMEOUTS);
        }
    }
    let mut bytes = (body.len() as u32).to_be_bytes().to_vec();
    bytes.extend(body);
    bytes
}

/// One command: an operation code without service actions, one with them, or, of SPC-5, either.
fn one_code(unit: &Unit, cdb: &Cdb, options: u8, timeouts: bool) -> Result<Vec<u8>, Sense> {
    const NOT_SUPPORTED: u8 = 1;
    const AS_STANDARD: u8 = 3;
    const CTDP: u8 = 1 << 7;
    let (opcode, service_action) = (cdb.byte(3), cdb.be16(4));
    let mut same: Vec<&Command> = commands::commands(unit).filter(|one| one.opcode == opcode).collect();
    let has_service_actions = same.iter().any(|one| one.service_action.is_some());
    match (options, has_service_actions) {
        (1, true) => return Err(Sense::cdb_bit(2, 2)),
        (2, false) if !same.is_empty() => return Err(Sense::cdb_bit(2, 2)),
        (3, false) if service_action != 0 => same.clear(),
        _ => same.retain(|one| one.service_action.is_none_or(|action| u16::from(action) == service_action)),
    }
    let Some(command) = same.first() else { return Ok(vec![0, NOT_SUPPORTED, 0, 0]) };
    let [high, low] = (command.usage.len() as u16).to_be_bytes();
    let mut bytes = vec![0, AS_STANDARD | if timeouts { CTDP } else { 0 }, high, low];
    bytes.extend(command.usage);
    if timeouts {
        bytes.extend(TIMEOUTS);
    }
    Ok(bytes)
}

/// SPC-4, 6.36: what [`crate::TaskManagement`] has, and nothing more.
pub(crate) fn task_management_functions(_: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const REPD: u8 = 7;
    const ABORT_TASK: u8 = 1 << 7;
    const ABORT_TASK_SET: u8 = 1 << 6;
    const CLEAR_TASK_SET: u8 = 1 << 4;
    const LOGICAL_UNIT_RESET: u8 = 1 << 3;
    const QUERY_TASK: u8 = 1 << 2;
    /// Of the second byte.
    const QUERY_TASK_SET: u8 = 1 << 1;
    const I_T_NEXUS_RESET: u8 = 1 << 0;
    if cmd.cdb.be32(6) < 4 {
        return Err(Sense::cdb(6).into());
    }
    let functions = [
        ABORT_TASK | ABORT_TASK_SET | CLEAR_TASK_SET | LOGICAL_UNIT_RESET | QUERY_TASK,
        QUERY_TASK_SET | I_T_NEXUS_RESET,
    ];
    let mut bytes = vec![0; if cmd.cdb.bit(2, REPD) { 16 } else { 4 }];
    bytes[..2].copy_from_slice(&functions);
    // The timeouts that REPD asks for are not known: zeroes.
    bytes[3] = bytes.len() as u8 - 4;
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be32(6).into() })
}
