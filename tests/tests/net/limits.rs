//! Rate limits: what passes in a span of time, and what becomes of the rest.

use std::time::Instant;

use super::*;

/// Time enough for a tenth of a second's burst to be over, and for figures that a busy machine leaves alone.
const SPAN: Duration = Duration::from_secs(2);

#[test]
fn what_the_guest_sends_is_limited_and_none_of_it_is_lost() {
    let Some((net, mut driver)) = start_with_driver(&["--throttle", "bps-tx=100000"]) else { return };
    let begun = Instant::now();
    // 10000 bytes are the bucket's own; 200000 at the rate take two seconds.
    for n in 0..210 {
        let sent = frame(WORLDS, OURS, n, 1000);
        driver.send(0, &PLAIN, &sent).unwrap();
        assert_eq!(net.wire.receive(SOON).expect("a frame").1, sent, "frame {n}");
    }
    assert!(begun.elapsed() >= Duration::from_millis(1980), "{:?}", begun.elapsed());
    // The other direction is free.
    for n in 0..50 {
        reaches_the_guest(&net, &mut driver, &frame(OURS, WORLDS, n, 1000));
    }
}

#[test]
fn what_the_guest_receives_is_limited_by_packets() {
    let Some((net, mut driver)) = start_with_driver(&["--throttle", "pps-rx=100,pps-rx-max=0"]) else {
        return;
    };
    let begun = Instant::now();
    let mut came = 0;
    while begun.elapsed() < SPAN {
        // The kernel keeps some of them, and drops the rest.
        for n in 0..100 {
            let _ = net.wire.send(&WIRE_PLAIN, &frame(OURS, WORLDS, n, 200));
        }
        while driver.receive_within(0, Duration::from_millis(20)).unwrap().is_some() {
            came += 1;
        }
    }
    let may = 100.0 * begun.elapsed().as_secs_f64() + 10.0 + 1.0;
    assert!(f64::from(came) <= may && came > 100, "{came} of {may} frames");
}

#[test]
fn a_queue_that_waits_for_its_time_stops_at_once_and_goes_on() {
    let Some((net, mut driver)) = start_with_driver(&["--throttle", "pps-tx=1,pps-rx=1000"]) else { return };
    driver.send(0, &PLAIN, &frame(WORLDS, OURS, 1, 100)).unwrap();
    // One more is under way, and waits for a second or so.
    let room = driver.send_room(0);
    let waits = frame(WORLDS, OURS, 2, 100);
    driver.ram.write(room, &[&PLAIN[..], &waits].concat()).unwrap();
    let chain = [cleave_tests::driver::Buffer::to_read(room, (HEADER_LEN + 100) as u32)];
    driver.queues[1].add(&driver.ram, &chain).unwrap().unwrap();
    driver.kick(1).unwrap();
    let begun = Instant::now();
    let base = driver.frontend.stop_queue(1).unwrap();
    assert_eq!(base, 1, "the second was not sent");
    assert!(begun.elapsed() < Duration::from_millis(700), "{:?}", begun.elapsed());
    driver.frontend.start_queue(1, &driver.queues[1], base).unwrap();
    driver.queues[1].kick_now().unwrap();
    assert_eq!(net.wire.receive(SOON).expect("the first").1, frame(WORLDS, OURS, 1, 100));
    assert_eq!(net.wire.receive(SOON).expect("the second").1, waits);
}

#[test]
fn several_queues_share_a_limit() {
    let args = ["--queues", "2", "--throttle", "bps-tx=100000"];
    let Some((net, mut driver)) = start_with_driver(&args) else { return };
    driver.offer_many(1, 64, 2048).unwrap();
    let begun = Instant::now();
    for n in 0..110 {
        let sent = frame(WORLDS, OURS, n, 1000);
        driver.send(n as usize % 2, &PLAIN, &sent).unwrap();
        assert_eq!(net.wire.receive(SOON).expect("a frame").1, sent);
    }
    assert!(begun.elapsed() >= Duration::from_millis(960), "{:?}", begun.elapsed());
}
