//! GET CONFIGURATION: profiles and features (MMC-6, clause 5).

use super::is_dvd;
use crate::cdb::put;
use crate::sense::Sense;
use crate::task::{Cmd, Outcome, Reply};
use crate::unit::Unit;

const CD_ROM: u16 = 0x0008;
const DVD_ROM: u16 = 0x0010;

/// One feature: its code, its version, whether it is there whatever the medium, whether it is now, its own data.
struct Feature {
    code: u16,
    version: u8,
    persistent: bool,
    current: bool,
    data: Vec<u8>,
}

impl Feature {
    /// MMC-6, feature descriptor.
    fn encode(&self) -> Vec<u8> {
        let [high, low] = self.code.to_be_bytes();
        let flags = self.version << 2 | u8::from(self.persistent) << 1 | u8::from(self.current);
        let mut bytes = vec![high, low, flags, self.data.len() as u8];
        bytes.extend(&self.data);
        bytes
    }
}

pub(crate) fn get_configuration(unit: &mut Unit, cmd: &Cmd<'_>) -> Outcome {
    let (rt, start) = (cmd.cdb.byte(1) & 0x03, cmd.cdb.be16(2));
    let features = features(unit);
    let wanted = |feature: &&Feature| match rt {
        0 => feature.code >= start,
        1 => feature.code >= start && feature.current,
        _ => feature.code == start,
    };
    if rt == 3 {
        return Err(Sense::cdb_bit(1, 1).into());
    }
    let mut bytes = vec![0; 8];
    put(&mut bytes, 6, current_profile(unit).to_be_bytes());
    bytes.extend(features.iter().filter(wanted).flat_map(Feature::encode));
    let len = bytes.len() as u32 - 4;
    put(&mut bytes, 0, len.to_be_bytes());
    Ok(Reply::Data { bytes, allocation: cmd.cdb.be16(7).into() })
}

fn current_profile(unit: &Unit) -> u16 {
    match unit.medium {
        None => 0,
        Some(medium) if is_dvd(medium) => DVD_ROM,
        Some(_) => CD_ROM,
    }
}

/// In the order of their codes.
fn features(unit: &Unit) -> Vec<Feature> {
    let profile = current_profile(unit);
    let always = |code, version, data| Feature { code, version, persistent: true, current: true, data };
    let with_medium =
        |code, version, current, data| Feature { code, version, persistent: false, current, data };
    let profiles = [DVD_ROM, CD_ROM].into_iter().flat_map(|one| {
        let [high, low] = one.to_be_bytes();
        [high, low, u8::from(one == profile), 0]
    });
    vec![
        // Profile list, core (SCSI family; DBE, INQ2), morphing, removable medium (tray, eject, lock).
        always(0x0000, 0, profiles.collect()),
        always(0x0001, 2, vec![0, 0, 0, 1, 0x03, 0, 0, 0]),
        always(0x0002, 1, vec![0x02, 0, 0, 0]),
        always(0x0003, 0, vec![0x29, 0, 0, 0]),
        // Random readable: block size, blocking, page present.
        with_medium(0x0010, 0, profile != 0, vec![0, 0, 0x08, 0, 0, 1, 0, 0]),
        with_medium(0x001e, 2, profile == CD_ROM, vec![0, 0, 0, 0]),
        with_medium(0x001f, 0, profile == DVD_ROM, Vec::new()),
        // Power management and timeout.
        always(0x0100, 0, Vec::new()),
        always(0x0105, 0, Vec::new()),
    ]
}
