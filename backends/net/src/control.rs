//! What the driver says on the control queue (virtio 1.2, 5.1.6.5): a command in, what it changes out. It knows neither
//! queues nor ports.
//!
//! Invariant: a command is checked whole before anything is changed; one that is refused changes nothing.

use cleave_common::mac::MacAddress;

use crate::config_space::feature;
use crate::filter::{Addresses, Filter, MAX_ADDRESSES, Vlans};

/// Bytes of the longest command that is read: a table of 2,700 addresses.
pub(crate) const MAX_COMMAND: usize = 16 << 10;

/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
pub(crate) const OK: u8 = 0;
pub(crate) const ERR: u8 = 1;

mod class {
    pub(super) const RX: u8 = 0;
    pub(super) const MAC: u8 = 1;
    pub(super) const VLAN: u8 = 2;
    pub(super) const ANNOUNCE: u8 = 3;
    pub(super) const MQ: u8 = 4;
}

/// Why a command is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CommandError {
    #[error("the control command has no class or no number")]
    Short,
    #[error("control command {class}.{command} is not known, or its feature was not negotiated")]
    Unknown { class: u8, command: u8 },
    #[error("control command {class}.{command} has {len} bytes of data that make no sense for it")]
    Data { class: u8, command: u8, len: usize },
    #[error("{asked} pairs of queues: the device has 1 to {max}")]
    Pairs { asked: u16, max: u16 },
}

/// What commands change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) filter: Filter,
    /// Pairs of queues in use; `None` as long as nobody has said how many.
    pub(crate) pairs: Option<u16>,
    /// The driver has been asked to announce itself, and has not said that it did.
    pub(crate) announce: bool,
}

impl Settings {
    /// Does the command in `words`, by a driver that has negotiated `features` with a device of `max_pairs`.
    pub(crate) fn apply(&mut self, words: &[u8], features: u64, max_pairs: u16) -> Result<(), CommandError> {
        let [class, command, data @ ..] = words else { return Err(CommandError::Short) };
        let (class, command) = (*class, *command);
        let malformed = CommandError::Data { class, command, len: data.len() };
        let has = |feature: u64| features & feature != 0;
        match (class, command) {
            (class::RX, 0..=1) if has(feature::CTRL_RX) => self.receive_mode(command, data, malformed),
            (class::RX, 2..=5) if has(feature::CTRL_RX_EXTRA) => self.receive_mode(command, data, malformed),
            (class::MAC, 0) if has(feature::CTRL_RX) => {
                let (unicast, rest) = table(data).ok_or(malformed)?;
                let malformed = CommandError::Data { class, command, len: data.len() };
                let Some((multicast, [])) = table(rest) else { return Err(malformed) };
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
                Ok(())
            }
            (class::MAC, 1) if has(feature::CTRL_MAC_ADDR) => {
                let bytes: [u8; 6] = data.try_into().map_err(|_| malformed)?;
                let malformed = CommandError::Data { class, command, len: data.len() };
                self.filter.mac = MacAddress::new(bytes).ok_or(malformed)?;
                Ok(())
            }
            (class::VLAN, 0 | 1) if has(feature::CTRL_VLAN) => {
                let vlan = word(data).filter(|vlan| *vlan <= Vlans::MAX).ok_or(malformed)?;
                // What a predecessor was told is not known: then one more or less makes no difference.
                if let Some(vlans) = &mut self.filter.vlans {
                    vlans.set(vlan, command == 0);
                }
                Ok(())
            }
            (class::ANNOUNCE, 0) if has(feature::GUEST_ANNOUNCE) => {
                self.announce = false;
                Ok(())
            }
            (class::MQ, 0) if has(feature::MQ) => match word(data).ok_or(malformed)? {
                asked if (1..=max_pairs).contains(&asked) => {
                    self.pairs = Some(asked);
                    Ok(())
                }
                asked => Err(CommandError::Pairs { asked, max: max_pairs }),
            },
            _ => Err(CommandError::Unknown { class, command }),
        }
    }

    fn receive_mode(
        &mut self,
        command: u8,
        data: &[u8],
        malformed: CommandError,
    ) -> Result<(), CommandError> {
        let on = match data {
            [0] => false,
            [1] => true,
            _ => return Err(malformed),
        };
        let filter = &mut self.filter;
        let modes = [
            &mut filter.promisc,
            &mut filter.allmulti,
            &mut filter.alluni,
            &mut filter.nomulti,
            &mut filter.nouni,
            &mut filter.nobcast,
        ];
        if let Some(mode) = modes.into_iter().nth(command.into()) {
            *mode = on;
        }
        Ok(())
    }
}

fn word(data: &[u8]) -> Option<u16> {
    data.try_into().ok().map(u16::from_le_bytes)
}

/// A count and as many addresses; and what is behind them.
fn table(data: &[u8]) -> Option<(Addresses, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (addresses, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let addresses = match count {
        ..=MAX_ADDRESSES => {
            let address = |bytes: &[u8]| [bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]];
            Addresses::These(addresses.chunks_exact(6).map(address).collect())
        }
        _ => Addresses::All,
    };
    Some((addresses, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVERYTHING: u64 = u64::MAX;

    fn settings() -> Settings {
        let mac = MacAddress::new([2, 0, 0, 0, 0, 1]).unwrap();
        Settings { filter: Filter::fresh(mac, true), pairs: Some(1), announce: true }
    }

    fn refuses(words: &[u8], features: u64) {
        let mut after = settings();
        after.apply(words, features, 4).unwrap_err();
        assert_eq!(after, settings(), "a refusal changes nothing: {words:?}");
    }

    #[test]
    fn commands_change_what_they_name() {
        let mut s = settings();
        let mut apply = |words: &[u8]| s.apply(words, EVERYTHING, 4).unwrap();
        apply(&[0, 0, 0]);
        apply(&[0, 1, 1]);
        apply(&[0, 5, 1]);
        apply(&[1, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0]);
        apply(&[1, 1, 2, 9, 9, 9, 9, 9]);
        apply(&[3, 0]);
        apply(&[4, 0, 4, 0]);
        let filter = &s.filter;
        assert_eq!(
            (filter.promisc, filter.allmulti, filter.nobcast, filter.alluni),
            (false, true, true, false)
        );
        assert_eq!(filter.unicast, Addresses::These(vec![[2; 6]]));
        assert_eq!(filter.multicast, Addresses::none());
        assert_eq!(filter.mac.bytes(), [2, 9, 9, 9, 9, 9]);
        assert_eq!((s.pairs, s.announce), (Some(4), false));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for words in [
            &[][..],
            &[0],
            &[0, 0],
            &[0, 0, 2],
            &[0, 0, 1, 0],
            &[0, 6, 1],
            &[1, 0],
            &[1, 0, 0, 0, 0, 0],
            &[1, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[1, 1, 1, 9, 9, 9, 9, 9],
            &[1, 1, 2, 9, 9, 9, 9],
            &[2, 0, 0, 0x10],
            &[2, 0, 0],
            &[2, 2, 0, 0],
            &[3, 1],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[4, 0, 1],
            &[4, 1, 1, 0],
            &[9, 9],
        ] {
            refuses(words, EVERYTHING);
        }
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        use feature as f;
        for (words, feature) in [
            (&[0, 0, 0][..], f::CTRL_RX),
            (&[0, 3, 1], f::CTRL_RX_EXTRA),
            (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], f::CTRL_RX),
            (&[1, 1, 2, 9, 9, 9, 9, 9], f::CTRL_MAC_ADDR),
            (&[2, 0, 1, 0], f::CTRL_VLAN),
            (&[3, 0], f::GUEST_ANNOUNCE),
            (&[4, 0, 2, 0], f::MQ),
        ] {
            refuses(words, EVERYTHING & !feature);
            settings().apply(words, feature, 4).unwrap();
        }
    }

    #[test]
    fn a_table_that_is_too_long_lets_all_of_its_kind_pass() {
        let mut words = vec![1, 0, 65, 0, 0, 0];
        words.extend([2; 65 * 6]);
        words.extend([0; 4]);
        let mut s = settings();
        s.apply(&words, EVERYTHING, 4).unwrap();
        assert_eq!((&s.filter.unicast, &s.filter.multicast), (&Addresses::All, &Addresses::none()));
    }

    proptest! {
        #[test]
        fn no_words_are_too_odd(words in prop::collection::vec(any::<u8>(), 0..64), features: u64) {
            let mut after = settings();
            if after.apply(&words, features, 4).is_err() {
                prop_assert_eq!(after, settings());
            }
        }
    }
}
