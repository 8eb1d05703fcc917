use proptest::prelude::*;

use super::*;

const VERSION_1: u64 = 1 << 32;
const CSUM_ALONE: u64 = VERSION_1 | feature::GUEST_CSUM;

/// A frame that is to be segmented, as the kernel hands it over: with its header before it.
#[derive(Debug)]
struct Case {
    is_ipv6: bool,
    is_tcp: bool,
    /// TCP flags.
    flags: u8,
    ecn: bool,
    vlan: bool,
    mss: u16,
    payload: Vec<u8>,
}

fn simple_sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl Case {
    fn ip(&self) -> usize {
        if self.vlan { 18 } else { 14 }
    }

    fn transport(&self) -> usize {
        self.ip() + if self.is_ipv6 { 40 } else { 24 }
    }

    fn transport_len(&self) -> usize {
        if self.is_tcp { 32 } else { 8 }
    }

    /// As a stack writes it: the checksum field has the pseudo header's sum.
    fn bytes(&self) -> Vec<u8> {
        let len = self.transport_len() + self.payload.len();
        let mut frame = vec![2; 12];
        if self.vlan {
            frame.extend([0x81, 0, 0, 7]);
        }
        let protocol = if self.is_tcp { 6 } else { 17 };
        if self.is_ipv6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((len as u16).to_be_bytes());
            frame.extend([protocol, 64]);
            frame.extend([0xfe; 16]);
            frame.extend([0xfd; 16]);
        } else {
            // With four bytes of options, and an identification about to wrap.
            frame.extend([8, 0, 0x46, 0]);
            frame.extend(((24 + len) as u16).to_be_bytes());
            frame.extend([0xff, 0xfe, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 0]);
        }
        let pseudo = self.pseudo(&frame, len);
        let transport = frame.len();
        assert_eq!(transport, self.transport());
        frame.extend([0, 80, 1, 2]);
        if self.is_tcp {
            frame.extend([0xff, 0xff, 0xff, 0x00, 0, 0, 0, 1, 0x80, self.flags, 1, 1, 0, 0, 0, 0]);
            frame.extend([1; 12]);
            frame[transport + 16..transport + 18].copy_from_slice(&pseudo.to_be_bytes());
        } else {
            frame.extend((len as u16).to_be_bytes());
            frame.extend(pseudo.to_be_bytes());
        }
        frame.extend(&self.payload);
        frame
    }

    fn pseudo(&self, frame: &[u8], len: usize) -> u16 {
        let ip = self.ip();
        let addresses = if self.is_ipv6 { ip + 8..ip + 40 } else { ip + 12..ip + 20 };
        let protocol = if self.is_tcp { 6 } else { 17 };
        fold(simple_sum(&frame[addresses]) + protocol + len as u32)
    }

    fn header(&self) -> [u8; 12] {
        let kind = match (self.is_tcp, self.is_ipv6) {
            (true, false) => 1,
            (true, true) => 4,
            _ => 5,
        };
        let mut header = [0; 12];
        (header[0], header[1]) = (1, kind | if self.ecn { 0x80 } else { 0 });
        header[4..6].copy_from_slice(&self.mss.to_le_bytes());
        header[6..8].copy_from_slice(&(self.transport() as u16).to_le_bytes());
        header[8] = if self.is_tcp { 16 } else { 6 };
        header
    }

    fn raw(&self) -> Vec<u8> {
        [&self.header()[..], &self.bytes()].concat()
    }

    /// What is right for a segment, whichever it is; gives its payload.
    fn check(&self, number: usize, is_last: bool, segment: &[u8]) -> Vec<u8> {
        let (original, ip, transport) = (self.bytes(), self.ip(), self.transport());
        let len = segment.len() - transport;
        assert_eq!(segment[..ip], original[..ip]);
        if self.is_ipv6 {
            assert_eq!(segment[ip + 4..ip + 6], (len as u16).to_be_bytes());
        } else {
            assert_eq!(segment[ip + 2..ip + 4], ((24 + len) as u16).to_be_bytes());
            assert_eq!(segment[ip + 4..ip + 6], 0xfffe_u16.wrapping_add(number as u16).to_be_bytes());
            assert_eq!(fold(simple_sum(&segment[ip..transport])), 0xffff);
        }
        let sum = u32::from(self.pseudo(segment, len)) + simple_sum(&segment[transport..]);
        assert_eq!(fold(sum), 0xffff, "the checksum of segment {number}");
        if self.is_tcp {
            let sequence = 0xffff_ff00_u32.wrapping_add((number * usize::from(self.mss)) as u32);
            assert_eq!(segment[transport + 4..transport + 8], sequence.to_be_bytes());
            let mut flags = self.flags;
            flags &= if is_last { 0xff } else { !0x09 };
            flags &= if number == 0 { 0xff } else { !0x80 };
            assert_eq!(segment[transport + 13], flags);
        } else {
            assert_eq!(segment[transport + 4..transport + 6], (len as u16).to_be_bytes());
        }
        segment[transport + self.transport_len()..].to_vec()
    }
}

fn segments(raw: &[u8], features: u64) -> Option<Vec<Vec<u8>>> {
    let frame = Frame::of_kernel(raw).unwrap();
    let Form::Segments(mut segments) = Form::of(&frame, features)? else { panic!("not in parts") };
    let mut all = Vec::new();
    while let Some((headers, rest)) = segments.next(&frame) {
        all.push([headers, &raw[12..][rest]].concat());
    }
    Some(all)
}

fn case() -> impl Strategy<Value = Case> {
    let payload = prop::collection::vec(any::<u8>(), 0..6000);
    (any::<[bool; 4]>(), any::<u8>(), 1u16..2000, payload).prop_map(
        |([is_ipv6, is_tcp, ecn, vlan], flags, mss, payload)| Case {
            is_ipv6,
            is_tcp,
            flags,
            ecn: ecn && is_tcp,
            vlan,
            mss,
            payload,
        },
    )
}

proptest! {
    #[test]
    fn each_segment_is_a_right_frame_and_together_they_are_the_whole(case in case()) {
        let all = segments(&case.raw(), CSUM_ALONE).unwrap();
        prop_assert_eq!(all.len(), case.payload.len().div_ceil(case.mss.into()).max(1));
        let mut payload = Vec::new();
        for (number, segment) in all.iter().enumerate() {
            payload.extend(case.check(number, number + 1 == all.len(), segment));
        }
        prop_assert_eq!(payload, case.payload);
    }

    #[test]
    fn no_header_and_no_frame_are_too_odd(
        header in prop::collection::vec(prop_oneof![0u8..6, any::<u8>()], 12),
        case in case(),
        cut in 0usize..200,
        odd in prop::collection::vec((0usize..80, any::<u8>()), 0..6),
    ) {
        for start in [header, case.header().to_vec()] {
            let mut raw = [&start[..], &case.bytes()].concat();
            raw.truncate(12 + 14 + cut);
            for (at, byte) in &odd {
                if let Some(place) = raw.get_mut(12 + at) {
                    *place = *byte;
                }
            }
            let Ok(frame) = Frame::of_kernel(&raw) else { continue };
            if let Some(Form::Segments(mut segments)) = Form::of(&frame, 0) {
                while let Some((headers, rest)) = segments.next(&frame) {
                    prop_assert!(rest.end <= frame.len() && headers.len() <= frame.len());
                }
            }
        }
    }
}

fn tcp4() -> Case {
    let payload = vec![7; 3000];
    Case { is_ipv6: false, is_tcp: true, flags: 0x18, ecn: false, vlan: false, mss: 1000, payload }
}

#[test]
fn a_guest_gets_whole_what_it_can_finish_itself() {
    use feature as f;
    let whole = |case: &Case, features: u64| {
        let raw = case.raw();
        let frame = Frame::of_kernel(&raw).unwrap();
        matches!(Form::of(&frame, features), Some(Form::Whole(header)) if header == frame.header)
    };
    assert!(whole(&tcp4(), CSUM_ALONE | f::GUEST_TSO4));
    assert!(!whole(&tcp4(), CSUM_ALONE | f::GUEST_TSO6));
    assert!(!whole(&tcp4(), VERSION_1 | f::GUEST_TSO4), "not without checksums");
    let ecn = Case { ecn: true, ..tcp4() };
    assert!(!whole(&ecn, CSUM_ALONE | f::GUEST_TSO4));
    assert!(whole(&ecn, CSUM_ALONE | f::GUEST_TSO4 | f::GUEST_ECN));
    let udp = Case { is_tcp: false, ..tcp4() };
    assert!(!whole(&udp, CSUM_ALONE | f::GUEST_USO4));
    assert!(whole(&udp, CSUM_ALONE | f::GUEST_USO4 | f::GUEST_USO6));
}

#[test]
fn a_checksum_is_made_for_whoever_cannot() {
    let case = Case { payload: vec![9; 701], ..tcp4() };
    let mut raw = case.raw();
    raw[1] = 0;
    let frame = Frame::of_kernel(&raw).unwrap();
    assert!(matches!(Form::of(&frame, CSUM_ALONE), Some(Form::Whole(_))));
    let Some(Form::Summed { at, checksum }) = Form::of(&frame, VERSION_1) else { panic!("no sum") };
    let mut bytes = case.bytes();
    bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    // As the only segment, whose identification is the first one's.
    bytes[24..26].copy_from_slice(&0u16.to_be_bytes());
    let ip = !fold(simple_sum(&bytes[14..38]));
    bytes[24..26].copy_from_slice(&ip.to_be_bytes());
    case.check(0, true, &bytes);
}

#[test]
fn what_is_not_what_its_header_says_is_not_segmented() {
    let refuses = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut raw = tcp4().raw();
        change(&mut raw);
        assert_eq!(segments(&raw, 0), None);
    };
    refuses(&|raw| raw[12 + 13] = 6);
    refuses(&|raw| raw[12 + 14] = 0x66);
    refuses(&|raw| raw[12 + 14] = 0x45);
    refuses(&|raw| raw[12 + 23] = 17);
    refuses(&|raw| raw[12 + 50] = 0x40);
    refuses(&|raw| raw[1] = 4);
    refuses(&|raw| raw[1] = 5);
    refuses(&|raw| raw[6] += 4);
    refuses(&|raw| raw[8] = 6);
    // Headers that are longer than the frame.
    refuses(&|raw| {
        raw.truncate(12 + 60);
        raw[12 + 50] = 0xf0;
    });
}
