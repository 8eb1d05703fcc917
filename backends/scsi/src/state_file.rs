//! `--state`: what a successor of this process has to know, in a file.
//!
//! ```text
//!   | slot 0: header, JSON | slot 1: header, JSON |      the one with the higher number counts
//! ```
//!
//! A process that is confined cannot make a new file and put it in the old one's place, so the two slots are written in
//! turn, and a write that is cut off leaves the other one. What comes back is hostile input: anybody may have written it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cleave_scsi::State;
use serde::{Deserialize, Serialize};

use crate::address::Address;
use crate::bus::Bus;
use crate::config::{KindConfig, UnitConfig};

/// Bytes of a slot: a unit's state is a few hundred, and of units there are a few.
const SLOT: u64 = 4 << 20;
const MAGIC: &str = "cleave-scsi-state";
/// Bytes before the JSON: a line, padded.
const HEADER: usize = 128;
const VERSION: u32 = 1;

/// Why there is nothing to go on with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateFileError {
    #[error("--state {}: it cannot be opened", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("--state {}: another cleave-scsi uses it", .0.display())]
    InUse(PathBuf),
    #[error("--state {}: this is no state of cleave-scsi's; remove it to start without", .0.display())]
    Foreign(PathBuf),
    #[error("--state {}: what is kept there cannot be gone on with; remove it to start without", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("--state {}: it is of version {version}, and this program knows version {VERSION}: start it with the newer program", path.display())]
    Version { path: PathBuf, version: u32 },
}

/// All that is kept.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Saved {
    version: u32,
    units: BTreeMap<String, SavedUnit>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct SavedUnit {
    /// What is in a drive.
    medium: Option<PathBuf>,
    /// How to make a unit that was added while the device ran.
    added: Option<KindConfig>,
    state: State,
}

impl Saved {
    pub(crate) fn of(bus: &Bus) -> Self {
        let mut units = BTreeMap::new();
        for (address, slot) in bus.slots() {
            let medium = slot.loaded.as_ref().map(|loaded| loaded.image.path().to_owned());
            let added = slot.is_hot.then(|| slot.config.kind.clone());
            if let Ok(state) = bus.unit(address, |unit| unit.state()) {
                units.insert(address.to_string(), SavedUnit { medium, added, state });
            }
        }
        Self { version: VERSION, units }
    }

    /// The units as they were: those of `configured` that were still there, with the media that were in them, and those
    /// that had come.
    pub(crate) fn configs(&self, configured: &[UnitConfig]) -> Vec<UnitConfig> {
        let saved = self.units.iter().filter_map(|(address, unit)| Some((address.parse().ok()?, unit)));
        saved
            .filter_map(|(address, unit): (Address, &SavedUnit)| {
                let given = configured.iter().find(|config| config.address == address);
                let kind = unit.added.as_ref().or(given.map(|config| &config.kind))?;
                let mut kind = kind.clone();
                if let KindConfig::Cdrom(cdrom) = &mut kind {
                    cdrom.path = unit.medium.clone();
                }
                Some(UnitConfig { address, kind })
            })
            .collect()
    }

    /// Whether the unit was added while the device ran.
    pub(crate) fn was_added(&self, address: Address) -> bool {
        self.units.get(&address.to_string()).is_some_and(|unit| unit.added.is_some())
    }

    pub(crate) fn units(self) -> impl Iterator<Item = (Address, State)> {
        self.units.into_iter().filter_map(|(address, unit)| Some((address.parse().ok()?, unit.state)))
    }
}

/// Where it is kept, if anywhere.
#[derive(Debug, Default)]
pub(crate) struct StateFile {
    file: Option<File>,
    /// Of the last write.
    number: u64,
}

impl StateFile {
    /// Opens `path`, or makes it, and reads what is in it. Call it before the process is confined.
    pub(crate) fn open(path: &Path) -> Result<(Self, Option<Saved>), StateFileError> {
        let failed = |source| StateFileError::Open { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StateFileError::InUse(path.to_owned())),
            Err(errno) => return Err(failed(errno.into())),
        }
        let slots = [0, 1].map(|slot| read_slot(&file, slot));
        let mut found = None;
        for slot in slots {
            if let Some(slot) = slot.map_err(failed)?
                && found.as_ref().is_none_or(|(number, _)| *number < slot.0)
            {
                found = Some(slot);
            }
        }
        let Some((number, json)) = found else {
            return match file.metadata().map_err(failed)?.len() {
                0 => Ok((Self { file: Some(file), number: 0 }, None)),
                _ => Err(StateFileError::Foreign(path.to_owned())),
            };
        };
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let no_json = |source| StateFileError::Json { path: path.to_owned(), source };
        let Version { version } = serde_json::from_slice(&json).map_err(no_json)?;
        if version != VERSION {
            return Err(StateFileError::Version { path: path.to_owned(), version });
        }
        let saved = serde_json::from_slice(&json).map_err(no_json)?;
        Ok((Self { file: Some(file), number }, Some(saved)))
    }

    pub(crate) fn is_there(&self) -> bool {
        self.file.is_some()
    }

    /// # Errors
    /// It is not kept; what was kept before is.
    pub(crate) fn write(&mut self, saved: &Saved) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let json = serde_json::to_vec(saved)?;
        if (HEADER + json.len()) as u64 > SLOT {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let number = self.number + 1;
        let line = format!("{MAGIC} {number} {} {:016x}", json.len(), checksum(number, &json));
        let mut bytes = format!("{line:<width$}\n", width = HEADER - 1).into_bytes();
        bytes.extend(json);
        file.write_all_at(&bytes, number % 2 * SLOT)?;
        file.sync_data()?;
        self.number = number;
        Ok(())
    }
}

/// The number and the content of a slot that is whole.
fn read_slot(file: &File, slot: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
    let mut header = [0; HEADER];
    match file.read_exact_at(&mut header, slot * SLOT) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let parsed = || {
        let words: Vec<&str> = str::from_utf8(&header).ok()?.split_ascii_whitespace().collect();
        let [MAGIC, number, len, sum] = words[..] else { return None };
        let len = len.parse::<usize>().ok().filter(|len| (HEADER + len) as u64 <= SLOT)?;
        Some((number.parse::<u64>().ok()?, len, u64::from_str_radix(sum, 16).ok()?))
    };
    let Some((number, len, sum)) = parsed() else { return Ok(None) };
    let mut json = vec![0; len];
    match file.read_exact_at(&mut json, slot * SLOT + HEADER as u64) {
        Ok(()) if checksum(number, &json) == sum => Ok(Some((number, json))),
        Ok(()) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// FNV-1a: against a write that was cut off, not against people.
fn checksum(number: u64, bytes: &[u8]) -> u64 {
    let all = number.to_le_bytes().into_iter().chain(bytes.iter().copied());
    all.fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(version: u32) -> Saved {
        Saved { version, units: BTreeMap::new() }
    }

    #[test]
    fn the_last_whole_write_is_what_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let (mut file, nothing) = StateFile::open(&path).unwrap();
        assert_eq!(nothing, None);
        assert!(matches!(StateFile::open(&path), Err(StateFileError::InUse(_))));
        file.write(&saved(7)).unwrap();
        file.write(&saved(VERSION)).unwrap();
        drop(file);
        let (mut file, again) = StateFile::open(&path).unwrap();
        assert_eq!(again, Some(saved(VERSION)));
        // The third write is cut off.
        file.write(&saved(9)).unwrap();
        let raw = OpenOptions::new().write(true).open(&path).unwrap();
        raw.write_all_at(b"x", SLOT + HEADER as u64 + 3).unwrap();
        drop(file);
        assert_eq!(StateFile::open(&path).unwrap().1, Some(saved(VERSION)));
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        std::fs::write(&path, "my precious notes").unwrap();
        assert!(matches!(StateFile::open(&path), Err(StateFileError::Foreign(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"my precious notes");
        std::fs::remove_file(&path).unwrap();
        let (mut file, _) = StateFile::open(&path).unwrap();
        file.write(&saved(VERSION + 1)).unwrap();
        drop(file);
        assert!(matches!(StateFile::open(&path), Err(StateFileError::Version { version: 2, .. })));
    }
}
