//! GET EVENT STATUS NOTIFICATION: how a driver hears of media without asking for them (MMC-6).

use crate::sense::Sense;
use crate::task::{Cmd, Outcome, Reply};
use crate::unit::Unit;

/// What has happened to the medium since an initiator last asked (MMC-6, media event codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MediaEvent {
    /// Somebody has pressed the button: whoever holds the tray is asked to eject.
    EjectRequest,
    NewMedia,
    MediaRemoval,
}

impl MediaEvent {
    fn code(self) -> u8 {
        match self {
            Self::EjectRequest => 1,
            Self::NewMedia => 2,
            Self::MediaRemoval => 3,
        }
    }
}

/// The class of media events, and all the classes there are, as bits.
const MEDIA: u8 = 4;
const SUPPORTED: u8 = 1 << MEDIA;

pub(crate) fn get_event_status_notification(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    const POLLED: u8 = 0;
    /// No Event Available: none of the classes is supported.
    const NEA: u8 = 1 << 7;
    // Waiting for events is for those that tag their commands in another way.
    if !cmd.cdb.bit(1, POLLED) {
        return Err(Sense::cdb_bit(1, POLLED).into());
    }
    let allocation = u64::from(cmd.cdb.be16(7));
    if cmd.cdb.byte(4) & SUPPORTED == 0 {
        return Ok(Reply::Data { bytes: vec![0, 2, NEA, SUPPORTED], allocation });
    }
    // One who has no room for the event keeps it.
    let state = unit.nexus_mut(cmd.nexus);
    let event = match allocation.min(cmd.data_in) {
        ..=4 => None,
        _ => state.media_event.take(),
    };
    let status = u8::from(unit.is_tray_open()) | u8::from(unit.has_medium()) << 1;
    let bytes = vec![0, 6, MEDIA, SUPPORTED, event.map_or(0, MediaEvent::code), status, 0, 0];
    Ok(Reply::Data { bytes, allocation })
}
