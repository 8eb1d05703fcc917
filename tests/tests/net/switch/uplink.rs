//! A tap device as the switch's way to the world.

use super::*;

fn with_uplink(ports: usize, args: &[&str]) -> Option<(Bridge, Wire)> {
    network::enter()?;
    let args: Vec<&str> = ["--tap", "tap0"].into_iter().chain(args.iter().copied()).collect();
    let bridge = bridge(ports, &args);
    Some((bridge, Wire::open("tap0").unwrap()))
}

/// A frame of the world's to a guest, and one back.
fn meets_the_world(driver: &mut NetDriver, port: u8, wire: &Wire) {
    let deadline = std::time::Instant::now() + SOON;
    let sent = frame(guest(port), WORLDS, 1, 100);
    loop {
        wire.send(&WIRE_PLAIN, &sent).unwrap();
        match driver.receive_within(0, Duration::from_millis(20)).unwrap() {
            Some(came) if came.bytes == sent => break,
            _ => assert!(std::time::Instant::now() < deadline, "no frame comes from the world"),
        }
    }
    let back = frame(WORLDS, guest(port), 2, 100);
    driver.send(0, &PLAIN, &back).unwrap();
    while wire.receive(SOON).expect("a frame").1 != back {}
}

#[test]
fn guests_reach_one_another_and_the_world() {
    let Some((bridge, wire)) = with_uplink(2, &[]) else { return };
    let [mut a, mut b] = bridge.drivers();
    meets_the_world(&mut a, 0, &wire);
    meets_the_world(&mut b, 1, &wire);
    meet((&mut a, 0), (&mut b, 1));
    empty(&mut a);
    empty(&mut b);
    while wire.receive(A_WHILE).is_some() {}
    // What is between guests is not the world's.
    passes(&mut a, &mut b, &between(0, 1, 5, 100));
    assert!(wire.receive(A_WHILE).is_none());
    for to in [EVERYBODY, GROUP] {
        let sent = frame(to, WORLDS, 6, 100);
        wire.send(&WIRE_PLAIN, &sent).unwrap();
        assert_eq!([a.receive(0).unwrap().bytes, b.receive(0).unwrap().bytes], [sent.clone(), sent]);
    }
    for len in (14..100).chain([1514]) {
        let sent = frame(WORLDS, guest(0), len as u64, len);
        a.send(0, &PLAIN, &sent).unwrap();
        assert_eq!(wire.receive(SOON).expect("a frame").1, sent);
        let sent = frame(guest(0), WORLDS, len as u64, len);
        wire.send(&WIRE_PLAIN, &sent).unwrap();
        assert_eq!(a.receive(0).unwrap().bytes, sent);
    }
}

#[test]
fn isolated_guests_reach_the_world_alone() {
    let Some((bridge, wire)) = with_uplink(2, &["--isolate"]) else { return };
    let [mut a, mut b] = bridge.drivers();
    meets_the_world(&mut a, 0, &wire);
    meets_the_world(&mut b, 1, &wire);
    empty(&mut a);
    empty(&mut b);
    for to in [guest(1), EVERYBODY, GROUP, WORLDS, [2, 0, 0, 0, 0, 9]] {
        a.send(0, &PLAIN, &frame(to, guest(0), 1, 90)).unwrap();
        nothing_comes(&mut b);
    }
    let sent = frame(EVERYBODY, WORLDS, 6, 100);
    wire.send(&WIRE_PLAIN, &sent).unwrap();
    assert_eq!([a.receive(0).unwrap().bytes, b.receive(0).unwrap().bytes], [sent.clone(), sent]);
}

#[test]
fn what_is_to_be_segmented_passes_whole_in_both_directions() {
    let Some((bridge, wire)) = with_uplink(2, &[]) else { return };
    let mut a = bridge.driver(0);
    // This one can do nothing for itself.
    let mut b = bridge.driver_with(1, !(feature::GUEST_GSO | feature::GUEST_CSUM));
    meets_the_world(&mut a, 0, &wire);
    meets_the_world(&mut b, 1, &wire);
    empty(&mut a);
    empty(&mut b);
    while wire.receive(A_WHILE).is_some() {}
    let mut header = PLAIN;
    (header[0], header[1]) = (1, 1);
    header[2..4].copy_from_slice(&54u16.to_le_bytes());
    header[4..6].copy_from_slice(&1448u16.to_le_bytes());
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    let payload = frame(OURS, WORLDS, 1, 30_000);
    let sent = tcp(WORLDS, guest(0), (1, 2), &payload);
    a.send(0, &header, &sent).unwrap();
    let (came, bytes) = wire.receive(SOON).expect("a frame");
    assert_eq!((bytes, &came[..2]), (sent, &header[..2]));
    let wire_header: [u8; PACKET_HEADER_LEN] = header[..PACKET_HEADER_LEN].try_into().unwrap();
    let sent = tcp(guest(0), WORLDS, (1, 2), &payload);
    wire.send(&wire_header, &sent).unwrap();
    assert_eq!(a.receive(0).unwrap().bytes, sent);
    let sent = tcp(guest(1), WORLDS, (1, 2), &payload);
    wire.send(&wire_header, &sent).unwrap();
    let mut arrived = Vec::new();
    while arrived.len() < payload.len() {
        let part = b.receive(0).unwrap();
        assert!(part.header[..10] == [0; 10] && tcp_sum_holds(&part.bytes));
        arrived.extend_from_slice(&part.bytes[54..]);
    }
    assert_eq!(arrived, payload);
}

#[test]
fn the_tap_device_is_removed_in_the_end_and_its_loss_ends_the_switch() {
    let Some((mut bridge, _wire)) = with_uplink(2, &["--mtu", "2000"]) else { return };
    let mut a = bridge.driver(0);
    assert_eq!(a.frontend.config(10, 2).unwrap(), 2000u16.to_le_bytes());
    bridge.daemon.signal(rustix::process::Signal::TERM).unwrap();
    assert_eq!(bridge.daemon.wait().unwrap().code(), Some(0));
    assert!(!network::ip("-o link").contains("tap0"));
    assert!(bridge.sockets.iter().all(|socket| !socket.exists()), "no socket is left behind");
    bridge.daemon.kill_and_restart().unwrap();
    network::ip("link del tap0");
    assert_eq!(bridge.daemon.wait().unwrap().code(), Some(3));
    assert!(bridge.daemon.log().contains("the tap device is gone"));
}
