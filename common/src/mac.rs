//! Ethernet addresses as people write them: `52:54:00:12:34:56`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// The address of one interface: neither a group's nor all zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; 6]);

/// Why something is no interface's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    #[error("'{0}' is no Ethernet address: write it as 52:54:00:12:34:56")]
    NotOne(String),
    #[error("{0} is no address of one interface: the first byte has to be even, and not all of them 0")]
    NotUnicast(String),
}

impl MacAddress {
    /// `None`: it is a group's, or all zeroes.
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        (bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    pub fn bytes(&self) -> [u8; 6] {
        self.0
    }

    /// An address that follows from `parts` alone: a locally administered one (IEEE 802, 8.4), the same each time, and
    /// hardly ever that of other parts.
    pub fn derived_from<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        // FNV-1a of 64 bits: the standard library promises no hash that stays.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut take = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        for part in parts {
            part.iter().for_each(|byte| take(*byte));
            take(0);
        }
        let folded = hash ^ hash >> 48;
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&folded.to_le_bytes()[..6]);
        bytes[0] = bytes[0] & 0xfc | 2;
        Self(bytes)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || MacError::NotOne(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| (1..=2).contains(&part.len())).ok_or_else(wrong)?;
            let digits = part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or_else(wrong)?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Self::new(bytes).ok_or_else(|| MacError::NotUnicast(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::options::from_word(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_is_read() {
        let mac: MacAddress = "52:54:00:ab:CD:1".parse().unwrap();
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 1]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:01");
        assert_eq!("52-54-00-ab-cd-01".parse(), Ok(mac));
    }

    #[test]
    fn what_is_no_address_of_one_interface_is_refused() {
        for text in
            ["", "52:54:00", "52:54:00:12:34:56:78", "52:54:00:12:34:5g", "52:54:00:12:34:+5", "525400123456"]
        {
            assert_eq!(text.parse::<MacAddress>(), Err(MacError::NotOne(text.to_owned())));
        }
        for text in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert_eq!(text.parse::<MacAddress>(), Err(MacError::NotUnicast(text.to_owned())));
        }
    }

    #[test]
    fn a_derived_address_is_local_stable_and_its_names_own() {
        let of = |name: &str| MacAddress::derived_from([b"host".as_slice(), name.as_bytes()]);
        assert_eq!(of("tap0"), of("tap0"));
        let many: std::collections::HashSet<_> = (0..10_000).map(|n| of(&format!("tap{n}"))).collect();
        assert_eq!(many.len(), 10_000);
        assert!(many.iter().all(|mac| mac.bytes()[0] & 3 == 2));
        assert_ne!(
            MacAddress::derived_from([b"a".as_slice(), b"bc"]),
            MacAddress::derived_from([b"ab".as_slice(), b"c"])
        );
    }
}
