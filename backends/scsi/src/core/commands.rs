//! The table of commands: which there are, for whom, and what REPORT SUPPORTED OPERATION CODES says of them.

mod table;

use crate::cdb::Cdb;
use crate::reservations::Access;
use crate::sense::Sense;
use crate::task::{Cmd, Outcome};
use crate::unit::Unit;
use table::COMMANDS;

/// The device types that have a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Devices {
    All,
    Disk,
    /// A disk that can give blocks back.
    ThinDisk,
    Cd,
}

impl Devices {
    fn include(self, unit: &Unit) -> bool {
        match self {
            Self::All => true,
            Self::Disk => !unit.is_cd(),
            Self::ThinDisk => unit.can_unmap(),
            Self::Cd => unit.is_cd(),
        }
    }
}

/// One command, or one service action of it.
pub(crate) struct Command {
    pub(crate) opcode: u8,
    pub(crate) service_action: Option<u8>,
    pub(crate) devices: Devices,
    pub(crate) access: Access,
    /// It is executed although a unit attention is pending, which stays (SAM-5, unit attention conditions; MMC-6 has two
    /// more such commands than SPC-4).
    pub(crate) passes_attention: bool,
    /// CDB usage data (SPC-4, 6.35.3): the bits that are looked at. Its length is the command's.
    pub(crate) usage: &'static [u8],
    pub(crate) run: fn(&mut Unit, &Cmd<'_>) -> Outcome,
}

impl Command {
    /// As it is in [`Command::access`], but for the commands for which a bit decides (SBC-4, table 13).
    pub(crate) fn access(&self, cdb: &Cdb) -> Access {
        const START_STOP_UNIT: u8 = 0x1b;
        const PREVENT_ALLOW_MEDIUM_REMOVAL: u8 = 0x1e;
        match self.opcode {
            START_STOP_UNIT if cdb.bit(4, 0) && cdb.byte(4) >> 4 == 0 => Access::Any,
            PREVENT_ALLOW_MEDIUM_REMOVAL if cdb.byte(4) & 0x03 == 0 => Access::Any,
            _ => self.access,
        }
    }

    /// Bits of its CONTROL byte that are set and not supported: no ACA, so no NACA (SAM-5, CONTROL byte).
    pub(crate) fn check_control(&self, cdb: &Cdb) -> Result<(), Sense> {
        cdb.refuse_bit(self.usage.len() - 1, 2)
    }
}

/// All commands of a unit.
pub(crate) fn commands(unit: &Unit) -> impl Iterator<Item = &'static Command> {
    COMMANDS.iter().filter(|command| command.devices.include(unit))
}

/// The command that `cdb` is.
///
/// # Errors
/// There is none, or none with this service action.
pub(crate) fn find(cdb: &Cdb, unit: &Unit) -> Result<&'static Command, Sense> {
    let mut opcode_known = false;
    let named = COMMANDS.iter().filter(|command| command.opcode == cdb.opcode());
    for command in named.filter(|command| command.devices.include(unit)) {
        match command.service_action {
            Some(service_action) if service_action != cdb.service_action() => opcode_known = true,
            _ => return Ok(command),
        }
    }
    Err(if opcode_known { Sense::cdb_bit(1, 4) } else { Sense::INVALID_OPERATION_CODE })
}
