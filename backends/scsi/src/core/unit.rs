//! A logical unit: a disk (SBC-3) or a CD-ROM drive (MMC-6), and what each initiator does not know of it yet.
//!
//! ```text
//!              load                  START STOP UNIT, START 0
//!   no medium ------> ready <----------------------------------> stopped      (disks)
//!    |  ^   ^           |                 START 1
//!    |  |   `---eject---'   not while any initiator prevents it, unless it is forced
//!    v  |  START STOP UNIT, LOEJ 1
//!   tray closed, open (CD-ROM and removable disks)
//! ```
//!
//! A command is looked at in this order: unit attention, operation code, reservations, then its own fields.
//!
//! Invariants: an open tray has no medium, a disk that is not removable always has one; a unit attention is reported to a
//! nexus once; nothing here waits.

use crate::attention::{Attention, Attentions};
use crate::cd::event::MediaEvent;
use crate::commands;
use crate::config::{CD_BLOCK, ConfigError, Disk, Identity, Medium};
use crate::mode::Modes;
use crate::reservations::Reservations;
use crate::sense::Sense;
use crate::task::{Action, Attribute, Cmd, Gathering, Nexus, Outcome, Refusal, Request, Step};
use crate::{cdb::Cdb, state};

/// What it is, to its last difference.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Disk(Disk),
    Cd,
}

/// What one initiator has to do with the unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NexusState {
    pub(crate) nexus: Nexus,
    pub(crate) attentions: Attentions,
    /// It prevents removal of the medium.
    pub(crate) prevents: bool,
    pub(crate) media_event: Option<MediaEvent>,
}

/// Why the host may not have the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EjectError {
    #[error("the guest has locked the tray; it has been asked to eject (force it, or eject it in the guest)")]
    Locked,
    #[error("the medium cannot be removed: it is a fixed disk")]
    Fixed,
}

/// Why a unit is set back to what it was at first (SAM-5, clause 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// The whole device: the guest's machine has been reset or its driver has reset the controller.
    Hard,
    /// The LOGICAL UNIT RESET task management function.
    LogicalUnit,
    /// The nexus is gone: its tray lock goes with it.
    NexusLoss(Nexus),
}

/// A logical unit.
#[derive(Debug)]
pub struct Unit {
    pub(crate) identity: Identity,
    pub(crate) kind: Kind,
    pub(crate) medium: Option<Medium>,
    pub(crate) tray_open: bool,
    pub(crate) stopped: bool,
    pub(crate) modes: Modes,
    pub(crate) nexuses: Vec<NexusState>,
    pub(crate) reservations: Reservations,
}

impl Unit {
    /// A disk with `medium` in it.
    ///
    /// # Errors
    /// The description contradicts itself.
    pub fn disk(identity: Identity, disk: Disk, medium: Option<Medium>) -> Result<Self, ConfigError> {
        disk.check(medium)?;
        let modes = Modes::new(disk.write_cache.enabled);
        Ok(Self::new(identity, Kind::Disk(disk), medium, modes))
    }

    /// A CD-ROM or DVD drive, whichever `medium` asks for.
    ///
    /// # Errors
    /// The medium has no block.
    pub fn cd(identity: Identity, medium: Option<Medium>) -> Result<Self, ConfigError> {
        medium.map_or(Ok(()), |medium| medium.check(CD_BLOCK))?;
        Ok(Self::new(identity, Kind::Cd, medium, Modes::new(false)))
    }

    fn new(identity: Identity, kind: Kind, medium: Option<Medium>, modes: Modes) -> Self {
        Self {
            identity,
            kind,
            medium,
            tray_open: false,
            stopped: false,
            modes,
            nexuses: Vec::new(),
            reservations: Reservations::default(),
        }
    }

    /// Looks at a command, and does what can be done at once.
    pub fn execute(&mut self, request: &Request<'_>) -> Step {
        let cdb = Cdb::new(request.cdb);
        let &Request { nexus, data_out, data_in, attribute, .. } = request;
        let cmd = Cmd { nexus, cdb: &cdb, data_out, data_in, list: None };
        let outcome = self.admit(&cmd, attribute).and_then(|()| self.run(&cmd));
        cmd.step(outcome, self.modes.descriptor_sense, self.block_size())
    }

    /// Goes on with a command, with the first bytes of data-out.
    pub fn resume(&mut self, command: &Gathering, list: &[u8]) -> Step {
        let &Gathering { nexus, ref cdb, data_out, data_in, len } = command;
        let list = Some(&list[..list.len().min(len)]);
        let cmd = Cmd { nexus, cdb, data_out, data_in, list };
        let outcome = self.run(&cmd);
        cmd.step(outcome, self.modes.descriptor_sense, self.block_size())
    }

    /// What comes before the command itself.
    fn admit(&mut self, cmd: &Cmd<'_>, attribute: Attribute) -> Result<(), Refusal> {
        // There is no ACA condition ever (SAM-5, task attributes).
        if attribute == Attribute::Aca {
            return Err(Sense::INVALID_MESSAGE.into());
        }
        if self.nexus_mut(cmd.nexus).attentions.is_empty()
            || commands::find(cmd.cdb, self).is_ok_and(|command| command.passes_attention)
        {
            return Ok(());
        }
        self.nexus_mut(cmd.nexus).attentions.take().map_or(Ok(()), |sense| Err(sense.into()))
    }

    fn run(&mut self, cmd: &Cmd<'_>) -> Outcome {
        let command = commands::find(cmd.cdb, self)?;
        if cmd.cdb.len() < command.usage.len() {
            return Err(Sense::INVALID_FIELD_IN_CDB.into());
        }
        // A command that has been let in stays in (SPC-4, 5.13.1).
        let arrives = cmd.list.is_none();
        if arrives && self.reservations.conflicts(cmd.nexus, command.access(cmd.cdb)) {
            return Err(Refusal::Conflict);
        }
        command.check_control(cmd.cdb)?;
        (command.run)(self, cmd)
    }

    /// What the unit knows of a nexus; one that is new has all to learn.
    pub(crate) fn nexus_mut(&mut self, nexus: Nexus) -> &mut NexusState {
        let at = self.nexuses.iter().position(|state| state.nexus == nexus);
        let at = at.unwrap_or_else(|| {
            let mut attentions = Attentions::default();
            attentions.establish(Attention::PowerOn);
            self.nexuses.push(NexusState { nexus, attentions, prevents: false, media_event: None });
            self.nexuses.len() - 1
        });
        &mut self.nexuses[at]
    }

    /// A nexus that has used a predecessor of this unit: nothing has happened that it should be told.
    pub fn introduce(&mut self, nexus: Nexus) {
        if self.nexuses.iter().all(|state| state.nexus != nexus) {
            self.nexus_mut(nexus).attentions = Attentions::default();
        }
    }

    /// The nexus will not come back, or as a new one. Its registration stays until somebody preempts it.
    pub fn forget(&mut self, nexus: Nexus) {
        self.nexuses.retain(|state| state.nexus != nexus);
    }

    pub(crate) fn tell(&mut self, nexus: Nexus, attention: Attention) {
        self.nexus_mut(nexus).attentions.establish(attention);
    }

    pub(crate) fn tell_all(&mut self, attention: Attention) {
        self.nexuses.iter_mut().for_each(|state| state.attentions.establish(attention));
    }

    pub(crate) fn tell_others(&mut self, nexus: Nexus, attention: Attention) {
        let others = self.nexuses.iter_mut().filter(|state| state.nexus != nexus);
        others.for_each(|state| state.attentions.establish(attention));
    }

    pub(crate) fn is_cd(&self) -> bool {
        matches!(self.kind, Kind::Cd)
    }

    /// Bytes.
    pub fn block_size(&self) -> u32 {
        match &self.kind {
            Kind::Disk(disk) => disk.block_size,
            Kind::Cd => CD_BLOCK,
        }
    }

    pub(crate) fn is_removable(&self) -> bool {
        match &self.kind {
            Kind::Disk(disk) => disk.removable,
            Kind::Cd => true,
        }
    }

    /// Whether a medium is in it.
    pub fn has_medium(&self) -> bool {
        self.medium.is_some()
    }

    /// Whether the tray is open: the initiator, or [`Unit::eject`], has opened it.
    pub fn is_tray_open(&self) -> bool {
        self.tray_open
    }

    /// Whether an initiator prevents removal of the medium.
    pub fn is_locked(&self) -> bool {
        self.nexuses.iter().any(|state| state.prevents)
    }

    /// Whether a write may complete while it is in a volatile cache only.
    pub fn write_cache(&self) -> bool {
        self.modes.write_cache
    }

    /// The medium, if commands can use it.
    pub(crate) fn ready(&self) -> Result<Medium, Sense> {
        match self.medium {
            Some(_) if self.stopped => Err(Sense::INITIALIZING_COMMAND_REQUIRED),
            Some(medium) => Ok(medium),
            None if !self.is_cd() => Err(Sense::MEDIUM_NOT_PRESENT),
            None if self.tray_open => Err(Sense::MEDIUM_NOT_PRESENT_TRAY_OPEN),
            None => Err(Sense::MEDIUM_NOT_PRESENT_TRAY_CLOSED),
        }
    }

    /// Whether nothing can be written, for whatever reason.
    pub(crate) fn is_write_protected(&self) -> bool {
        self.is_cd()
            || self.modes.software_write_protect
            || self.medium.is_some_and(|medium| medium.read_only)
    }

    pub(crate) fn reservations(&self) -> &Reservations {
        &self.reservations
    }

    pub(crate) fn reservations_mut(&mut self) -> &mut Reservations {
        &mut self.reservations
    }

    /// The medium has so many blocks now. Initiators are told.
    ///
    /// # Errors
    /// There is none, or it would be none.
    pub fn resize(&mut self, blocks: u64) -> Result<(), ConfigError> {
        let medium = Medium { blocks, ..self.medium.ok_or(ConfigError::NoMedium)? };
        medium.check(self.block_size())?;
        if self.medium != Some(medium) {
            self.medium = Some(medium);
            self.tell_all(Attention::CapacityChanged);
        }
        Ok(())
    }

    /// Puts a medium in, in place of one that may be there, and closes the tray. Initiators are told.
    ///
    /// # Errors
    /// It is not removable, or has no block.
    pub fn load(&mut self, medium: Medium) -> Result<(), ConfigError> {
        if !self.is_removable() {
            return Err(ConfigError::Fixed);
        }
        medium.check(self.block_size())?;
        (self.medium, self.tray_open, self.stopped) = (Some(medium), false, false);
        self.tell_all(Attention::MediumMayHaveChanged);
        self.media_event(MediaEvent::NewMedia);
        Ok(())
    }

    /// Takes the medium out and opens the tray, whoever holds it shut if `force`.
    ///
    /// # Errors
    /// It is locked: the initiators are asked to eject it themselves. Or there is nothing to take out.
    pub fn eject(&mut self, force: bool) -> Result<(), EjectError> {
        if !self.is_removable() {
            return Err(EjectError::Fixed);
        }
        if self.is_locked() && !force {
            match self.is_cd() {
                true => self.media_event(MediaEvent::EjectRequest),
                false => self.tell_all(Attention::RemovalRequested),
            }
            return Err(EjectError::Locked);
        }
        self.take_out();
        Ok(())
    }

    pub(crate) fn take_out(&mut self) {
        if self.medium.take().is_some() {
            self.media_event(MediaEvent::MediaRemoval);
        }
        self.tray_open = true;
        self.stopped = false;
    }

    fn media_event(&mut self, event: MediaEvent) {
        self.nexuses.iter_mut().for_each(|state| state.media_event = Some(event));
    }

    /// What has to be true again after a reset. Reservations stay (SPC-4, 5.13.1). The caller ends the tasks first.
    pub fn reset(&mut self, reset: Reset) {
        let attention = match reset {
            Reset::NexusLoss(nexus) => {
                let state = self.nexus_mut(nexus);
                state.prevents = false;
                return state.attentions.establish(Attention::NexusLoss);
            }
            Reset::Hard => Attention::PowerOn,
            Reset::LogicalUnit => Attention::LogicalUnitReset,
        };
        self.nexuses.iter_mut().for_each(|state| state.prevents = false);
        self.stopped = false;
        let mut write_cache = matches!(&self.kind, Kind::Disk(disk) if disk.write_cache.enabled);
        // The standard would have the default back. But an error handler resets units under those who use them, and whoever
        // has switched the cache off does not flush it.
        if reset == Reset::LogicalUnit {
            write_cache &= self.modes.write_cache;
        }
        self.modes = Modes::new(write_cache);
        self.tell_all(attention);
    }

    /// A task management function of another nexus has ended tasks of `nexus`, without an answer to them: it is told
    /// (SAM-5, aborting commands).
    pub fn commands_cleared(&mut self, nexus: Nexus) {
        self.tell(nexus, Attention::CommandsCleared);
    }

    /// What a successor has to know to go on where this one stops.
    pub fn state(&self) -> state::State {
        state::State::of(self)
    }

    /// The actions of a command that has changed what a successor has to know.
    pub(crate) fn saved(&self) -> Action {
        Action::Save(Box::new(self.state()))
    }
}
