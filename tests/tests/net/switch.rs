//! cleave-net as a switch, between drivers and a network of the test's own.

mod hostile;
mod kill;
mod offloads;
mod program;
mod uplink;

use std::path::PathBuf;

use cleave_tests::driver::{Frontend, binary};

use super::*;

/// The switch with as many drivers as it has ports.
struct Bridge {
    daemon: Daemon,
    sockets: Vec<PathBuf>,
}

/// A switch of so many ports.
fn bridge(ports: usize, args: &[&str]) -> Bridge {
    let mut sockets = Vec::new();
    let daemon = Daemon::start_other(&binary("cleave-net").unwrap(), |socket| {
        let directory = socket.parent().unwrap();
        // The last one is what is waited for.
        let name = |port| if port + 1 == ports { "socket".to_owned() } else { format!("p{port}") };
        let mut words = vec!["--switch".to_owned(), directory.display().to_string()];
        for port in 0..ports {
            sockets.push(directory.join(name(port)));
            words.extend(["--port".to_owned(), format!("{},mac=52:54:00:00:01:{port:02x}", name(port))]);
        }
        words.extend(args.iter().map(|word| (*word).to_owned()));
        words
    });
    Bridge { daemon: daemon.unwrap(), sockets }
}

/// The address of the guest at a port.
fn guest(port: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 1, port]
}

impl Bridge {
    /// A driver with every feature, and buffers to receive.
    fn driver(&self, port: usize) -> NetDriver {
        self.driver_with(port, u64::MAX)
    }

    fn driver_with(&self, port: usize, features: u64) -> NetDriver {
        let frontend = Frontend::connect(&self.sockets[port]).unwrap();
        let mut driver = NetDriver::start(frontend, features, 256).unwrap();
        driver.offer_many(0, 100, 2048).unwrap();
        // Once a command is answered the queues before it have been seen to.
        assert_eq!(driver.control(0, 0, &[1]).unwrap(), 0);
        driver
    }

    fn drivers<const N: usize>(&self) -> [NetDriver; N] {
        std::array::from_fn(|port| self.driver(port))
    }
}

/// A frame from the guest at one port to that at another.
fn between(from: u8, to: u8, seed: u64, len: usize) -> Vec<u8> {
    frame(guest(to), guest(from), seed, len)
}

/// Waits until a guest takes frames: its queue starts with its first kick.
fn until_it_takes(from: &mut NetDriver, to: &mut NetDriver, frame: &[u8]) {
    let deadline = std::time::Instant::now() + SOON;
    loop {
        from.send(0, &PLAIN, frame).unwrap();
        match to.receive_within(0, Duration::from_millis(20)).unwrap() {
            Some(came) if came.bytes == frame => break,
            _ => assert!(std::time::Instant::now() < deadline, "no frame comes"),
        }
    }
    empty(to);
}

/// Both can reach each other.
fn meet(one: (&mut NetDriver, u8), other: (&mut NetDriver, u8)) {
    until_it_takes(one.0, other.0, &between(one.1, other.1, 1, 60));
    until_it_takes(other.0, one.0, &between(other.1, one.1, 2, 60));
}

/// Whatever has come is taken away.
fn empty(driver: &mut NetDriver) {
    while driver.receive_within(0, A_WHILE).unwrap().is_some() {}
}

fn passes(from: &mut NetDriver, to: &mut NetDriver, frame: &[u8]) {
    from.send(0, &PLAIN, frame).unwrap();
    assert_eq!(to.receive(0).unwrap().bytes, frame);
}

fn nothing_comes(driver: &mut NetDriver) {
    assert_eq!(driver.receive_within(0, A_WHILE).unwrap(), None);
}

#[test]
fn frames_of_every_size_pass_between_guests() {
    let bridge = bridge(2, &[]);
    for features in
        [u64::MAX, !feature::EVENT_IDX, !feature::INDIRECT, !feature::MRG_RXBUF, !feature::GUEST_CSUM]
    {
        let (mut a, mut b) = (bridge.driver(0), bridge.driver_with(1, features));
        meet((&mut a, 0), (&mut b, 1));
        for len in (14..200).chain([1000, 1500, 1513, 1514]) {
            let sent = between(0, 1, len as u64, len);
            a.send(0, &PLAIN, &sent).unwrap();
            let came = b.receive(0).unwrap();
            assert_eq!(came.bytes, sent, "{len} bytes");
            assert_eq!((came.header[..10].to_vec(), came.buffers), (vec![0; 10], 1));
            passes(&mut b, &mut a, &between(1, 0, len as u64, len));
        }
    }
}

#[test]
fn an_address_is_learned_and_what_is_not_known_goes_to_all() {
    let bridge = bridge(3, &[]);
    let [mut a, mut b, mut c] = bridge.drivers();
    // Nobody has said where b is.
    until_it_takes(&mut a, &mut b, &between(0, 1, 1, 60));
    until_it_takes(&mut a, &mut c, &between(0, 1, 2, 60));
    empty(&mut b);
    empty(&mut c);
    // a has.
    passes(&mut b, &mut a, &between(1, 0, 3, 60));
    nothing_comes(&mut c);
    passes(&mut a, &mut b, &between(0, 1, 4, 60));
    nothing_comes(&mut c);
    for to in [EVERYBODY, GROUP] {
        let sent = frame(to, guest(0), 5, 80);
        a.send(0, &PLAIN, &sent).unwrap();
        assert_eq!([b.receive(0).unwrap().bytes, c.receive(0).unwrap().bytes], [sent.clone(), sent]);
        nothing_comes(&mut a);
    }
    // It goes where the address is, and an address is where it was last.
    let moved = frame(EVERYBODY, guest(1), 6, 80);
    c.send(0, &PLAIN, &moved).unwrap();
    assert_eq!(b.receive(0).unwrap().bytes, moved);
    assert_eq!(a.receive(0).unwrap().bytes, moved);
    nothing_comes(&mut c);
    passes(&mut a, &mut c, &between(0, 1, 7, 60));
    nothing_comes(&mut b);
    // To itself, and what is between bridges alone.
    a.send(0, &PLAIN, &between(0, 0, 8, 60)).unwrap();
    a.send(0, &PLAIN, &frame([1, 0x80, 0xc2, 0, 0, 1], guest(0), 9, 60)).unwrap();
    nothing_comes(&mut b);
    nothing_comes(&mut c);
    passes(&mut a, &mut b, &frame([1, 0x80, 0xc2, 0, 0, 0], guest(0), 10, 60));
}

#[test]
fn an_address_is_forgotten_in_time() {
    let bridge = bridge(3, &["--ageing", "1"]);
    let [mut a, mut b, mut c] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
    meet((&mut a, 0), (&mut c, 2));
    empty(&mut b);
    empty(&mut c);
    passes(&mut b, &mut a, &between(1, 0, 1, 60));
    passes(&mut a, &mut b, &between(0, 1, 2, 60));
    nothing_comes(&mut c);
    // b is silent; at last what is for it reaches everybody.
    until_it_takes(&mut a, &mut c, &between(0, 1, 3, 60));
}

#[test]
fn what_a_guest_does_not_want_takes_none_of_its_buffers() {
    let bridge = bridge(2, &[]);
    let [mut a, mut b] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
    assert_eq!(b.control(0, 0, &[0]).unwrap(), 0);
    for number in 0..500 {
        a.send(0, &PLAIN, &frame(GROUP, guest(0), number, 90)).unwrap();
    }
    passes(&mut a, &mut b, &between(0, 1, 4, 60));
    assert_eq!(b.control(0, 1, &[1]).unwrap(), 0);
    passes(&mut a, &mut b, &frame(GROUP, guest(0), 5, 90));
}

#[test]
fn a_guest_that_does_not_refill_loses_its_own_frames_alone() {
    let bridge = bridge(3, &[]);
    let [mut a, mut b, mut c] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
    meet((&mut a, 0), (&mut c, 2));
    empty(&mut b);
    empty(&mut c);
    let before = bridge.daemon.process().memory().unwrap();
    // Nobody takes them, and each is done with at once.
    for number in 0..3000 {
        a.send(0, &PLAIN, &between(0, 1, number, 1000)).unwrap();
        if number % 100 == 0 {
            passes(&mut a, &mut c, &between(0, 2, number, 1000));
        }
    }
    assert!(bridge.daemon.process().memory().unwrap() < before + (1 << 20));
    for number in 0..100 {
        assert_eq!(b.receive(0).unwrap().bytes, between(0, 1, number, 1000), "frame {number}");
    }
    nothing_comes(&mut b);
    passes(&mut a, &mut b, &between(0, 1, 1, 99));
    bridge.daemon.signal(rustix::process::Signal::USR1).unwrap();
    bridge.daemon.wait_for_log("2900 without room").unwrap();
}

#[test]
fn flows_go_to_the_pairs_that_are_in_use() {
    let bridge = bridge(2, &["--queues", "4"]);
    let [mut a, mut b] = bridge.drivers();
    for pair in 1..4 {
        b.offer_many(pair, 64, 2048).unwrap();
    }
    meet((&mut a, 0), (&mut b, 1));
    let mut spread = |b: &mut NetDriver| {
        for port in 0..64 {
            a.send(usize::from(port % 4), &PLAIN, &tcp(guest(1), guest(0), (port, 7), b"words")).unwrap();
        }
        let mut counts = vec![0; 4];
        while counts.iter().sum::<usize>() < 64 {
            let before = counts.clone();
            for (pair, count) in counts.iter_mut().enumerate() {
                while b.receive_within(pair, A_WHILE).unwrap().is_some() {
                    *count += 1;
                }
            }
            assert_ne!(before, counts, "frames are missing");
        }
        counts
    };
    assert_eq!(spread(&mut b), [64, 0, 0, 0], "one, until the driver says otherwise");
    assert_eq!(b.control(4, 0, &[4, 0]).unwrap(), 0);
    let counts = spread(&mut b);
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    assert_eq!(b.control(4, 0, &[2, 0]).unwrap(), 0);
    let counts = spread(&mut b);
    assert!(counts[0] > 0 && counts[1] > 0 && counts[2..] == [0, 0], "{counts:?}");
}

#[test]
fn a_guest_that_comes_back_is_served_while_others_go_on() {
    let bridge = bridge(3, &[]);
    let [mut a, mut b, mut c] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
    meet((&mut a, 0), (&mut c, 2));
    for round in 0..10 {
        drop(b);
        for number in 0..50 {
            a.send(0, &PLAIN, &between(0, 1, number, 500)).unwrap();
            passes(&mut a, &mut c, &between(0, 2, number, 500));
        }
        b = bridge.driver(1);
        until_it_takes(&mut a, &mut b, &between(0, 1, 1000 + round, 60));
        empty(&mut c);
    }
}
