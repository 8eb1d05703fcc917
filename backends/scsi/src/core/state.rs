//! What a unit's successor has to know: kept outside, versioned, and hostile when it comes back.

use crate::attention::Attentions;
use crate::cd::event::MediaEvent;
use crate::reservations::{Reservations, saved::Saved};
use crate::task::Nexus;
use crate::unit::{NexusState, Unit};

/// Of [`State`]. One that is newer is refused.
const VERSION: u32 = 1;

/// Most nexuses that a state may speak of.
const MAX_NEXUSES: usize = 256;

/// A unit's state, apart from what its description says. It is serialized as it is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    write_cache: bool,
    software_write_protect: bool,
    descriptor_sense: bool,
    stopped: bool,
    tray_open: bool,
    nexuses: Vec<SavedNexus>,
    reservations: Saved,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedNexus {
    nexus: Nexus,
    attentions: u16,
    prevents: bool,
    media_event: Option<MediaEvent>,
}

/// Why a unit starts with a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// It takes the place of a process that has ended: initiators are to notice nothing.
    Successor,
    /// Power was off: only reservations that were made to survive that do (APTPL).
    PowerOn,
}

/// A state that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error(
        "the saved state is of version {0}, and this program knows version 1: start it with the newer program, or without the state"
    )]
    Version(u32),
    #[error("the saved state has {0} initiators: no more than 256 are possible")]
    TooManyNexuses(usize),
    #[error("the saved state has {0} registrations: no more than 64 are possible")]
    TooManyRegistrants(usize),
    #[error("the saved state names an initiator twice")]
    RegisteredTwice,
    #[error("the saved state has a reservation key of zero")]
    ZeroKey,
    #[error("the saved state has a reservation whose holder is not registered")]
    HolderNotRegistered,
}

impl State {
    pub(crate) fn of(unit: &Unit) -> Self {
        let nexuses = unit.nexuses.iter().map(|state| SavedNexus {
            nexus: state.nexus,
            attentions: state.attentions.to_bits(),
            prevents: state.prevents,
            media_event: state.media_event,
        });
        Self {
            version: VERSION,
            write_cache: unit.modes.write_cache,
            software_write_protect: unit.modes.software_write_protect,
            descriptor_sense: unit.modes.descriptor_sense,
            stopped: unit.stopped,
            tray_open: unit.tray_open,
            nexuses: nexuses.collect(),
            reservations: Saved::from(unit.reservations()),
        }
    }

    fn nexuses(self) -> Result<Vec<NexusState>, StateError> {
        if self.nexuses.len() > MAX_NEXUSES {
            return Err(StateError::TooManyNexuses(self.nexuses.len()));
        }
        let mut names: Vec<Nexus> = self.nexuses.iter().map(|saved| saved.nexus).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(StateError::RegisteredTwice);
        }
        let nexuses = self.nexuses.into_iter();
        Ok(nexuses
            .map(|saved| NexusState {
                nexus: saved.nexus,
                attentions: Attentions::from_bits(saved.attentions),
                prevents: saved.prevents,
                media_event: saved.media_event,
            })
            .collect())
    }
}

impl Unit {
    /// Goes on where another stopped. Call it before the first command. A tray that was open has no medium.
    ///
    /// # Errors
    /// The state is of a later version, or contradicts itself; the unit is as before.
    pub fn restore(&mut self, state: State, restart: Restart) -> Result<(), StateError> {
        if state.version != VERSION {
            return Err(StateError::Version(state.version));
        }
        let mut reservations = Reservations::try_from(state.reservations.clone())?;
        if restart == Restart::PowerOn {
            reservations.power_on();
            self.reservations = reservations;
            return Ok(());
        }
        let (write_cache, switchable) = (state.write_cache, self.can_switch_write_cache());
        let (stopped, tray_open) = (state.stopped && !self.is_cd(), state.tray_open && self.is_removable());
        let (software_write_protect, descriptor_sense) = match self.is_cd() {
            true => (false, false),
            false => (state.software_write_protect, state.descriptor_sense),
        };
        self.nexuses = state.nexuses()?;
        self.reservations = reservations;
        if switchable {
            self.modes.write_cache = write_cache;
        }
        self.modes.software_write_protect = software_write_protect;
        self.modes.descriptor_sense = descriptor_sense;
        (self.stopped, self.tray_open) = (stopped, tray_open);
        if tray_open {
            self.medium = None;
        }
        Ok(())
    }
}
