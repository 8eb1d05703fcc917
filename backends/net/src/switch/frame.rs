//! A frame on its way through the switch, where its sender has it, and what the header before it says (virtio 1.2, 5.1.6).
//!
//! Invariants: the header and the first bytes, by which it is decided where a frame goes, are read once, and these are what
//! a receiver gets, whatever the sender writes there meanwhile; what the header says lies inside the frame.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::sum::Sum;
use crate::buffers::GuestBuffers;
use crate::config_space::HEADER_LEN;
use crate::filter::{ETHERNET_HEADER, LOOK_AT};

/// VIRTIO_NET_HDR_F_NEEDS_CSUM and VIRTIO_NET_HDR_F_DATA_VALID.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

/// VIRTIO_NET_HDR_GSO_ECN, beside a type.
const ECN: u8 = 0x80;

/// Bytes of the part of a header that all drivers have.
const COMMON_LEN: usize = 10;

/// Why a frame goes nowhere.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("it has no whole Ethernet header")]
    Short,
    #[error("its checksum is to be put at {at}, in {len} bytes")]
    Checksum { at: usize, len: usize },
    #[error("it is to be segmented in a way that is not known ({0:#x})")]
    Segmentation(u8),
    #[error("it is to be segmented, and its header says neither into which size nor where the checksum is")]
    SegmentationAlone,
}

/// What is to be segmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gso {
    Tcp4,
    Tcp6,
    Udp,
}

/// What a header says. The default says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

impl Header {
    /// What it says of a frame of `len` bytes; flags other than `known` are left out.
    fn read(bytes: &[u8; COMMON_LEN], len: usize, known: u8) -> Result<Self, FrameError> {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let header = Self {
            flags: bytes[0] & known,
            gso_type: bytes[1],
            // A hint, of which nothing is made here.
            hdr_len: if usize::from(word(2)) <= len { word(2) } else { 0 },
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        };
        header.check(len)
    }

    fn check(self, len: usize) -> Result<Self, FrameError> {
        let at = self.checksum_at();
        if self.needs_sum() && (at + 2 > len || usize::from(self.csum_start) < ETHERNET_HEADER) {
            return Err(FrameError::Checksum { at, len });
        }
        match (self.gso_type, self.gso()) {
            (0, _) if self.needs_sum() => Ok(Self { gso_size: 0, ..self }),
            (0, _) => Ok(Self { flags: self.flags, ..Self::default() }),
            (_, Some(_)) if self.needs_sum() && self.gso_size != 0 => Ok(self),
            (_, Some(_)) => Err(FrameError::SegmentationAlone),
            (other, None) => Err(FrameError::Segmentation(other)),
        }
    }

    /// The bytes before a frame; how many buffers it takes is left to whoever knows.
    pub(crate) fn bytes(&self) -> [u8; HEADER_LEN as usize] {
        let mut bytes = [0; HEADER_LEN as usize];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (word, to) in words.iter().zip(bytes[2..COMMON_LEN].chunks_exact_mut(2)) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Its checksum is still to be made.
    pub(crate) fn needs_sum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }

    /// Where in the frame.
    pub(crate) fn checksum_at(&self) -> usize {
        usize::from(self.csum_start) + usize::from(self.csum_offset)
    }

    /// It is still to be segmented.
    pub(crate) fn gso(&self) -> Option<Gso> {
        match self.gso_type & !ECN {
            1 => Some(Gso::Tcp4),
            4 => Some(Gso::Tcp6),
            5 => Some(Gso::Udp),
            _ => None,
        }
    }

    /// What is to be segmented has ECN's congestion mark, which is for the first segment alone.
    pub(crate) fn has_ecn(&self) -> bool {
        self.gso_type & ECN != 0
    }
}

#[derive(Clone, Copy)]
enum Body<'f> {
    /// Behind a header of so many bytes.
    Guest(&'f GuestBuffers, usize),
    Ours(&'f [u8]),
}

pub(crate) struct Frame<'f> {
    pub(crate) header: Header,
    start: [u8; LOOK_AT],
    body: Body<'f>,
    len: usize,
}

impl<'f> Frame<'f> {
    /// One that a guest sends, behind a header of `header_len` bytes.
    pub(crate) fn of_guest(buffers: &'f GuestBuffers, header_len: usize) -> Result<Self, FrameError> {
        let len = buffers.len().saturating_sub(header_len);
        let mut header = [0; COMMON_LEN];
        buffers.read_at(0, &mut header);
        Self::new(&header, Body::Guest(buffers, header_len), len, NEEDS_CSUM)
    }

    /// One from the kernel, with its header of [`HEADER_LEN`] bytes.
    pub(crate) fn of_kernel(bytes: &'f [u8]) -> Result<Self, FrameError> {
        let (header, frame) = bytes.split_at_checked(HEADER_LEN.into()).ok_or(FrameError::Short)?;
        let header = header.first_chunk().ok_or(FrameError::Short)?;
        Self::new(header, Body::Ours(frame), frame.len(), NEEDS_CSUM | DATA_VALID)
    }

    fn new(header: &[u8; COMMON_LEN], body: Body<'f>, len: usize, known: u8) -> Result<Self, FrameError> {
        if len < ETHERNET_HEADER {
            return Err(FrameError::Short);
        }
        let header = Header::read(header, len, known)?;
        let mut frame = Self { header, start: [0; LOOK_AT], body, len };
        let mut start = [0; LOOK_AT];
        frame.read_body(0, &mut start);
        frame.start = start;
        Ok(frame)
    }

    /// Bytes, without its header.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first bytes: addresses, and a VLAN tag if there is one.
    pub(crate) fn start(&self) -> &[u8] {
        &self.start[..LOOK_AT.min(self.len)]
    }

    pub(crate) fn destination(&self) -> [u8; 6] {
        std::array::from_fn(|at| self.start[at])
    }

    pub(crate) fn source(&self) -> [u8; 6] {
        std::array::from_fn(|at| self.start[6 + at])
    }

    fn read_body(&self, at: usize, bytes: &mut [u8]) -> usize {
        match self.body {
            Body::Guest(buffers, header) => buffers.read_at(header + at, bytes),
            Body::Ours(frame) => {
                let rest = frame.get(at..).unwrap_or_default();
                let len = rest.len().min(bytes.len());
                bytes[..len].copy_from_slice(&rest[..len]);
                len
            }
        }
    }

    /// Reads the frame's beginning, and says how much there is.
    pub(crate) fn read_start(&self, bytes: &mut [u8]) -> usize {
        let len = self.read_body(0, bytes);
        let known = self.start().len().min(len);
        bytes[..known].copy_from_slice(&self.start[..known]);
        len
    }

    /// The sum of some of its bytes, as in the Internet's checksums.
    pub(crate) fn sum(&self, range: Range<usize>) -> Sum {
        let mut sum = Sum::default();
        if let Body::Ours(frame) = self.body {
            sum.add(&frame[range]);
            return sum;
        }
        // An even count, so that the parts' sums are the whole's.
        let mut part = [0; 2048];
        let mut at = range.start;
        while at < range.end {
            let want = part.len().min(range.end - at);
            let len = self.read_body(at, &mut part[..want]);
            sum.add(&part[..want]);
            at += len.max(1);
        }
        sum
    }

    /// Copies some of its bytes: the one copy on their way from guest to guest.
    pub(crate) fn copy_to(&self, range: Range<usize>, to: &GuestBuffers, mut to_at: usize) {
        let mut at = range.start;
        let known = self.start().len().min(range.end);
        if at < known {
            to.write_at(to_at, &self.start[at..known]);
            (at, to_at) = (known, to_at + known - at);
        }
        match self.body {
            Body::Guest(buffers, header) => buffers.copy_to(header + at, range.end - at, to, to_at),
            Body::Ours(frame) => to.write_at(to_at, &frame[at..range.end]),
        }
    }

    /// Sends it to whoever reads headers of [`HEADER_LEN`] bytes.
    pub(crate) fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let start = [&self.header.bytes()[..], self.start()].concat();
        match self.body {
            Body::Guest(buffers, header) => {
                buffers.writev_behind(fd, &start, header + self.start().len()).map(drop)
            }
            Body::Ours(frame) => {
                let rest = &frame[self.start().len()..];
                rustix::io::write(fd, &[&start[..], rest].concat())?;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u8 = NEEDS_CSUM | DATA_VALID;

    #[test]
    fn a_header_says_what_it_said_as_far_as_it_is_known() {
        let bytes = [0xff, 0x81, 54, 0, 0xa8, 5, 34, 0, 16, 0];
        let header = Header::read(&bytes, 3000, ALL).unwrap();
        assert_eq!(header.bytes(), [3, 0x81, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
        assert!(header.needs_sum() && header.has_ecn());
        assert_eq!((header.gso(), header.gso_size, header.checksum_at()), (Some(Gso::Tcp4), 1448, 50));
        assert_eq!(Header::read(&bytes, 3000, NEEDS_CSUM).unwrap().bytes()[0], 1);
        // Nothing is left to do: nothing is said, whatever stood there.
        let idle = Header::read(&[2, 0, 9, 0, 9, 0, 9, 0, 9, 0], 100, NEEDS_CSUM).unwrap();
        assert_eq!(idle, Header::default());
    }

    #[test]
    fn what_lies_is_refused() {
        let wrong = |bytes: [u8; 10], len| Header::read(&bytes, len, ALL).unwrap_err();
        assert_eq!(wrong([1, 0, 0, 0, 0, 0, 34, 0, 16, 0], 51), FrameError::Checksum { at: 50, len: 51 });
        assert_eq!(
            wrong([1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], 60),
            FrameError::Checksum { at: 131_070, len: 60 }
        );
        assert_eq!(wrong([1, 0, 0, 0, 0, 0, 4, 0, 2, 0], 60), FrameError::Checksum { at: 6, len: 60 });
        assert_eq!(wrong([1, 3, 0, 0, 9, 0, 34, 0, 16, 0], 900), FrameError::Segmentation(3));
        assert_eq!(wrong([1, 0x80, 0, 0, 9, 0, 34, 0, 16, 0], 900), FrameError::Segmentation(0x80));
        assert_eq!(wrong([0, 1, 0, 0, 9, 0, 34, 0, 16, 0], 900), FrameError::SegmentationAlone);
        assert_eq!(wrong([1, 4, 0, 0, 0, 0, 34, 0, 16, 0], 900), FrameError::SegmentationAlone);
        assert!(matches!(Frame::of_kernel(&[0; 25]), Err(FrameError::Short)));
    }
}
