//! PERSISTENT RESERVE OUT (SPC-4, 6.16).

use super::input::{TARGET_PORT, TRANSPORT_ID, nexus_of};
use super::{Change, Type};
use crate::cdb::{be16, be32, be64};
use crate::sense::Sense;
use crate::task::{Action, Cmd, Outcome, Parameters, Refusal, Reply};
use crate::unit::Unit;

/// Bytes of the parameter list of all service actions but REGISTER AND MOVE.
const LIST: usize = 24;

/// What a parameter list says (SPC-4, 6.16.3).
struct List {
    key: u64,
    service_key: u64,
    aptpl: bool,
}

pub(crate) fn register(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    with_list(unit, cmd, |unit, list| {
        unit.reservations_mut().register(cmd.nexus, list.key, list.service_key, false, list.aptpl)
    })
}

pub(crate) fn register_and_ignore(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    with_list(unit, cmd, |unit, list| {
        unit.reservations_mut().register(cmd.nexus, list.key, list.service_key, true, list.aptpl)
    })
}

pub(crate) fn reserve(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let kind = scope_and_type(cmd)?;
    with_list(unit, cmd, |unit, list| unit.reservations_mut().reserve(cmd.nexus, list.key, kind))
}

pub(crate) fn release(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let kind = scope_and_type(cmd)?;
    with_list(unit, cmd, |unit, list| unit.reservations_mut().release(cmd.nexus, list.key, kind))
}

pub(crate) fn clear(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    with_list(unit, cmd, |unit, list| unit.reservations_mut().clear(cmd.nexus, list.key))
}

pub(crate) fn preempt(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    preempt_with(unit, cmd, false)
}

pub(crate) fn preempt_and_abort(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    preempt_with(unit, cmd, true)
}

fn preempt_with(unit: &mut Unit, cmd: &Cmd<'_>, abort: bool) -> Outcome {
    let list = match plain_list(cmd)? {
        Ok(list) => list,
        Err(gather) => return Ok(gather),
    };
    let kind = scope_and_type(cmd);
    let change = unit.reservations_mut().preempt(cmd.nexus, list.key, list.service_key, kind)?;
    let mut preempted = Vec::new();
    if abort {
        preempted.clone_from(&change.preempted);
        // Nor do they hold the medium any more (SPC-4, 5.13.11.2.6).
        preempted.iter().for_each(|nexus| unit.nexus_mut(*nexus).prevents = false);
    }
    Ok(settle(unit, change, preempted, LIST))
}

/// SPC-4, 6.16.4. The new holder's TransportID follows 24 bytes that are laid out in another way; scope and type are
/// ignored.
pub(crate) fn register_and_move(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let len = cmd.cdb.be32(5) as usize;
    if len != LIST + TRANSPORT_ID {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    let list = match cmd.parameters(len)? {
        Parameters::Here(list) => list,
        Parameters::ToGather(gather) => return Ok(gather),
    };
    let (key, new) = (be64(list, 0), be64(list, 8));
    let (unregister, aptpl) = (list[17] & 0x02 != 0, list[17] & 0x01 != 0);
    if be16(list, 18) != TARGET_PORT {
        return Err(Sense::list(18).into());
    }
    if be32(list, 20) as usize != TRANSPORT_ID {
        return Err(Sense::list(20).into());
    }
    let mut id = [0; TRANSPORT_ID];
    id.copy_from_slice(&list[LIST..]);
    let to = nexus_of(&id).filter(|to| *to != cmd.nexus).ok_or_else(|| Sense::list(LIST))?;
    let change = unit.reservations_mut().move_to(cmd.nexus, key, new, to, unregister, aptpl)?;
    Ok(settle(unit, change, Vec::new(), len))
}

/// Only whole logical units can be reserved.
fn scope_and_type(cmd: &Cmd<'_>) -> Result<Type, Refusal> {
    let byte = cmd.cdb.byte(2);
    if byte >> 4 != 0 {
        return Err(Sense::cdb_bit(2, 7).into());
    }
    Type::from_code(byte & 0x0f).ok_or_else(|| Sense::cdb_bit(2, 3).into())
}

/// The list, or what is to be done to have it.
fn plain_list(cmd: &Cmd<'_>) -> Result<Result<List, Reply>, Refusal> {
    const SPEC_I_PT: u8 = 1 << 3;
    if cmd.cdb.be32(5) as usize != LIST {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR.into());
    }
    let list = match cmd.parameters(LIST)? {
        Parameters::Here(list) => list,
        Parameters::ToGather(gather) => return Ok(Err(gather)),
    };
    // Registering others is not offered (REPORT CAPABILITIES: SIP_C is 0).
    if list[20] & SPEC_I_PT != 0 {
        return Err(Sense::list_bit(20, 3).into());
    }
    Ok(Ok(List { key: be64(list, 0), service_key: be64(list, 8), aptpl: list[20] & 0x01 != 0 }))
}

fn with_list(
    unit: &mut Unit,
    cmd: &Cmd<'_>,
    act: impl FnOnce(&mut Unit, List) -> Result<Change, Refusal>,
) -> Outcome {
    match plain_list(cmd)? {
        Ok(list) => {
            let change = act(unit, list)?;
            Ok(settle(unit, change, Vec::new(), LIST))
        }
        Err(gather) => Ok(gather),
    }
}

/// Tells those who have to know, and has the caller keep what is now.
fn settle(unit: &mut Unit, change: Change, abort: Vec<crate::Nexus>, used: usize) -> Reply {
    for (nexus, attention) in change.told {
        unit.tell(nexus, attention);
    }
    let mut actions = Vec::new();
    if !abort.is_empty() {
        actions.push(Action::Abort(abort));
    }
    actions.push(Action::Save(Box::new(unit.state())));
    Reply::Control { actions, used: used as u64 }
}
