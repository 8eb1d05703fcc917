//! What a hostile guest writes into its rings: each request fails or each queue, never the daemon.

use cleave_tests::driver::{Buffer, Frontend, SplitQueue};
use proptest::prelude::*;

use super::*;

const SIZE: u16 = 64;

/// Sends chains that are no frames, and has each given back.
#[test]
fn what_is_no_frame_is_dropped_and_the_next_one_sent() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    let (room, end) = (driver.send_room(0), driver.ram.hole());
    driver.ram.write(room, &[0; 4096]).unwrap();
    let cases: &[&[Buffer]] = &[
        &[Buffer::to_read(room, 0)],
        &[Buffer::to_read(room, 11)],
        &[Buffer::to_read(room, 12)],
        &[Buffer::to_read(room, 25)],
        &[Buffer::to_write(room, 100)],
        &[Buffer::to_read(room, 12), Buffer::to_write(room, 100)],
        &[Buffer::to_read(end, 100)],
        &[Buffer::to_read(end - 20, 100)],
        &[Buffer::to_read(room, 12), Buffer::to_read(u64::MAX - 99, 100)],
        &[Buffer::to_read(room, 12), Buffer::to_read(driver.ram.high() - 50, 100)],
        &[Buffer::to_read(0, 1 << 20)],
        &[Buffer::to_read(0, 66_000)],
        &[Buffer::to_read(0, u32::MAX)],
        &[Buffer::to_read(0, u32::MAX), Buffer::to_read(0, u32::MAX)],
    ];
    for (number, case) in cases.iter().enumerate() {
        assert_eq!(driver.send_chain(0, case).unwrap(), 0, "case {number}");
        works(&net, &mut driver);
    }
    assert!(net.daemon.log().contains("which are not shown"), "complaints are bounded");
    // In as many pieces as there may be.
    driver.ram.write(room, &[0; 4096]).unwrap();
    let pieces: Vec<Buffer> = (0..150).map(|n| Buffer::to_read(room + n, 1)).collect();
    assert_eq!(driver.send_chain(0, &pieces).unwrap(), 0);
    assert_eq!(net.wire.receive(SOON).expect("a frame").1, [0; 138]);
}

/// Headers that lie: the kernel refuses them, or makes of them what it can.
#[test]
fn headers_of_no_sense_do_no_harm() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) };
    let header = prop::collection::vec(prop_oneof![0u8..5, any::<u8>()], 12);
    let frames = prop_oneof![14usize..100, 100usize..60_000];
    let shared = std::cell::RefCell::new(&mut driver);
    proptest!(config, |(header in header, len in frames, is_tcp: bool)| {
        let frame = if is_tcp { tcp(WORLDS, OURS, (1, 2), &vec![7; len]) } else { frame(WORLDS, OURS, 1, len) };
        shared.borrow_mut().send(0, &header.try_into().unwrap(), &frame).unwrap();
    });
    while net.wire.receive(A_WHILE).is_some() {}
    works(&net, &mut driver);
}

#[test]
fn what_is_no_buffer_is_given_back_and_the_others_are_used() {
    let Some(net) = start(&[]) else { return };
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    let end = driver.ram.hole();
    let room = driver.ram.allocate(4096, 64);
    let cases: &[&[Buffer]] = &[
        &[Buffer::to_write(room, 0)],
        &[Buffer::to_write(room, 11)],
        &[Buffer::to_read(room, 100)],
        &[Buffer::to_read(room, 100), Buffer::to_write(room, 2000)],
        &[Buffer::to_write(end, 2000)],
        &[Buffer::to_write(end - 100, 2000)],
        &[Buffer::to_write(u64::MAX - 1999, 2000)],
        &[Buffer::to_write(room, 12), Buffer::to_write(end, 2000)],
    ];
    for (number, case) in cases.iter().enumerate() {
        let queue = &mut driver.queues[0];
        let bad = queue.add(&driver.ram, case).unwrap().unwrap();
        queue.kick(&driver.ram).unwrap();
        // It is looked at when there is a frame, or at once; either way it comes back with nothing in it.
        net.wire.send(&WIRE_PLAIN, &frame(OURS, WORLDS, 1, 300)).unwrap();
        queue.wait(&driver.ram, SOON).unwrap();
        assert_eq!(queue.pop_used(&driver.ram).unwrap(), Some((bad, 0)), "case {number}");
        driver.offer(0, &[2048]).unwrap();
        driver.kick(0).unwrap();
        assert_eq!(driver.receive(0).unwrap().bytes, frame(OURS, WORLDS, 1, 300), "case {number}");
        // That buffer was offered again; it is used by the next frame, so that the next case is alone.
        driver.frontend.stop_queue(0).unwrap();
        driver.queues[0].reset(&driver.ram).unwrap();
        driver.frontend.start_queue(0, &driver.queues[0], 0).unwrap();
        driver.queues[0].kick_now().unwrap();
    }
}

/// A ring broken by `break_it` stops for good, and works again once it is set up again.
fn breaks(break_it: impl Fn(&mut NetDriver)) {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    works(&net, &mut driver);
    break_it(&mut driver);
    driver.queues[0].kick_now().unwrap();
    driver.queues[1].kick_now().unwrap();
    // A receive queue is looked at when there are frames.
    for n in 0..80 {
        net.wire.send(&WIRE_PLAIN, &frame(OURS, WORLDS, n, 1000)).unwrap();
    }
    net.daemon.wait_for_log("is broken until it is set up again").unwrap();
    let socket = net.daemon.socket.clone();
    driver.reconnect(&socket, u64::MAX).unwrap();
    driver.offer_many(0, 128, 2048).unwrap();
    while driver.receive_within(0, A_WHILE).unwrap().is_some() {}
    works(&net, &mut driver);
}

#[test]
fn an_index_that_jumps_breaks_the_ring() {
    for queue in [0, 1] {
        breaks(|driver| {
            let idx = driver.queues[queue].avail_idx().wrapping_add(257);
            driver.queues[queue].set_avail_idx(&driver.ram, idx).unwrap();
        });
    }
}

#[test]
fn a_head_that_is_no_descriptor_breaks_the_ring() {
    for queue in [0, 1] {
        breaks(|driver| driver.queues[queue].make_available(&driver.ram, 256).unwrap());
    }
}

#[test]
fn a_buffer_that_is_offered_twice_at_once_breaks_the_ring() {
    breaks(|driver| {
        // Small ones, so that both are fetched for one frame.
        let head = driver.offer(0, &[64]).unwrap();
        for _ in 0..3 {
            driver.queues[0].make_available(&driver.ram, head).unwrap();
        }
    });
}

#[test]
fn a_control_chain_that_is_none_is_given_back() {
    let Some((_net, mut driver)) = start_with_driver(&[]) else { return };
    let room = driver.ram.allocate(4096, 64);
    let end = driver.ram.hole();
    for (number, (chain, written)) in [
        (vec![Buffer::to_read(room, 3)], 0),
        (vec![Buffer::to_write(room, 1)], 1),
        (vec![Buffer::to_read(room, 3), Buffer::to_write(end, 1)], 0),
        (vec![Buffer::to_read(end, 3), Buffer::to_write(room + 9, 1)], 1),
        (vec![Buffer::to_read(0, u32::MAX - 1), Buffer::to_write(room + 9, 1)], 1),
    ]
    .into_iter()
    .enumerate()
    {
        let queue = driver.queues.last_mut().unwrap();
        let head = queue.add(&driver.ram, &chain).unwrap().unwrap();
        queue.kick(&driver.ram).unwrap();
        queue.wait(&driver.ram, SOON).unwrap();
        assert_eq!(queue.pop_used(&driver.ram).unwrap(), Some((head, written)), "case {number}");
    }
    assert_eq!(driver.control(0, 0, &[1]).unwrap(), 0);
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![4 => 0u64..0x20_0000, 1 => any::<u64>(), 1 => 0x1_0000_0000u64..0x1_0020_0000];
    let len = prop_oneof![6 => prop::sample::select(vec![0u32, 1, 2, 12, 16, 60, 512, 2048, 65_000]), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..4, 1 => 4u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next)
}

#[test]
fn no_ring_ends_the_daemon() {
    let Some(net) = start(&["--queues", "2"]) else { return };
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) };
    let table = prop::collection::vec(descriptor(), usize::from(SIZE));
    let heads = prop::collection::vec(prop_oneof![20 => 0..SIZE, 1 => any::<u16>()], 1..200);
    let jump = prop_oneof![5 => Just(0u16), 1 => any::<u16>()];
    proptest!(config, |(table in table, heads in heads, jump in jump, mergeable: bool)| {
        let frontend = Frontend::connect(&net.daemon.socket).unwrap();
        let features = if mergeable { u64::MAX } else { !feature::MRG_RXBUF };
        let mut driver = NetDriver::start(frontend, features, SIZE).unwrap();
        let NetDriver { queues, ram, frontend, .. } = &mut driver;
        for queue in queues.iter_mut() {
            let queue: &mut SplitQueue = queue;
            for (index, (addr, len, flags, next)) in table.iter().enumerate() {
                queue.set_descriptor(ram, index as u16, *addr, *len, *flags, *next).unwrap();
            }
            for batch in heads.chunks(usize::from(SIZE) / 2) {
                for head in batch {
                    queue.make_available(ram, *head).unwrap();
                }
                queue.kick_now().unwrap();
                for n in 0..4 {
                    let _ = net.wire.send(&WIRE_PLAIN, &super::frame(OURS, WORLDS, n, 300 * n as usize));
                }
            }
            let idx = queue.avail_idx().wrapping_add(jump);
            queue.set_avail_idx(ram, idx).unwrap();
            queue.kick_now().unwrap();
        }
        // It still answers.
        for index in 0..queues.len() as u16 {
            frontend.stop_queue(index).unwrap();
        }
    });
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    driver.offer_many(0, 64, 2048).unwrap();
    while driver.receive_within(0, A_WHILE).unwrap().is_some() {}
    while net.wire.receive(A_WHILE).is_some() {}
    works(&net, &mut driver);
}
