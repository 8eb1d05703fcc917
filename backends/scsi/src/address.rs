//! Where a logical unit is: virtio-scsi's eight byte LUNs (virtio 1.2, 5.6.6.1).

use std::fmt;
use std::str::FromStr;

use cleave_scsi::Lun;

/// Targets that a driver is told to look for.
pub(crate) const MAX_TARGET: u8 = 7;

/// A target of the one bus, and a unit of it. Written `target:lun`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Address {
    pub(crate) target: u8,
    pub(crate) lun: Lun,
}

impl Address {
    /// `None`: no unit of a target is addressed so.
    pub(crate) fn decode(bytes: [u8; 8]) -> Option<Self> {
        match bytes {
            [1, target, high, low, 0, 0, 0, 0] => Lun::decode([high, low]).map(|lun| Self { target, lun }),
            _ => None,
        }
    }

    /// As a device reports it in events, where Linux knows numbers below 256 in peripheral device addressing only.
    pub(crate) fn encode(self) -> [u8; 8] {
        let [high, low] = self.lun.encode();
        [1, self.target, high, low, 0, 0, 0, 0]
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.target, self.lun.number())
    }
}

/// What is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no address of a unit: it is TARGET:LUN, or LUN of target 0; targets are 0 to {MAX_TARGET}, LUNs 0 to 16383"
)]
pub(crate) struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (target, lun) = text.split_once(':').unwrap_or(("0", text));
        let target = target.parse().ok().filter(|target| *target <= MAX_TARGET);
        let lun = lun.parse().ok().and_then(Lun::new);
        match (target, lun) {
            (Some(target), Some(lun)) => Ok(Self { target, lun }),
            _ => Err(AddressError(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_drivers_send() {
        let address = Address::decode([1, 3, 0x40, 5, 0, 0, 0, 0]).unwrap();
        assert_eq!(address.to_string(), "3:5");
        assert_eq!(Address::decode([1, 3, 0, 5, 0, 0, 0, 0]), Some(address));
        assert_eq!(Address::decode(address.encode()), Some(address));
        for stray in
            [[0; 8], [1, 3, 0xc1, 1, 0, 0, 0, 0], [1, 3, 0x40, 5, 0, 0, 0, 1], [2, 3, 0x40, 5, 0, 0, 0, 0]]
        {
            assert_eq!(Address::decode(stray), None);
        }
    }

    #[test]
    fn people_write_them_in_two_ways() {
        assert_eq!("2:300".parse::<Address>().unwrap().to_string(), "2:300");
        assert_eq!("7".parse::<Address>().unwrap().to_string(), "0:7");
        for wrong in ["8:0", "0:16384", "", "a", "1:2:3"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
