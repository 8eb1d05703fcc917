//! What a sender leaves to be done, for receivers that can do it and for others.

use super::*;

const MSS: u16 = 1448;

/// Of TCP over IPv4: to be summed, and segmented if it is long.
fn header(len: usize) -> [u8; HEADER_LEN] {
    let mut header = PLAIN;
    header[0] = 1;
    header[1] = u8::from(len > 1514);
    header[2..4].copy_from_slice(&54u16.to_le_bytes());
    header[4..6].copy_from_slice(&if len > 1514 { MSS } else { 0 }.to_le_bytes());
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    header
}

fn segment(len: usize) -> Vec<u8> {
    tcp(guest(1), guest(0), (1, 2), &frame(OURS, WORLDS, len as u64, len))
}

#[test]
fn what_the_receiver_can_finish_passes_as_it_is() {
    let bridge = bridge(2, &[]);
    let [mut a, mut b] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
    for len in [100, 1460, 5000, 20_000, 64_000] {
        let sent = segment(len);
        a.send(0, &header(sent.len()), &sent).unwrap();
        let came = b.receive(0).unwrap();
        assert_eq!(came.bytes, sent, "{len} bytes");
        assert_eq!(came.header[..10], header(sent.len())[..10], "{len} bytes");
    }
}

#[test]
fn what_it_cannot_is_finished_for_it() {
    let bridge = bridge(2, &[]);
    let mut a = bridge.driver(0);
    for without in [
        feature::GUEST_GSO | feature::GUEST_CSUM,
        feature::GUEST_GSO,
        feature::GUEST_GSO | feature::MRG_RXBUF,
    ] {
        let mut b = bridge.driver_with(1, !without);
        meet((&mut a, 0), (&mut b, 1));
        let sent = segment(20_000);
        a.send(0, &header(sent.len()), &sent).unwrap();
        let mut arrived = Vec::new();
        while arrived.len() < 20_000 {
            let part = b.receive(0).unwrap();
            assert_eq!(part.header[..10], [0; 10], "there is nothing left to do");
            assert!(part.bytes.len() <= 54 + usize::from(MSS) && tcp_sum_holds(&part.bytes));
            assert_eq!(fold(sum(&part.bytes[14..34])), 0xffff, "IP's own sum");
            arrived.extend_from_slice(&part.bytes[54..]);
        }
        assert_eq!(arrived, sent[54..]);
        // One that is only to be summed.
        let sent = segment(1001);
        a.send(0, &header(sent.len()), &sent).unwrap();
        let came = b.receive(0).unwrap();
        assert_eq!(came.bytes[54..], sent[54..]);
        let is_summed = without & feature::GUEST_CSUM != 0;
        assert_eq!((came.header[0], tcp_sum_holds(&came.bytes)), (u8::from(!is_summed), is_summed));
    }
}

#[test]
fn segments_that_find_no_buffers_are_lost_and_what_comes_later_is_not() {
    let bridge = bridge(2, &[]);
    let mut a = bridge.driver(0);
    let frontend = Frontend::connect(&bridge.sockets[1]).unwrap();
    let mut b = NetDriver::start(frontend, !feature::GUEST_GSO, 8).unwrap();
    b.offer_many(0, 5, 2048).unwrap();
    meet((&mut a, 0), (&mut b, 1));
    let sent = segment(20_000);
    a.send(0, &header(sent.len()), &sent).unwrap();
    for number in 0..5 {
        let from = 54 + number * usize::from(MSS);
        assert_eq!(b.receive(0).unwrap().bytes[54..], sent[from..from + usize::from(MSS)]);
    }
    nothing_comes(&mut b);
    passes(&mut a, &mut b, &between(0, 1, 3, 300));
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_fills() {
    let bridge = bridge(2, &[]);
    let mut a = bridge.driver(0);
    let frontend = Frontend::connect(&bridge.sockets[1]).unwrap();
    let mut b = NetDriver::start(frontend, u64::MAX, 256).unwrap();
    for _ in 0..80 {
        b.offer(0, &[7, 50, 199]).unwrap();
    }
    b.kick(0).unwrap();
    until_it_takes(&mut a, &mut b, &between(0, 1, 1, 60));
    empty(&mut b);
    for len in [14, 244, 245, 500, 501, 1514] {
        let sent = between(0, 1, len as u64, len);
        a.send(0, &PLAIN, &sent).unwrap();
        let came = b.receive(0).unwrap();
        assert_eq!(usize::from(came.buffers), (HEADER_LEN + len).div_ceil(256), "{len} bytes");
        assert_eq!(came.bytes, sent);
    }
    // One for which no ring of its size has room, and one behind it.
    let sent = segment(60_000);
    a.send(0, &header(sent.len()), &sent).unwrap();
    passes(&mut a, &mut b, &between(0, 1, 3, 300));
}

/// Headers that lie: what the switch cannot make sense of goes nowhere, and is the sender's own loss.
#[test]
fn headers_of_no_sense_do_no_harm() {
    use proptest::prelude::*;
    let bridge = bridge(2, &[]);
    let mut a = bridge.driver(0);
    let mut b = bridge.driver_with(1, !(feature::GUEST_GSO | feature::GUEST_CSUM));
    meet((&mut a, 0), (&mut b, 1));
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) };
    let header = prop::collection::vec(prop_oneof![0u8..6, any::<u8>()], 12);
    let lens = prop_oneof![14usize..100, 100usize..60_000];
    let shared = std::cell::RefCell::new((&mut a, &mut b));
    proptest!(config, |(header in header, len in lens, is_tcp: bool)| {
        let (a, b) = &mut *shared.borrow_mut();
        let frame = if is_tcp { tcp(guest(1), guest(0), (1, 2), &vec![7; len]) } else { between(0, 1, 1, len) };
        a.send(0, &header.try_into().unwrap(), &frame).unwrap();
        while b.receive_within(0, Duration::ZERO).unwrap().is_some() {}
    });
    empty(&mut b);
    passes(&mut a, &mut b, &between(0, 1, 3, 300));
}
