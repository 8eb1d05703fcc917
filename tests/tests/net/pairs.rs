//! Several pairs of queues.

use super::*;

const PORTS: u16 = 64;

/// How many of frames of many flows come on each pair.
fn spread(net: &Net, driver: &mut NetDriver) -> Vec<usize> {
    for port in 0..PORTS {
        net.wire.send(&WIRE_PLAIN, &tcp(OURS, WORLDS, (port, 7), b"words")).unwrap();
    }
    let mut counts = vec![0; driver.pairs()];
    while counts.iter().sum::<usize>() < usize::from(PORTS) {
        let before = counts.clone();
        for (pair, count) in counts.iter_mut().enumerate() {
            while driver.receive_within(pair, A_WHILE).unwrap().is_some() {
                *count += 1;
            }
        }
        assert_ne!(before, counts, "frames are missing");
    }
    counts
}

#[test]
fn frames_come_on_the_pairs_that_the_driver_uses() {
    let Some((net, mut driver)) = start_with_driver(&["--queues", "4"]) else { return };
    assert_eq!((driver.pairs(), driver.negotiated.num_queues), (4, 9));
    for pair in 0..4 {
        driver.offer_many(pair, 64, 2048).unwrap();
    }
    assert_eq!(spread(&net, &mut driver), [64, 0, 0, 0], "one, until the driver says otherwise");
    assert_eq!(driver.control(4, 0, &[4, 0]).unwrap(), 0);
    let counts = spread(&net, &mut driver);
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    for pair in 0..4 {
        let sent = frame(WORLDS, OURS, pair as u64, 200);
        driver.send(pair, &PLAIN, &sent).unwrap();
        assert_eq!(net.wire.receive(SOON).expect("a frame").1, sent);
    }
    assert_eq!(driver.control(4, 0, &[2, 0]).unwrap(), 0);
    let counts = spread(&net, &mut driver);
    assert!(counts[0] > 0 && counts[1] > 0 && counts[2..] == [0, 0], "{counts:?}");
    // A frame on a pair that is not in use is a frame.
    let sent = frame(WORLDS, OURS, 9, 200);
    driver.send(3, &PLAIN, &sent).unwrap();
    assert_eq!(net.wire.receive(SOON).expect("a frame").1, sent);
    for refused in [[0, 0], [5, 0], [0xff, 0xff]] {
        assert_eq!(driver.control(4, 0, &refused).unwrap(), 1);
    }
    for n in 0..50 {
        assert_eq!(driver.control(4, 0, &[1 + n % 4, 0]).unwrap(), 0);
    }
    assert_eq!(driver.control(4, 0, &[1, 0]).unwrap(), 0);
    assert_eq!(spread(&net, &mut driver), [64, 0, 0, 0]);
}

#[test]
fn a_driver_of_one_pair_has_its_control_queue_third() {
    let Some(net) = start(&["--queues", "2"]) else { return };
    let frontend = cleave_tests::driver::Frontend::connect(&net.daemon.socket).unwrap();
    let mut driver = NetDriver::start(frontend, !(1 << 22), 64).unwrap();
    assert_eq!(driver.queues.len(), 3);
    driver.offer_many(0, 64, 2048).unwrap();
    assert_eq!(spread(&net, &mut driver), [64]);
    assert_eq!(driver.control(0, 0, &[0]).unwrap(), 0);
    assert_eq!(driver.control(4, 0, &[1, 0]).unwrap(), 1, "it was not negotiated");
}

/// Frontends that keep the control queue to themselves start the pairs that are in use, and no others.
#[test]
fn without_our_control_queue_the_pairs_that_run_are_used() {
    let Some(net) = start(&["--queues", "2"]) else { return };
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    driver.offer_many(0, 64, 2048).unwrap();
    driver.offer_many(1, 64, 2048).unwrap();
    let _ = driver.frontend.channel.socket().shutdown(std::net::Shutdown::Both);
    driver.frontend = cleave_tests::driver::Frontend::connect(&net.daemon.socket).unwrap();
    driver.frontend.negotiate(driver.negotiated.acked).unwrap();
    driver.frontend.set_mem_table(&driver.ram).unwrap();
    let start = |driver: &mut NetDriver, index: u16| {
        driver.frontend.start_queue(index, &driver.queues[usize::from(index)], 0).unwrap();
        driver.queues[usize::from(index)].kick_now().unwrap();
    };
    start(&mut driver, 0);
    start(&mut driver, 1);
    assert_eq!(spread(&net, &mut driver), [64, 0]);
    start(&mut driver, 2);
    start(&mut driver, 3);
    // Its thread takes up the kick in its own time.
    let used =
        (0..100).map(|_| spread(&net, &mut driver)).find(|counts| counts.iter().all(|count| *count > 0));
    assert!(used.is_some());
}

/// As Linux does it: it sets up all pairs, and gives buffers to those that it uses only.
#[test]
fn a_successor_sends_no_frame_to_a_pair_without_buffers() {
    let Some((mut net, mut driver)) = start_with_driver(&["--queues", "4"]) else { return };
    driver.offer_many(1, 64, 2048).unwrap();
    assert_eq!(driver.control(4, 0, &[2, 0]).unwrap(), 0);
    let counts = spread(&net, &mut driver);
    assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
    net.daemon.kill_and_restart().unwrap();
    let socket = net.daemon.socket.clone();
    driver.resume(&socket, None).unwrap();
    assert_eq!(spread(&net, &mut driver)[2..], [0, 0]);
    // A pair that is filled later is used from then on.
    driver.offer_many(3, 64, 2048).unwrap();
    while spread(&net, &mut driver)[3] == 0 {}
}
