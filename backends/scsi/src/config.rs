//! `--lun` and `--cdrom`: which units there are, in the grammar that all options have.

use std::path::PathBuf;

use clap::ValueEnum;
use cleave_common::options;
use cleave_common::throttle::ThrottleConfig;
use cleave_scsi::Lun;
use cleave_storage::{CacheMode, ImageFormat};
use serde::{Deserialize, Deserializer, Serialize};

use crate::address::{Address, MAX_TARGET};

/// `--lun disk=PATH[,lun=N][,target=N][,format=raw|qcow2][,readonly=on][,cache=none|writeback|writethrough][,serial=TEXT]
/// [,product=TEXT][,wwn=NUMBER][,on-full=error|pause][,throttle.KEY=N...]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct LunConfig {
    pub(crate) disk: PathBuf,
    pub(crate) lun: Option<u16>,
    pub(crate) target: Option<u8>,
    #[serde(default)]
    pub(crate) format: Format,
    #[serde(default)]
    pub(crate) readonly: bool,
    #[serde(default)]
    pub(crate) cache: Cache,
    #[serde(default)]
    pub(crate) serial: String,
    #[serde(default)]
    pub(crate) product: Option<String>,
    /// A world wide name (NAA), in any of the usual ways to write a number.
    #[serde(default, deserialize_with = "wwn", skip_serializing_if = "Option::is_none")]
    pub(crate) wwn: Option<u64>,
    #[serde(default)]
    pub(crate) on_full: WhenFull,
    #[serde(default, skip_serializing)]
    pub(crate) throttle: ThrottleConfig,
}

/// `--cdrom PATH[,lun=N][,target=N][,serial=TEXT]`, or without a path: an empty drive.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct CdromConfig {
    pub(crate) path: Option<PathBuf>,
    pub(crate) lun: Option<u16>,
    pub(crate) target: Option<u8>,
    #[serde(default)]
    pub(crate) serial: String,
    #[serde(default, deserialize_with = "wwn", skip_serializing_if = "Option::is_none")]
    pub(crate) wwn: Option<u64>,
}

/// Format of a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Format {
    #[default]
    Raw,
    Qcow2,
}

/// Where written data is when a write completes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Cache {
    None,
    #[default]
    Writeback,
    Writethrough,
}

/// What to do with a write that finds no room on the host's disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum WhenFull {
    #[default]
    Error,
    Pause,
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<Cache> for CacheMode {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::None => Self::None,
            Cache::Writeback => Self::Writeback,
            Cache::Writethrough => Self::Writethrough,
        }
    }
}

fn wwn<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    struct Wwn(u64);
    impl std::str::FromStr for Wwn {
        type Err = String;

        fn from_str(text: &str) -> Result<Self, String> {
            let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
            let number = match digits {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => text.parse(),
            };
            let number = number
                .map_err(|_| format!("'{text}' is no world wide name: write it as 0x5000c500a1b2c3d4"))?;
            Ok(Self(number))
        }
    }
    options::from_word(deserializer).map(|Wwn(number)| Some(number))
}

/// A unit as it is to be, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnitConfig {
    pub(crate) address: Address,
    pub(crate) kind: KindConfig,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum KindConfig {
    Disk(Box<LunConfig>),
    Cdrom(CdromConfig),
}

/// What cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error("lun={0}: LUNs are 0 to 16383")]
    Lun(u16),
    #[error("target={0}: targets are 0 to {MAX_TARGET}")]
    Target(u8),
    #[error("two units are at {0}: give one of them another lun=")]
    Taken(Address),
    #[error("there is no unit: give a --lun or a --cdrom, or --control, by which they can be added")]
    Nothing,
    #[error("target {0} has no LUN left")]
    Full(u8),
}

impl KindConfig {
    fn place(&self) -> (Option<u8>, Option<u16>) {
        match self {
            Self::Disk(disk) => (disk.target, disk.lun),
            Self::Cdrom(cdrom) => (cdrom.target, cdrom.lun),
        }
    }

    /// Its place: as it says, or the first LUN that is not `taken`.
    pub(crate) fn address(&self, taken: impl Fn(Address) -> bool) -> Result<Address, PlaceError> {
        let (target, lun) = self.place();
        let target = target.unwrap_or(0);
        if target > MAX_TARGET {
            return Err(PlaceError::Target(target));
        }
        if let Some(number) = lun {
            let address = Address { target, lun: Lun::new(number).ok_or(PlaceError::Lun(number))? };
            return if taken(address) { Err(PlaceError::Taken(address)) } else { Ok(address) };
        }
        let mut luns = (0..=Lun::MAX.number()).filter_map(Lun::new).map(|lun| Address { target, lun });
        luns.find(|address| !taken(*address)).ok_or(PlaceError::Full(target))
    }
}

/// Gives each unit its place: those first that say where it is, then the others in their order.
pub(crate) fn place(kinds: Vec<KindConfig>) -> Result<Vec<UnitConfig>, PlaceError> {
    let mut units: Vec<UnitConfig> = Vec::new();
    let (fixed, free): (Vec<_>, Vec<_>) = kinds.into_iter().partition(|kind| kind.place().1.is_some());
    for kind in fixed.into_iter().chain(free) {
        let address = kind.address(|address| units.iter().any(|unit| unit.address == address))?;
        units.push(UnitConfig { address, kind });
    }
    Ok(units)
}

/// `--lun` as it is written.
pub(crate) fn lun(text: &str) -> Result<LunConfig, String> {
    let config: LunConfig = options::parse(text, None).map_err(|error| error.to_string())?;
    config.throttle.validate().map_err(|error| error.to_string())?;
    Ok(config)
}

/// `--cdrom` as it is written.
pub(crate) fn cdrom(text: &str) -> Result<CdromConfig, String> {
    let mut config: CdromConfig = options::parse(text, Some("path")).map_err(|error| error.to_string())?;
    config.path = config.path.filter(|path| path.as_os_str() != "none");
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_where_they_say_and_others_where_there_is_room() {
        let kinds = vec![
            KindConfig::Disk(Box::new(lun("disk=a").unwrap())),
            KindConfig::Disk(Box::new(lun("disk=b,lun=0,readonly=on,cache=none,format=qcow2").unwrap())),
            KindConfig::Cdrom(cdrom("x.iso").unwrap()),
            KindConfig::Cdrom(cdrom("none,target=3").unwrap()),
        ];
        let places: Vec<String> = place(kinds).unwrap().iter().map(|unit| unit.address.to_string()).collect();
        assert_eq!(places, ["0:0", "0:1", "0:2", "3:0"]);
        let twice = vec![KindConfig::Disk(Box::new(lun("disk=a,lun=4").unwrap())); 2];
        assert_eq!(
            place(twice).unwrap_err().to_string(),
            "two units are at 0:4: give one of them another lun="
        );
    }

    #[test]
    fn what_cannot_be_is_said_in_the_options_words() {
        for (text, wanted) in [
            ("lun=1", "'disk=' is missing"),
            ("disk=a,lnu=1", "did you mean 'lun'?"),
            ("disk=a,wwn=red", "'red' is no world wide name"),
            ("disk=a,format=vmdk", "raw"),
        ] {
            let error = lun(text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        assert_eq!(lun("disk=a,wwn=0x5000000000000001").unwrap().wwn, Some(0x5000_0000_0000_0001));
        assert_eq!(cdrom("lun=2").unwrap(), CdromConfig { lun: Some(2), ..CdromConfig::default() });
        assert_eq!(cdrom("none").unwrap().path, None);
    }

    #[test]
    fn what_is_kept_reads_as_it_was() {
        for text in ["disk=a,lun=3,serial=S,wwn=7,cache=none", "disk=a"] {
            let kind = KindConfig::Disk(Box::new(lun(text).unwrap()));
            let kept = serde_json::to_string(&kind).unwrap();
            assert_eq!(serde_json::from_str::<KindConfig>(&kept).unwrap(), kind);
        }
    }
}
