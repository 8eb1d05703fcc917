//! Which frames the guest wants (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).
//!
//! Filtering is best effort in the specification's words: a frame too many does no harm, one too few does. So what is not
//! known lets everything through, as after the daemon's predecessor has died with what the guest had told it.

use cleave_common::mac::MacAddress;

/// Most addresses of a kind that are kept; with more of them, all of that kind pass.
pub(crate) const MAX_ADDRESSES: usize = 64;

/// Bytes of a frame that decide: two addresses, and a VLAN tag if there is one.
pub(crate) const LOOK_AT: usize = 18;

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET_HEADER: usize = 14;

/// 802.1Q.
const VLAN_TAG: [u8; 2] = [0x81, 0x00];

/// Addresses of one kind that are received.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Addresses {
    /// Not known, or too many.
    #[default]
    All,
    These(Vec<[u8; 6]>),
}

impl Addresses {
    pub(crate) fn none() -> Self {
        Self::These(Vec::new())
    }

    fn has(&self, address: &[u8]) -> bool {
        match self {
            Self::All => true,
            Self::These(addresses) => addresses.iter().any(|known| known == address),
        }
    }
}

/// One bit for each of 4096 VLANs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vlans(Box<[u64; 64]>);

impl Vlans {
    /// The largest number of a VLAN.
    pub(crate) const MAX: u16 = 4095;

    pub(crate) fn none() -> Self {
        Self(Box::new([0; 64]))
    }

    pub(crate) fn set(&mut self, vlan: u16, received: bool) {
        let (word, bit) = (usize::from(vlan & Self::MAX) / 64, 1 << (vlan % 64));
        if received { self.0[word] |= bit } else { self.0[word] &= !bit }
    }

    fn has(&self, vlan: u16) -> bool {
        self.0[usize::from(vlan & Self::MAX) / 64] & 1 << (vlan % 64) != 0
    }
}

/// What the guest has asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) promisc: bool,
    pub(crate) allmulti: bool,
    pub(crate) alluni: bool,
    pub(crate) nomulti: bool,
    pub(crate) nouni: bool,
    pub(crate) nobcast: bool,
    pub(crate) mac: MacAddress,
    pub(crate) unicast: Addresses,
    pub(crate) multicast: Addresses,
    /// `None`: all are received.
    pub(crate) vlans: Option<Vlans>,
}

impl Filter {
    /// Everything passes until the guest says otherwise; of what it has said before, nothing is known.
    pub(crate) fn unknown(mac: MacAddress) -> Self {
        Self {
            promisc: true,
            allmulti: false,
            alluni: false,
            nomulti: false,
            nouni: false,
            nobcast: false,
            mac,
            unicast: Addresses::All,
            multicast: Addresses::All,
            vlans: None,
        }
    }

    /// For a driver that starts: everything passes until it says otherwise, and its tables are empty.
    pub(crate) fn fresh(mac: MacAddress, filters_vlans: bool) -> Self {
        Self {
            unicast: Addresses::none(),
            multicast: Addresses::none(),
            vlans: filters_vlans.then(Vlans::none),
            ..Self::unknown(mac)
        }
    }

    /// Whether the frame that starts like this, with [`LOOK_AT`] bytes unless it is shorter, is for the guest.
    pub(crate) fn passes(&self, frame: &[u8]) -> bool {
        if self.promisc {
            return true;
        }
        let Some(to) = frame.get(..6) else { return false };
        if let (Some(vlans), Some(VLAN_TAG), Some(tag)) = (&self.vlans, ethertype(frame), frame.get(14..16))
            && !vlans.has(u16::from_be_bytes([tag[0], tag[1]]) & Vlans::MAX)
        {
            return false;
        }
        if to == [0xff; 6] {
            !self.nobcast
        } else if to[0] & 1 == 1 {
            !self.nomulti && (self.allmulti || self.multicast.has(to))
        } else {
            !self.nouni && (self.alluni || to == self.mac.bytes() || self.unicast.has(to))
        }
    }
}

fn ethertype(frame: &[u8]) -> Option<[u8; 2]> {
    frame.get(12..14).map(|bytes| [bytes[0], bytes[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHERS: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
    const ALL: [u8; 6] = [0xff; 6];

    fn frame(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
        let mut frame = [to, OTHERS].concat();
        if let Some(vlan) = vlan {
            frame.extend(VLAN_TAG);
            frame.extend((vlan | 0x6000).to_be_bytes());
        }
        frame.extend([8, 0, 0x45, 0]);
        frame
    }

    /// Which of ours, another's, a group's and everybody's pass.
    fn passing(filter: &Filter) -> [bool; 4] {
        [OURS, OTHERS, GROUP, ALL].map(|to| filter.passes(&frame(to, None)))
    }

    fn quiet() -> Filter {
        let filter = Filter::fresh(MacAddress::new(OURS).unwrap(), true);
        assert_eq!(passing(&filter), [true; 4], "everything, until the driver says otherwise");
        Filter { promisc: false, ..filter }
    }

    #[test]
    fn each_mode_does_what_it_says() {
        assert_eq!(passing(&quiet()), [true, false, false, true]);
        assert_eq!(passing(&Filter { allmulti: true, ..quiet() }), [true, false, true, true]);
        assert_eq!(passing(&Filter { alluni: true, ..quiet() }), [true, true, false, true]);
        assert_eq!(passing(&Filter { nobcast: true, ..quiet() }), [true, false, false, false]);
        assert_eq!(passing(&Filter { nouni: true, alluni: true, ..quiet() }), [false, false, false, true]);
        assert_eq!(passing(&Filter { nomulti: true, allmulti: true, ..quiet() }), [true, false, false, true]);
        assert_eq!(passing(&Filter { promisc: true, nouni: true, nobcast: true, ..quiet() }), [true; 4]);
        let tables = Filter {
            unicast: Addresses::These(vec![OTHERS]),
            multicast: Addresses::These(vec![GROUP]),
            ..quiet()
        };
        assert_eq!(passing(&tables), [true; 4]);
        assert!(!tables.passes(&[2, 0, 0]), "a frame without an address is nobody's");
    }

    #[test]
    fn vlans_pass_when_they_were_added() {
        let mut filter = quiet();
        assert!(!filter.passes(&frame(OURS, Some(7))) && filter.passes(&frame(OURS, None)));
        for vlan in [0, 7, 63, 64, 4095] {
            filter.vlans.as_mut().unwrap().set(vlan, true);
            assert!(filter.passes(&frame(OURS, Some(vlan))), "{vlan}");
            assert!(!filter.passes(&frame(OURS, Some(vlan ^ 1))), "{vlan}");
            filter.vlans.as_mut().unwrap().set(vlan, false);
            assert!(!filter.passes(&frame(OURS, Some(vlan))), "{vlan}");
        }
    }

    #[test]
    fn what_a_predecessor_was_told_is_not_guessed() {
        let unknown = Filter { promisc: false, ..Filter::unknown(MacAddress::new(OURS).unwrap()) };
        assert_eq!(passing(&unknown), [true; 4]);
        assert!(unknown.passes(&frame(OURS, Some(7))));
    }
}
