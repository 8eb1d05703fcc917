//! Config space, feature bits and frame headers of virtio-net (virtio 1.2, 5.1.3, 5.1.4 and 5.1.6.1).

use cleave_common::mac::MacAddress;
use cleave_common::vhost_user::features::virtio::VERSION_1;

/// Device feature bits.
pub(crate) mod feature {
    pub(crate) const CSUM: u64 = 1 << 0;
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    pub(crate) const MTU: u64 = 1 << 3;
    pub(crate) const MAC: u64 = 1 << 5;
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    pub(crate) const GUEST_ECN: u64 = 1 << 9;
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    pub(crate) const HOST_ECN: u64 = 1 << 13;
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    pub(crate) const STATUS: u64 = 1 << 16;
    pub(crate) const CTRL_VQ: u64 = 1 << 17;
    pub(crate) const CTRL_RX: u64 = 1 << 18;
    pub(crate) const CTRL_VLAN: u64 = 1 << 19;
    pub(crate) const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub(crate) const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub(crate) const MQ: u64 = 1 << 22;
    pub(crate) const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub(crate) const GUEST_USO4: u64 = 1 << 54;
    pub(crate) const GUEST_USO6: u64 = 1 << 55;
    pub(crate) const HOST_USO: u64 = 1 << 56;

    /// Frames larger than the MTU may come to the guest.
    pub(crate) const GUEST_GSO: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;
}

/// Bytes of the header before a frame, with and without the count of buffers.
pub(crate) const HEADER_LEN: u8 = 12;
const LEGACY_HEADER_LEN: u8 = 10;

/// Bytes of the header that a driver with these features puts before frames.
pub(crate) fn header_len(features: u64) -> u8 {
    if features & (VERSION_1 | feature::MRG_RXBUF) == 0 { LEGACY_HEADER_LEN } else { HEADER_LEN }
}

/// Bits of `status`.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// Bytes up to `mtu`. What would follow belongs to features that are not offered.
const LEN: usize = 12;

/// What config space says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConfigSpace {
    pub(crate) mac: MacAddress,
    pub(crate) link_up: bool,
    /// The driver is asked to send frames that tell its addresses.
    pub(crate) announce: bool,
    pub(crate) max_pairs: u16,
    pub(crate) mtu: u16,
}

impl ConfigSpace {
    pub(crate) fn bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let status = if self.link_up { LINK_UP } else { 0 } | if self.announce { ANNOUNCE } else { 0 };
        bytes[..6].copy_from_slice(&self.mac.bytes());
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.max_pairs.to_le_bytes());
        bytes[10..].copy_from_slice(&self.mtu.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let mac = "52:54:00:12:34:56".parse().unwrap();
        let config = ConfigSpace { mac, link_up: true, announce: false, max_pairs: 4, mtu: 1500 };
        assert_eq!(config.bytes(), [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 4, 0, 0xdc, 5]);
        let config = ConfigSpace { link_up: false, announce: true, ..config };
        assert_eq!(config.bytes()[6..8], [2, 0]);
    }

    #[test]
    fn the_header_has_a_count_of_buffers_unless_the_driver_is_old() {
        assert_eq!(header_len(VERSION_1), 12);
        assert_eq!(header_len(feature::MRG_RXBUF), 12);
        assert_eq!(header_len(0), 10);
    }
}
