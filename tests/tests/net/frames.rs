//! Frames, byte by byte: plain ones, ones to be summed and segmented, ones in many buffers and in too few.

use cleave_tests::driver::{Frontend, HEADER_LEN, NetDriver};
use cleave_tests::network::PACKET_HEADER_LEN;

use super::*;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4.
const NEEDS_CSUM: u8 = 1;
const TCPV4: u8 = 1;

const MSS: u16 = 1448;

#[test]
fn frames_of_every_size_pass_both_ways() {
    for features in
        [u64::MAX, !feature::EVENT_IDX, !feature::INDIRECT, !feature::MRG_RXBUF, !feature::GUEST_CSUM]
    {
        let Some(net) = start(&[]) else { return };
        let mut driver =
            NetDriver::start(Frontend::connect(&net.daemon.socket).unwrap(), features, 256).unwrap();
        driver.offer_many(0, 64, 2048).unwrap();
        for len in (14..200).chain([1000, 1500, 1513, 1514]) {
            let sent = frame(OURS, WORLDS, len as u64, len);
            net.wire.send(&WIRE_PLAIN, &sent).unwrap();
            let received = driver.receive(0).unwrap();
            assert_eq!(received.bytes, sent, "{len} bytes");
            assert_eq!((received.header[..10].to_vec(), received.buffers), (vec![0; 10], 1));
            reaches_the_world(&net, &mut driver, &frame(WORLDS, OURS, len as u64, len));
        }
    }
}

#[test]
fn a_burst_comes_in_order_and_interrupts_are_fewer() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    driver.offer_many(0, 128, 2048).unwrap();
    for round in 0..20 {
        for n in 0..100 {
            net.wire.send(&WIRE_PLAIN, &frame(OURS, WORLDS, round * 100 + n, 300)).unwrap();
        }
        for n in 0..100 {
            assert_eq!(driver.receive(0).unwrap().bytes, frame(OURS, WORLDS, round * 100 + n, 300));
        }
    }
    assert!(driver.queues[0].interrupts < 2000, "{} interrupts for 2000 frames", driver.queues[0].interrupts);
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_fills() {
    let Some(net) = start(&[]) else { return };
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    // Chains of several pieces, one of which a header alone does not fill.
    for _ in 0..80 {
        driver.offer(0, &[7, 50, 199]).unwrap();
    }
    driver.kick(0).unwrap();
    for len in [14, 244, 245, 500, 501, 1514] {
        let sent = frame(OURS, WORLDS, 1, len);
        net.wire.send(&WIRE_PLAIN, &sent).unwrap();
        let received = driver.receive(0).unwrap();
        assert_eq!(usize::from(received.buffers), (HEADER_LEN + len).div_ceil(256), "{len} bytes");
        assert_eq!(received.bytes, sent);
    }
}

fn gso_header(len: usize) -> [u8; HEADER_LEN] {
    let mut header = PLAIN;
    header[0] = NEEDS_CSUM;
    header[1] = if len > 1514 { TCPV4 } else { 0 };
    header[2..4].copy_from_slice(&54u16.to_le_bytes());
    header[4..6].copy_from_slice(&if len > 1514 { MSS } else { 0 }.to_le_bytes());
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    header
}

fn payload(len: usize) -> Vec<u8> {
    frame(OURS, WORLDS, len as u64, len)
}

#[test]
fn what_the_guest_leaves_to_be_summed_and_segmented_arrives_so() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    for len in [100, 1460, 5000, 20_000, 64_000] {
        let sent = tcp(WORLDS, OURS, (1, 2), &payload(len));
        let header = gso_header(sent.len());
        driver.send(0, &header, &sent).unwrap();
        let (came, bytes) = net.wire.receive(SOON).expect("a frame");
        assert_eq!(bytes, sent, "{len} bytes");
        // How long the headers are the kernel finds out itself.
        assert_eq!((&came[..2], &came[4..]), (&header[..2], &header[4..10]), "{len} bytes");
    }
}

/// Sends the guest one that is to be segmented.
fn send_gso(net: &Net, len: usize) -> Vec<u8> {
    let sent = tcp(OURS, WORLDS, (1, 2), &payload(len));
    let header: [u8; PACKET_HEADER_LEN] = gso_header(sent.len())[..PACKET_HEADER_LEN].try_into().unwrap();
    net.wire.send(&header, &sent).unwrap();
    sent
}

#[test]
fn what_the_guest_can_segment_itself_arrives_whole() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    driver.offer_many(0, 60, 1526).unwrap();
    // The first large one finds room for small ones only, the next ones have it all.
    for len in [20_000, 64_000, 100, 64_000, 5000] {
        let sent = send_gso(&net, len);
        let received = driver.receive(0).unwrap();
        let header = gso_header(sent.len());
        assert_eq!(received.bytes, sent, "{len} bytes");
        assert_eq!((&received.header[..2], &received.header[4..10]), (&header[..2], &header[4..10]));
    }
    works(&net, &mut driver);
}

#[test]
fn what_the_guest_cannot_segment_arrives_in_segments() {
    let Some(net) = start(&[]) else { return };
    let frontend = Frontend::connect(&net.daemon.socket).unwrap();
    let mut driver = NetDriver::start(frontend, !(feature::GUEST_GSO | feature::GUEST_CSUM), 256).unwrap();
    driver.offer_many(0, 64, 2048).unwrap();
    let sent = send_gso(&net, 20_000);
    let mut arrived = Vec::new();
    while arrived.len() < 20_000 {
        let segment = driver.receive(0).unwrap();
        assert_eq!(segment.header[..10], [0; 10], "there is nothing left to do");
        assert!(segment.bytes.len() <= 54 + usize::from(MSS) && tcp_sum_holds(&segment.bytes));
        arrived.extend_from_slice(&segment.bytes[54..]);
    }
    assert_eq!(arrived, sent[54..]);
    // One that is only to be summed.
    let sent = send_gso(&net, 1000);
    let received = driver.receive(0).unwrap();
    assert!(tcp_sum_holds(&received.bytes) && received.bytes[54..] == sent[54..]);
}

#[test]
fn a_frame_waits_for_the_buffers_that_it_lacks() {
    let Some(net) = start(&[]) else { return };
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    driver.offer_many(0, 3, 2048).unwrap();
    let sent = send_gso(&net, 20_000);
    let next = frame(OURS, WORLDS, 5, 64);
    net.wire.send(&WIRE_PLAIN, &next).unwrap();
    assert!(driver.receive_within(0, A_WHILE).unwrap().is_none(), "neither a part, nor the next one");
    driver.offer_many(0, 3, 2048).unwrap();
    assert!(driver.receive_within(0, A_WHILE).unwrap().is_none());
    driver.offer_many(0, 10, 2048).unwrap();
    assert_eq!(driver.receive(0).unwrap().bytes, sent);
    assert_eq!(driver.receive(0).unwrap().bytes, next);
}

#[test]
fn a_frame_for_which_no_ring_has_room_is_dropped() {
    let Some(net) = start(&[]) else { return };
    let frontend = Frontend::connect(&net.daemon.socket).unwrap();
    let mut driver = NetDriver::start(frontend, u64::MAX, 8).unwrap();
    driver.offer_many(0, 8, 1600).unwrap();
    send_gso(&net, 40_000);
    works(&net, &mut driver);
}

#[test]
fn without_mergeable_buffers_a_frame_that_is_longer_than_one_is_dropped() {
    let Some(net) = start(&[]) else { return };
    let frontend = Frontend::connect(&net.daemon.socket).unwrap();
    let mut driver = NetDriver::start(frontend, !feature::MRG_RXBUF, 256).unwrap();
    driver.offer_many(0, 8, 200).unwrap();
    net.wire.send(&WIRE_PLAIN, &frame(OURS, WORLDS, 1, 189)).unwrap();
    assert!(driver.receive_within(0, A_WHILE).unwrap().is_none());
    reaches_the_guest(&net, &mut driver, &frame(OURS, WORLDS, 2, 188));
    works(&net, &mut driver);
}

#[test]
fn a_guest_that_never_refills_gets_what_comes_later() {
    let Some(net) = start(&[]) else { return };
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    // More than the tap device keeps: the kernel drops, and nothing grows.
    for n in 0..3000 {
        let _ = net.wire.send(&WIRE_PLAIN, &frame(OURS, WORLDS, n, 1000));
    }
    let before = net.daemon.process().memory().unwrap();
    driver.offer_many(0, 128, 2048).unwrap();
    for n in 0..400 {
        assert_eq!(driver.receive(0).unwrap().bytes, frame(OURS, WORLDS, n, 1000), "frame {n}");
    }
    while driver.receive_within(0, A_WHILE).unwrap().is_some() {}
    assert!(net.daemon.process().memory().unwrap() < before + (1 << 20));
    works(&net, &mut driver);
}

#[test]
fn polling_changes_nothing_that_is_seen() {
    let Some((net, mut driver)) = start_with_driver(&["--poll-us", "200"]) else { return };
    for n in 0..200 {
        reaches_the_guest(&net, &mut driver, &frame(OURS, WORLDS, n, 60 + n as usize));
        reaches_the_world(&net, &mut driver, &frame(WORLDS, OURS, n, 60 + n as usize));
    }
}

#[test]
fn rings_stop_and_go_on_where_they_were() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    for round in 0..20 {
        works(&net, &mut driver);
        // Buffers were fetched ahead, and none is lost or used twice.
        let bases: Vec<u16> = (0..3).map(|index| driver.frontend.stop_queue(index).unwrap()).collect();
        assert_eq!(bases[0], driver.queues[0].device_used_idx(&driver.ram).unwrap(), "round {round}");
        for (index, base) in (0..).zip(bases) {
            driver.frontend.start_queue(index, &driver.queues[usize::from(index)], base).unwrap();
            driver.queues[usize::from(index)].kick_now().unwrap();
        }
    }
    for n in 0..200 {
        reaches_the_guest(&net, &mut driver, &frame(OURS, WORLDS, n, 1000));
    }
}

/// Where a ring goes on is its frontend's business, and need not be where the used index is.
#[test]
fn a_ring_stops_where_it_was_started_when_nothing_was_used() {
    let Some((_net, mut driver)) = start_with_driver(&[]) else { return };
    driver.frontend.stop_queue(0).unwrap();
    driver.frontend.start_queue(0, &driver.queues[0], 3).unwrap();
    driver.queues[0].kick_now().unwrap();
    assert_eq!(driver.frontend.stop_queue(0).unwrap(), 3);
}
