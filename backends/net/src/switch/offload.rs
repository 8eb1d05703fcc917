//! What a guest gets of a frame that its sender has left unfinished: itself, if it has negotiated to finish it; else the
//! frame with its checksum, or its segments (virtio 1.2, 5.1.6.2 and 5.1.6.4).
//!
//! Headers are looked at as far as segmenting needs it. Own code, and little of it: the libraries there are segment what lies
//! in one piece of memory of this program's, and a frame lies in pieces of another's; the way there would be a second copy.

use std::ops::Range;

use super::frame::{Frame, Gso, Header};
use super::sum::Sum;
use crate::config_space::feature;
use crate::filter::ETHERNET_HEADER;

/// Most bytes of the headers of what is segmented.
const MAX_HEADERS: usize = 256;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// TCP's flags, by their byte.
const FIN_PSH: u8 = 0x01 | 0x08;
const CWR: u8 = 0x80;

/// How a frame reaches a guest.
pub(crate) enum Form {
    /// As it is, behind this header.
    Whole(Header),
    /// With this checksum at this place.
    Summed { at: usize, checksum: u16 },
    /// In parts.
    Segments(Box<Segments>),
}

impl Form {
    /// Of `frame`, for a guest with `features`. `None`: what is to be segmented is not what its header says.
    pub(crate) fn of(frame: &Frame<'_>, features: u64) -> Option<Self> {
        let header = frame.header;
        let has = |wanted: u64| features & wanted == wanted;
        match header.gso() {
            None if !header.needs_sum() || has(feature::GUEST_CSUM) => Some(Self::Whole(header)),
            None => {
                let checksum = frame.sum(header.csum_start.into()..frame.len()).checksum();
                Some(Self::Summed { at: header.checksum_at(), checksum })
            }
            Some(gso) => {
                let wanted = match gso {
                    Gso::Tcp4 => feature::GUEST_TSO4,
                    Gso::Tcp6 => feature::GUEST_TSO6,
                    // Which of the two it is says the frame alone.
                    Gso::Udp => feature::GUEST_USO4 | feature::GUEST_USO6,
                };
                let ecn = if header.has_ecn() { feature::GUEST_ECN } else { 0 };
                if has(wanted | ecn | feature::GUEST_CSUM) {
                    return Some(Self::Whole(header));
                }
                Segments::of(frame, gso).map(|segments| Self::Segments(Box::new(segments)))
            }
        }
    }
}

/// A frame in parts, each with headers of its own.
pub(crate) struct Segments {
    /// The whole's headers, as they were.
    original: [u8; MAX_HEADERS],
    headers: [u8; MAX_HEADERS],
    headers_len: usize,
    /// Where the headers of IP and of what is in it start.
    ip: usize,
    transport: usize,
    is_ipv6: bool,
    is_tcp: bool,
    /// Bytes of each part but the last.
    size: usize,
    /// Bytes of the frame.
    len: usize,
    next: usize,
}

impl Segments {
    fn of(frame: &Frame<'_>, gso: Gso) -> Option<Self> {
        let mut original = [0; MAX_HEADERS];
        let read = frame.read_start(&mut original);
        let seen = &original[..read];
        let ip = network_header(seen)?;
        let is_ipv6 = match seen.get(ip)? >> 4 {
            4 => false,
            6 => true,
            _ => return None,
        };
        let transport = usize::from(frame.header.csum_start);
        let is_tcp = gso != Gso::Udp;
        if gso == Gso::Tcp4 && is_ipv6 || gso == Gso::Tcp6 && !is_ipv6 {
            return None;
        }
        let protocol = if is_tcp { TCP } else { UDP };
        let ip_fits = if is_ipv6 {
            // Extension headers may be between.
            transport >= ip + 40
        } else {
            let ip_len = 4 * usize::from(seen.get(ip)? & 0xf);
            ip_len >= 20 && transport == ip + ip_len && *seen.get(ip + 9)? == protocol
        };
        let transport_len = if is_tcp { 4 * usize::from(seen.get(transport + 12)? >> 4) } else { 8 };
        let checksum_at = if is_tcp { 16 } else { 6 };
        let headers_len = transport + transport_len;
        if !ip_fits
            || is_tcp && transport_len < 20
            || usize::from(frame.header.csum_offset) != checksum_at
            || headers_len > read
        {
            return None;
        }
        let size = frame.header.gso_size.into();
        let (headers, len) = (original, frame.len());
        Some(Self { original, headers, headers_len, ip, transport, is_ipv6, is_tcp, size, len, next: 0 })
    }

    /// The headers of the next part, and which bytes of the frame follow them.
    pub(crate) fn next(&mut self, frame: &Frame<'_>) -> Option<(&[u8], Range<usize>)> {
        let start = self.headers_len + self.next * self.size;
        if start >= self.len && self.next != 0 {
            return None;
        }
        let end = self.len.min(start + self.size);
        self.headers = self.original;
        self.write_ip(end - start);
        self.write_transport(frame, start..end);
        self.next += 1;
        Some((&self.headers[..self.headers_len], start..end))
    }

    fn put(&mut self, at: usize, word: u16) {
        self.headers[at..at + 2].copy_from_slice(&word.to_be_bytes());
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.headers[at], self.headers[at + 1]])
    }

    fn write_ip(&mut self, payload: usize) {
        let ip = self.ip;
        // What does not fit is of a frame that was too long for IP from the start.
        let total = (self.headers_len - ip + payload) as u16;
        if self.is_ipv6 {
            self.put(ip + 4, total.wrapping_sub(40));
            return;
        }
        self.put(ip + 2, total);
        self.put(ip + 4, self.word(ip + 4).wrapping_add(self.next as u16));
        self.put(ip + 10, 0);
        let checksum = sum(&self.headers[ip..self.transport]).checksum();
        self.put(ip + 10, checksum);
    }

    fn write_transport(&mut self, frame: &Frame<'_>, payload: Range<usize>) {
        let (at, len) = (self.transport, self.headers_len - self.transport + payload.len());
        let checksum_at = if self.is_tcp {
            let bytes =
                self.headers[at + 4..at + 8].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
            let sequence = bytes.wrapping_add((self.next * self.size) as u32);
            self.headers[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
            if payload.end != self.len {
                self.headers[at + 13] &= !FIN_PSH;
            }
            if self.next != 0 {
                self.headers[at + 13] &= !CWR;
            }
            at + 16
        } else {
            self.put(at + 4, len as u16);
            at + 6
        };
        self.put(checksum_at, 0);
        let addresses = if self.is_ipv6 { self.ip + 8..self.ip + 40 } else { self.ip + 12..self.ip + 20 };
        let protocol = if self.is_tcp { TCP } else { UDP };
        let pseudo = sum(&self.headers[addresses]).plus_number(len as u32).plus_number(protocol.into());
        let headers = sum(&self.headers[at..self.headers_len]);
        let checksum = pseudo.plus(headers).plus(frame.sum(payload)).checksum();
        self.put(checksum_at, checksum);
    }
}

fn sum(bytes: &[u8]) -> Sum {
    let mut sum = Sum::default();
    sum.add(bytes);
    sum
}

/// Where the network's header starts, behind up to two VLAN tags.
pub(crate) fn network_header(frame: &[u8]) -> Option<usize> {
    let mut at = ETHERNET_HEADER;
    for _ in 0..3 {
        match frame.get(at - 2..at)? {
            [0x81, 0x00] | [0x88, 0xa8] => at += 4,
            [0x08, 0x00] | [0x86, 0xdd] => return Some(at),
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests;
