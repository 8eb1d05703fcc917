//! Reservations as they are kept outside, and back: what comes back may be anything.

use std::collections::BTreeSet;

use super::{Held, MAX_REGISTRANTS, Registrant, Reservations, Type};
use crate::StateError;
use crate::task::Nexus;

#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Saved {
    generation: u32,
    survives_power_loss: bool,
    registrants: Vec<SavedRegistrant>,
    held: Option<SavedHeld>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedRegistrant {
    nexus: Nexus,
    key: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedHeld {
    kind: Type,
    holder: Nexus,
}

impl From<&Reservations> for Saved {
    fn from(from: &Reservations) -> Self {
        let registrants = from.registrants.iter();
        Self {
            generation: from.generation,
            survives_power_loss: from.aptpl,
            registrants: registrants
                .map(|&Registrant { nexus, key }| SavedRegistrant { nexus, key })
                .collect(),
            held: from.held.map(|Held { kind, holder }| SavedHeld { kind, holder }),
        }
    }
}

impl TryFrom<Saved> for Reservations {
    type Error = StateError;

    fn try_from(saved: Saved) -> Result<Self, StateError> {
        if saved.registrants.len() > MAX_REGISTRANTS {
            return Err(StateError::TooManyRegistrants(saved.registrants.len()));
        }
        if saved.registrants.iter().any(|one| one.key == 0) {
            return Err(StateError::ZeroKey);
        }
        let names: BTreeSet<Nexus> = saved.registrants.iter().map(|one| one.nexus).collect();
        if names.len() != saved.registrants.len() {
            return Err(StateError::RegisteredTwice);
        }
        // The maker of an all registrants reservation may have left it to the others.
        let held_well = match &saved.held {
            None => true,
            Some(held) if held.kind.is_all_registrants() => !names.is_empty(),
            Some(held) => names.contains(&held.holder),
        };
        if !held_well {
            return Err(StateError::HolderNotRegistered);
        }
        Ok(Self {
            generation: saved.generation,
            registrants: saved
                .registrants
                .into_iter()
                .map(|SavedRegistrant { nexus, key }| Registrant { nexus, key })
                .collect(),
            held: saved.held.map(|SavedHeld { kind, holder }| Held { kind, holder }),
            aptpl: saved.survives_power_loss,
        })
    }
}
