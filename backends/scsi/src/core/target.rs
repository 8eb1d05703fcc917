//! A target: logical units by number, and answers for numbers that have none (SAM-5, logical unit numbers; SPC-4, 6.33).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::attention::Attention;
use crate::cdb::Cdb;
use crate::inquiry;
use crate::management::TaskManagement;
use crate::report;
use crate::sense::Sense;
use crate::task::{Attribute, Cmd, Gathering, Nexus, Outcome, Request, Step};
use crate::unit::{Reset, Unit};

const INQUIRY: u8 = 0x12;
const REQUEST_SENSE: u8 = 0x03;
const REPORT_LUNS: u8 = 0xa0;

/// A logical unit number that fits into one level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lun(u16);

impl Lun {
    pub const ZERO: Self = Self(0);
    /// What flat space addressing can say.
    pub const MAX: Self = Self(0x3fff);

    /// `None`: past [`Lun::MAX`].
    pub fn new(number: u16) -> Option<Self> {
        (number <= Self::MAX.0).then_some(Self(number))
    }

    pub fn number(self) -> u16 {
        self.0
    }

    /// The first two bytes of an eight byte LUN; the others are zero. Linux and others want numbers below 256 in
    /// peripheral device addressing (SAM-5).
    pub fn encode(self) -> [u8; 2] {
        match self.0.to_be_bytes() {
            [0, low] => [0, low],
            [high, low] => [0x40 | high, low],
        }
    }

    /// In peripheral device or flat space addressing, whichever the initiator likes. `None`: no LUN is addressed so.
    pub fn decode(bytes: [u8; 2]) -> Option<Self> {
        match bytes {
            [0, low] => Some(Self(low.into())),
            [high, low] if high >> 6 == 1 => Some(Self(u16::from_be_bytes([high & 0x3f, low]))),
            _ => None,
        }
    }
}

/// There is no logical unit with this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no LUN {}", .0.0)]
pub struct NoSuchLun(pub Lun);

/// Logical units by number. Commands for different ones do not wait for each other.
#[derive(Debug, Default)]
pub struct Target {
    units: BTreeMap<Lun, Mutex<Unit>>,
}

fn locked<T>(unit: &Mutex<Unit>, act: impl FnOnce(&mut Unit) -> T) -> T {
    act(&mut unit.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Target {
    pub fn new() -> Self {
        Self::default()
    }

    /// Initiators of the other units are told.
    ///
    /// # Errors
    /// The number is taken; here is the unit back.
    pub fn add(&mut self, lun: Lun, unit: Unit) -> Result<(), Box<Unit>> {
        if self.units.contains_key(&lun) {
            return Err(Box::new(unit));
        }
        self.tell_inventory_changed();
        self.units.insert(lun, Mutex::new(unit));
        Ok(())
    }

    /// The caller ends the unit's tasks first. Initiators of the other units are told.
    pub fn remove(&mut self, lun: Lun) -> Option<Unit> {
        let unit = self.units.remove(&lun)?;
        self.tell_inventory_changed();
        Some(unit.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell_inventory_changed(&self) {
        for unit in self.units.values() {
            locked(unit, |unit| unit.tell_all(Attention::ReportedLunsChanged));
        }
    }

    pub fn luns(&self) -> impl Iterator<Item = Lun> {
        self.units.keys().copied()
    }

    /// # Errors
    /// There is no such unit.
    pub fn with<T>(&self, lun: Lun, act: impl FnOnce(&mut Unit) -> T) -> Result<T, NoSuchLun> {
        self.units.get(&lun).map(|unit| locked(unit, act)).ok_or(NoSuchLun(lun))
    }

    /// Looks at a command for `lun`, and does what can be done at once.
    pub fn execute(&self, lun: Lun, request: &Request<'_>) -> Step {
        if request.cdb.first() == Some(&REPORT_LUNS) && request.attribute != Attribute::Aca {
            return self.report_luns(request);
        }
        match self.with(lun, |unit| unit.execute(request)) {
            Ok(step) => step,
            Err(_) => stray(lun, request),
        }
    }

    /// Goes on with a command for `lun`, with the first bytes of data-out.
    pub fn resume(&self, lun: Lun, command: &Gathering, list: &[u8]) -> Step {
        match self.with(lun, |unit| unit.resume(command, list)) {
            Ok(step) => step,
            Err(_) => {
                let &Gathering { nexus, ref cdb, data_out, data_in, .. } = command;
                let cmd = Cmd { nexus, cdb, data_out, data_in, list: None };
                cmd.step(Err(Sense::LOGICAL_UNIT_NOT_SUPPORTED.into()), false, 0)
            }
        }
    }

    /// Whichever unit is asked. Whoever has the list has heard that it has changed (SPC-4, 6.33).
    fn report_luns(&self, request: &Request<'_>) -> Step {
        const LEN: usize = 12;
        let cdb = Cdb::new(request.cdb);
        let cmd = of(request, &cdb);
        let checked = match cdb.len() < LEN {
            true => Err(Sense::INVALID_FIELD_IN_CDB),
            false => cdb.refuse_bit(LEN - 1, 2),
        };
        let luns: Vec<Lun> = self.luns().collect();
        let outcome = checked.map_err(Into::into).and_then(|()| report::luns(&cmd, &luns));
        if outcome.is_ok() {
            let clear = |unit: &mut Unit| {
                unit.nexus_mut(request.nexus).attentions.clear(Attention::ReportedLunsChanged);
            };
            self.units.values().for_each(|unit| locked(unit, clear));
        }
        cmd.step(outcome, false, 0)
    }

    /// What a task management function of `from` does beside ending tasks, which the caller has done; `ended` are the
    /// nexuses that they came from.
    ///
    /// # Errors
    /// There is no such unit.
    pub fn manage(
        &self,
        from: Nexus,
        lun: Lun,
        function: TaskManagement,
        ended: &[Nexus],
    ) -> Result<(), NoSuchLun> {
        self.with(lun, |_| ())?;
        match function {
            TaskManagement::LogicalUnitReset => self.with(lun, |unit| unit.reset(Reset::LogicalUnit)),
            TaskManagement::ClearTaskSet => self.with(lun, |unit| {
                let others = ended.iter().filter(|nexus| **nexus != from);
                others.for_each(|nexus| unit.commands_cleared(*nexus));
            }),
            TaskManagement::NexusReset => {
                let lost = Reset::NexusLoss(from);
                self.units.values().for_each(|unit| locked(unit, |unit| unit.reset(lost)));
                Ok(())
            }
            TaskManagement::AbortTask(_)
            | TaskManagement::AbortTaskSet
            | TaskManagement::QueryTask(_)
            | TaskManagement::QueryTaskSet => Ok(()),
        }
    }
}

fn of<'a>(request: &Request<'_>, cdb: &'a Cdb) -> Cmd<'a> {
    let &Request { nexus, data_out, data_in, .. } = request;
    Cmd { nexus, cdb, data_out, data_in, list: None }
}

/// SPC-4, 6.6 and 6.39; SAM-5, incorrect logical unit numbers: INQUIRY and REQUEST SENSE are answered for numbers that have no unit, too.
fn stray(lun: Lun, request: &Request<'_>) -> Step {
    let cdb = Cdb::new(request.cdb);
    let cmd = of(request, &cdb);
    let outcome: Outcome = match cdb.opcode() {
        INQUIRY if cdb.len() != 0 => inquiry::of_nothing(&cmd, lun == Lun::ZERO),
        REQUEST_SENSE => Ok(report::sense_data(&cmd, Sense::LOGICAL_UNIT_NOT_SUPPORTED)),
        _ => Err(Sense::LOGICAL_UNIT_NOT_SUPPORTED.into()),
    };
    cmd.step(outcome, false, 0)
}

#[cfg(test)]
mod tests;
