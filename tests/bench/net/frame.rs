//! The frames that are sent: what is in them, and how they lie in memory.

use cleave_tests::driver::HEADER_LEN;
use cleave_tests::network::EXPERIMENT;

use crate::args::Size;

/// Of the guest that sends, and the one that receives.
pub const SENDER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub const RECEIVER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];

/// Bytes of one piece of memory at most: what a page gives.
pub const PIECE: usize = 4096;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4.
const NEEDS_CSUM: u8 = 1;
const TCPV4: u8 = 1;
const MSS: u16 = 1448;

/// Ethernet, IPv4 and TCP without options.
const HEADERS: u16 = 14 + 20 + 20;

/// Bytes of the largest packet that is made of whole segments: with its Ethernet header it is below the 64 KiB up to which
/// interfaces segment.
const PACKET: u16 = 20 + 20 + 45 * MSS;

/// A frame with the header that a driver puts before it.
#[derive(Debug, Clone)]
pub struct Frame {
    pub header: [u8; HEADER_LEN],
    pub bytes: Vec<u8>,
}

impl Frame {
    pub fn new(size: Size, to: [u8; 6], from: [u8; 6]) -> Self {
        match size {
            Size::Bytes(len) => {
                let mut bytes = [&to[..], &from, &EXPERIMENT].concat();
                bytes.resize(len.into(), 0x5a);
                Self { header: [0; HEADER_LEN], bytes }
            }
            Size::Segment => Self::segment(to, from),
        }
    }

    /// TCP over IPv4. Nobody has the addresses (RFC 5737).
    fn segment(to: [u8; 6], from: [u8; 6]) -> Self {
        let mut bytes = [&to[..], &from, &[8, 0, 0x45, 0], &PACKET.to_be_bytes()].concat();
        bytes.extend([0, 1, 0x40, 0, 64, 6, 0, 0]);
        bytes.extend([192, 0, 2, 1, 192, 0, 2, 2]);
        let sum = !ones_sum(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        // Ports, sequence numbers, 5 words of header, ACK, window, the sum of the pseudo header, no urgent data.
        bytes.extend([0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff]);
        let pseudo = ones_sum(&[&bytes[26..34], &[0, 6], &(PACKET - 20).to_be_bytes()].concat());
        bytes.extend(pseudo.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.resize(14 + usize::from(PACKET), 0x5a);
        let mut header = [0; HEADER_LEN];
        (header[0], header[1]) = (NEEDS_CSUM, TCPV4);
        for (at, value) in [(2, HEADERS), (4, MSS), (6, 34), (8, 16)] {
            header[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
        }
        Self { header, bytes }
    }

    /// All of it, behind its header.
    pub fn with_header(&self) -> Vec<u8> {
        [&self.header[..], &self.bytes].concat()
    }
}

fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_one_that_a_kernel_takes() {
        let frame = Frame::new(Size::Segment, RECEIVER, SENDER);
        assert_eq!((frame.bytes.len(), ones_sum(&frame.bytes[14..34])), (65214, 0xffff));
        assert_eq!(frame.header[..10], [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
        assert_eq!(Frame::new(Size::Bytes(64), RECEIVER, SENDER).with_header().len(), 76);
    }
}
