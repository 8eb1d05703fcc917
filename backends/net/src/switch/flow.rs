//! Which pair of queues a frame goes to: the same for all of one flow, so that it stays in order.

use super::frame::Frame;
use super::offload::network_header;

/// Bytes that decide: two VLAN tags, IPv6, ports.
const LOOK_AT: usize = 14 + 8 + 40 + 4;

/// A number that follows from a frame's flow: its addresses, and its ports where they are known.
pub(crate) fn hash(frame: &Frame<'_>) -> u32 {
    let mut bytes = [0; LOOK_AT];
    let len = frame.read_start(&mut bytes);
    mix(flow(&bytes[..len]).unwrap_or([&bytes[..12], &[]]))
}

/// The addresses and the ports of a frame that starts like this.
fn flow(start: &[u8]) -> Option<[&[u8]; 2]> {
    let ip = network_header(start)?;
    let (addresses, protocol, transport) = if start.get(ip)? >> 4 == 4 {
        // Only the first fragment of a packet has ports.
        let fragment = start.get(ip + 6)? & 0x3f != 0 || *start.get(ip + 7)? != 0;
        let protocol = if fragment { 0 } else { *start.get(ip + 9)? };
        (start.get(ip + 12..ip + 20)?, protocol, ip + 4 * usize::from(start.get(ip)? & 0xf))
    } else {
        (start.get(ip + 8..ip + 40)?, *start.get(ip + 6)?, ip + 40)
    };
    let ports = matches!(protocol, 6 | 17 | 132).then(|| start.get(transport..transport + 4)).flatten();
    Some([addresses, ports.unwrap_or_default()])
}

/// FNV-1a, and its upper half, which depends on all bytes, folded in.
fn mix(parts: [&[u8]; 2]) -> u32 {
    let bytes = parts.into_iter().flatten();
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp4(ports: (u16, u16), fragment: [u8; 2]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([
            8,
            0,
            0x45,
            0,
            0,
            40,
            0,
            1,
            fragment[0],
            fragment[1],
            64,
            6,
            0,
            0,
            10,
            0,
            0,
            1,
            10,
            0,
            0,
            2,
        ]);
        frame.extend([ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat());
        frame
    }

    #[test]
    fn flows_differ_by_their_ports_and_fragments_do_not() {
        let of = |frame: &[u8]| mix(flow(frame).unwrap());
        let spread: std::collections::HashSet<u32> =
            (0..64).map(|port| of(&tcp4((1000 + port, 80), [0x40, 0])) % 4).collect();
        assert_eq!(spread.len(), 4);
        assert_eq!(of(&tcp4((1, 2), [0x20, 0])), of(&tcp4((3, 4), [0, 9])));
        // Behind a tag it is the same flow.
        let plain = tcp4((5, 6), [0, 0]);
        let tagged = [&plain[..12], &[0x81, 0, 0, 7], &plain[12..]].concat();
        assert_eq!(of(&plain), of(&tagged));
        assert_eq!(flow(&[2; 20]), None);
        assert_eq!(flow(&plain[..30]), None);
    }
}
