//! Persistent reservations of one logical unit (SPC-4, 5.13).
//!
//! ```text
//!   unregistered ⇄ registered ──RESERVE──> holder          (all registrants types: every registered nexus is one)
//!        ^             ^  ^────RELEASE───────┘ |
//!        `───CLEAR─────┴──PREEMPT by another───┘
//! ```
//!
//! Invariants: the holder is registered; the reservation is gone when its last holder is; no key is zero; there are at
//! most [`MAX_REGISTRANTS`].

pub(crate) mod input;
pub(crate) mod output;
pub(crate) mod saved;

use crate::attention::Attention;
use crate::sense::Sense;
use crate::task::{Nexus, Refusal};

/// Most nexuses that can be registered.
pub(crate) const MAX_REGISTRANTS: usize = 64;

/// SPC-4, 6.15.3.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Type {
    WriteExclusive,
    ExclusiveAccess,
    WriteExclusiveRegistrantsOnly,
    ExclusiveAccessRegistrantsOnly,
    WriteExclusiveAllRegistrants,
    ExclusiveAccessAllRegistrants,
}

impl Type {
    const ALL: [Self; 6] = [
        Self::WriteExclusive,
        Self::ExclusiveAccess,
        Self::WriteExclusiveRegistrantsOnly,
        Self::ExclusiveAccessRegistrantsOnly,
        Self::WriteExclusiveAllRegistrants,
        Self::ExclusiveAccessAllRegistrants,
    ];

    pub(crate) fn code(self) -> u8 {
        match self {
            Self::WriteExclusive => 1,
            Self::ExclusiveAccess => 3,
            Self::WriteExclusiveRegistrantsOnly => 5,
            Self::ExclusiveAccessRegistrantsOnly => 6,
            Self::WriteExclusiveAllRegistrants => 7,
            Self::ExclusiveAccessAllRegistrants => 8,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// Reads of those that it keeps from writing are refused, too.
    fn is_exclusive_access(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess
                | Self::ExclusiveAccessRegistrantsOnly
                | Self::ExclusiveAccessAllRegistrants
        )
    }

    fn is_all_registrants(self) -> bool {
        matches!(self, Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants)
    }

    /// Whoever is registered may do what the holder may.
    fn is_for_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }
}

/// What a command does, as far as a reservation cares (SPC-4, table 65; SBC-4, table 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Allowed whoever holds what.
    Any,
    /// Looks at the medium, or at the unit as one who uses it does.
    Read,
    /// Changes one of them.
    Write,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registrant {
    pub(crate) nexus: Nexus,
    pub(crate) key: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) kind: Type,
    /// With an all registrants type: who made it, which means nothing any more.
    pub(crate) holder: Nexus,
}

/// What others have to be told, and whose tasks end.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) told: Vec<(Nexus, Attention)>,
    /// The nexuses whose reservation or registration was preempted: maybe the preempting one's own.
    pub(crate) preempted: Vec<Nexus>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Reservations {
    pub(crate) generation: u32,
    pub(crate) registrants: Vec<Registrant>,
    pub(crate) held: Option<Held>,
    /// It survives a loss of power.
    pub(crate) aptpl: bool,
}

impl Reservations {
    pub(crate) fn key_of(&self, nexus: Nexus) -> Option<u64> {
        self.registrants.iter().find(|registrant| registrant.nexus == nexus).map(|registrant| registrant.key)
    }

    pub(crate) fn is_holder(&self, nexus: Nexus) -> bool {
        self.held.is_some_and(|held| {
            if held.kind.is_all_registrants() { self.key_of(nexus).is_some() } else { held.holder == nexus }
        })
    }

    /// Whether a command of `nexus` conflicts (SPC-4, tables 65 and 66).
    pub(crate) fn conflicts(&self, nexus: Nexus, access: Access) -> bool {
        let Some(held) = self.held else { return false };
        let refused = match access {
            Access::Any => false,
            Access::Read => held.kind.is_exclusive_access(),
            Access::Write => true,
        };
        let allowed =
            || self.is_holder(nexus) || (held.kind.is_for_registrants() && self.key_of(nexus).is_some());
        refused && !allowed()
    }

    /// A key other than the nexus's own is a conflict, and so is one of a nexus that has none.
    fn check_key(&self, nexus: Nexus, key: u64) -> Result<(), Refusal> {
        if self.key_of(nexus) == Some(key) { Ok(()) } else { Err(Refusal::Conflict) }
    }

    /// REGISTER, and with `ignore` REGISTER AND IGNORE EXISTING KEY (SPC-4, 5.13.7, tables 67 and 68).
    pub(crate) fn register(
        &mut self,
        nexus: Nexus,
        key: u64,
        new: u64,
        ignore: bool,
        aptpl: bool,
    ) -> Result<Change, Refusal> {
        let existing = self.key_of(nexus);
        if !ignore && existing.unwrap_or(0) != key {
            return Err(Refusal::Conflict);
        }
        let change = match (existing, new) {
            (None, 0) => return Ok(Change::default()),
            (None, new) => {
                self.add(nexus, new)?;
                Change::default()
            }
            (Some(_), 0) => self.unregister(nexus),
            (Some(_), new) => {
                self.set_key(nexus, new);
                Change::default()
            }
        };
        self.aptpl = aptpl;
        self.generation = self.generation.wrapping_add(1);
        Ok(change)
    }

    fn add(&mut self, nexus: Nexus, key: u64) -> Result<(), Refusal> {
        if self.registrants.len() >= MAX_REGISTRANTS {
            return Err(Sense::INSUFFICIENT_REGISTRATION_RESOURCES.into());
        }
        self.registrants.push(Registrant { nexus, key });
        Ok(())
    }

    fn set_key(&mut self, nexus: Nexus, key: u64) {
        for registrant in self.registrants.iter_mut().filter(|registrant| registrant.nexus == nexus) {
            registrant.key = key;
        }
    }

    /// SPC-4, 5.13.11.2.3.
    fn unregister(&mut self, nexus: Nexus) -> Change {
        let held = self.held.filter(|_| self.is_holder(nexus));
        self.registrants.retain(|registrant| registrant.nexus != nexus);
        match held {
            // The others hold it on.
            Some(held) if held.kind.is_all_registrants() && !self.registrants.is_empty() => Change::default(),
            Some(held) => self.end(held.kind, nexus),
            None => Change::default(),
        }
    }

    /// The reservation ends; registered nexuses hear of it if it was theirs, too (SPC-4, 5.13.11.2.2).
    fn end(&mut self, kind: Type, by: Nexus) -> Change {
        self.held = None;
        let told = match kind.is_for_registrants() {
            true => self.others(by).map(|other| (other, Attention::ReservationsReleased)).collect(),
            false => Vec::new(),
        };
        Change { told, ..Change::default() }
    }

    fn others(&self, nexus: Nexus) -> impl Iterator<Item = Nexus> {
        self.registrants.iter().map(|registrant| registrant.nexus).filter(move |other| *other != nexus)
    }

    /// RESERVE (SPC-4, 5.13.9).
    pub(crate) fn reserve(&mut self, nexus: Nexus, key: u64, kind: Type) -> Result<Change, Refusal> {
        self.check_key(nexus, key)?;
        match self.held {
            None => self.held = Some(Held { kind, holder: nexus }),
            Some(held) if self.is_holder(nexus) && held.kind == kind => {}
            Some(_) => return Err(Refusal::Conflict),
        }
        Ok(Change::default())
    }

    /// RELEASE (SPC-4, 5.13.11.2.2).
    pub(crate) fn release(&mut self, nexus: Nexus, key: u64, kind: Type) -> Result<Change, Refusal> {
        self.check_key(nexus, key)?;
        match self.held {
            Some(held) if self.is_holder(nexus) && held.kind == kind => Ok(self.end(kind, nexus)),
            Some(_) if self.is_holder(nexus) => Err(Sense::INVALID_RELEASE.into()),
            _ => Ok(Change::default()),
        }
    }

    /// CLEAR (SPC-4, 5.13.11.2.7).
    pub(crate) fn clear(&mut self, nexus: Nexus, key: u64) -> Result<Change, Refusal> {
        self.check_key(nexus, key)?;
        let told = self.others(nexus).map(|other| (other, Attention::ReservationsPreempted)).collect();
        self.registrants.clear();
        self.held = None;
        self.generation = self.generation.wrapping_add(1);
        Ok(Change { told, ..Change::default() })
    }

    /// PREEMPT, and the reservations' part of PREEMPT AND ABORT (SPC-4, 5.13.11.2.4, table 72). The type counts only if
    /// the reservation changes hands.
    pub(crate) fn preempt(
        &mut self,
        nexus: Nexus,
        key: u64,
        victim: u64,
        kind: Result<Type, Refusal>,
    ) -> Result<Change, Refusal> {
        self.check_key(nexus, key)?;
        let change = match self.held {
            Some(held) if held.kind.is_all_registrants() && victim == 0 => {
                self.take_over(nexus, kind?, held.kind, |_| true)
            }
            Some(held) if !held.kind.is_all_registrants() && self.key_of(held.holder) == Some(victim) => {
                self.take_over(nexus, kind?, held.kind, |registrant| registrant.key == victim)
            }
            // Zero names no registration.
            _ if victim == 0 => return Err(Sense::list(8).into()),
            _ => self.remove(nexus, victim)?,
        };
        self.generation = self.generation.wrapping_add(1);
        Ok(change)
    }

    /// Registrations go and the reservation changes hands (SPC-4, 5.13.11.2.4.3). The preempting one keeps its own.
    fn take_over(
        &mut self,
        nexus: Nexus,
        kind: Type,
        before: Type,
        loses: impl Fn(&Registrant) -> bool,
    ) -> Change {
        let preempted: Vec<Nexus> = self.registrants.iter().filter(|r| loses(r)).map(|r| r.nexus).collect();
        self.registrants.retain(|registrant| registrant.nexus == nexus || !loses(registrant));
        self.held = Some(Held { kind, holder: nexus });
        let told = preempted.iter().filter(|other| **other != nexus);
        let mut told: Vec<_> = told.map(|other| (*other, Attention::RegistrationsPreempted)).collect();
        if before != kind {
            told.extend(self.others(nexus).map(|other| (other, Attention::ReservationsReleased)));
        }
        Change { told, preempted }
    }

    /// Registrations go, and with the last one of an all registrants type the reservation (SPC-4, 5.13.11.2.5).
    fn remove(&mut self, nexus: Nexus, victim: u64) -> Result<Change, Refusal> {
        let preempted: Vec<Nexus> =
            self.registrants.iter().filter(|r| r.key == victim).map(|r| r.nexus).collect();
        if preempted.is_empty() {
            return Err(Refusal::Conflict);
        }
        let told = preempted.iter().filter(|other| **other != nexus);
        let told = told.map(|other| (*other, Attention::RegistrationsPreempted)).collect();
        self.registrants.retain(|registrant| registrant.key != victim);
        if self.registrants.is_empty() {
            self.held = None;
        }
        Ok(Change { told, preempted })
    }

    /// REGISTER AND MOVE: registers `to` and gives it the reservation (SPC-4, 5.13.8, table 70).
    pub(crate) fn move_to(
        &mut self,
        nexus: Nexus,
        key: u64,
        new: u64,
        to: Nexus,
        unregister: bool,
        aptpl: bool,
    ) -> Result<Change, Refusal> {
        self.check_key(nexus, key)?;
        let held = self.held.ok_or(Sense::cdb_bit(1, 4))?;
        // Of an all registrants type there is no one holder that could give it away.
        if held.holder != nexus || held.kind.is_all_registrants() {
            return Err(Refusal::Conflict);
        }
        if new == 0 {
            return Err(Sense::list(8).into());
        }
        match self.key_of(to) {
            Some(_) => self.set_key(to, new),
            None => self.add(to, new)?,
        }
        self.held = Some(Held { holder: to, ..held });
        if unregister {
            self.registrants.retain(|registrant| registrant.nexus != nexus);
        }
        self.aptpl = aptpl;
        self.generation = self.generation.wrapping_add(1);
        Ok(Change::default())
    }

    /// Power was lost: what was not to survive has not.
    pub(crate) fn power_on(&mut self) {
        if !self.aptpl {
            *self = Self::default();
        }
        self.generation = 0;
    }
}

#[cfg(test)]
mod tests;
