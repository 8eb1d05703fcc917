//! Virtio device types (virtio 1.2, section 5): their ids, their names, the PCI class each is shown with.
//!
//! A name is what a person writes in `--device type=NAME`. Anything that knows more about a device type than
//! this table belongs in a daemon.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A virtio device id (virtio 1.2, 5). Every number from 1 to 63 is a device one can attach, also those this
/// table has no name for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceType(u8);

struct Entry {
    id: u8,
    name: &'static str,
    /// PCI class, subclass, programming interface: 0xCCSSPP.
    class: u32,
}

const OTHER: u32 = 0xff_00_00;

const fn entry(id: u8, name: &'static str, class: u32) -> Entry {
    Entry { id, name, class }
}

const TABLE: &[Entry] = &[
    entry(1, "net", 0x02_00_00),
    entry(2, "block", 0x01_80_00),
    entry(3, "console", 0x07_80_00),
    entry(4, "rng", OTHER),
    entry(5, "balloon", OTHER),
    entry(6, "iomem", OTHER),
    entry(7, "rpmsg", OTHER),
    entry(8, "scsi", 0x01_00_00),
    entry(9, "9p", OTHER),
    entry(10, "mac80211-wlan", OTHER),
    entry(11, "rproc-serial", OTHER),
    entry(12, "caif", OTHER),
    entry(13, "memory-balloon", OTHER),
    entry(16, "gpu", 0x03_80_00),
    entry(17, "clock", OTHER),
    entry(18, "input", 0x09_80_00),
    entry(19, "vsock", OTHER),
    entry(20, "crypto", 0x10_00_00),
    entry(21, "signal-dist", OTHER),
    entry(22, "pstore", OTHER),
    entry(23, "iommu", OTHER),
    entry(24, "mem", OTHER),
    entry(25, "sound", 0x04_01_00),
    entry(26, "fs", 0x01_80_00),
    entry(27, "pmem", OTHER),
    entry(28, "rpmb", OTHER),
    entry(29, "mac80211-hwsim", OTHER),
    entry(30, "video-encoder", OTHER),
    entry(31, "video-decoder", OTHER),
    entry(32, "scmi", OTHER),
    entry(33, "nitro-secure-module", OTHER),
    entry(34, "i2c", OTHER),
    entry(35, "watchdog", OTHER),
    entry(36, "can", OTHER),
    entry(38, "parameter-server", OTHER),
    entry(39, "audio-policy", OTHER),
    entry(40, "bluetooth", OTHER),
    entry(41, "gpio", OTHER),
    entry(42, "rdma", OTHER),
];

impl DeviceType {
    pub const NET: Self = Self(1);
    pub const BLOCK: Self = Self(2);
    pub const SCSI: Self = Self(8);
    pub const CONSOLE: Self = Self(3);
    pub const BALLOON: Self = Self(5);

    /// The id on the wire; the PCI device id is `0x1040 +` this (virtio 1.2, 4.1.2).
    pub const fn id(self) -> u8 {
        self.0
    }

    /// The specification's name, where the table has one.
    pub fn name(self) -> Option<&'static str> {
        self.entry().map(|entry| entry.name)
    }

    /// PCI class code as 0xCCSSPP, what `lspci` groups devices by.
    pub fn pci_class(self) -> u32 {
        self.entry().map_or(OTHER, |entry| entry.class)
    }

    /// Every name that [`FromStr`] takes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().map(|entry| entry.name)
    }

    fn entry(self) -> Option<&'static Entry> {
        TABLE.iter().find(|entry| entry.id == self.0)
    }
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A word that is neither the name nor the number of a virtio device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{word}' is no virtio device type{}; use a name ({}) or a number from 1 to 63",
    crate::options::did_you_mean(word, DeviceType::names()), DeviceType::names().collect::<Vec<_>>().join(", "))]
pub struct UnknownDeviceType {
    word: String,
}

impl FromStr for DeviceType {
    type Err = UnknownDeviceType;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        if let Some(entry) = TABLE.iter().find(|entry| entry.name == word) {
            return Ok(Self(entry.id));
        }
        match word.parse::<u8>() {
            // PCI device ids of modern devices are 0x1040 to 0x107f.
            Ok(id @ 1..=63) => Ok(Self(id)),
            _ => Err(UnknownDeviceType { word: word.to_owned() }),
        }
    }
}

impl Serialize for DeviceType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::options::from_word(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same_device() {
        assert_eq!("block".parse(), Ok(DeviceType::BLOCK));
        assert_eq!("2".parse(), Ok(DeviceType::BLOCK));
        assert_eq!("rng".parse::<DeviceType>().unwrap().id(), 4);
        assert_eq!("50".parse::<DeviceType>().unwrap().to_string(), "50");
    }

    #[test]
    fn a_typo_is_answered_with_the_nearest_name() {
        let error = "blokc".parse::<DeviceType>().unwrap_err().to_string();
        assert!(error.contains("did you mean 'block'?"), "{error}");
        assert!("0".parse::<DeviceType>().is_err());
        assert!("64".parse::<DeviceType>().is_err());
    }

    #[test]
    fn ids_are_unique() {
        for (at, entry) in TABLE.iter().enumerate() {
            assert!(TABLE[at + 1..].iter().all(|other| other.id != entry.id && other.name != entry.name));
        }
    }
}
