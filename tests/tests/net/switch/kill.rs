//! The switch is killed (SIGKILL) under traffic between all its guests, and a successor goes on.

use super::*;

const KILLS: u32 = 20;

fn numbered(from: u8, to: u8, number: u64) -> Vec<u8> {
    let mut frame = between(from, to, number, 60 + (number * 37 % 1400) as usize);
    frame[14..22].copy_from_slice(&number.to_le_bytes());
    frame
}

/// Takes what has come from `from`: whole frames, each after the last one. Gives how many.
fn take_all(driver: &mut NetDriver, from: u8, to: u8, last: &mut Option<u64>) -> u64 {
    let mut count = 0;
    while let Some(frame) = driver.receive_within(0, Duration::from_millis(5)).unwrap() {
        let number = u64::from_le_bytes(frame.bytes[14..22].try_into().unwrap());
        assert_eq!(frame.bytes, numbered(from, to, number), "frame {number} is damaged");
        // The one that was being sent when the switch died may come twice.
        assert!(last.is_none_or(|last| number >= last), "{number} comes after {last:?}");
        *last = Some(number);
        count += 1;
    }
    count
}

/// As [`NetDriver::send`], without waiting.
fn post(driver: &mut NetDriver, rooms: &[u64], number: usize, frame: &[u8]) {
    let NetDriver { queues, ram, .. } = driver;
    while queues[1].pop_used(ram).unwrap().is_some() {}
    if queues[1].in_flight() >= rooms.len() {
        return;
    }
    // Rooms are used again in order, and no more are in flight than there are.
    let room = rooms[number % rooms.len()];
    ram.write(room, &[&PLAIN, frame].concat()).unwrap();
    let chain = [cleave_tests::driver::Buffer::to_read(room, (HEADER_LEN + frame.len()) as u32)];
    queues[1].add(ram, &chain).unwrap().unwrap();
    queues[1].kick(ram).unwrap();
}

fn survive(inflight: bool) {
    let Bridge { mut daemon, sockets } = bridge(2, &[]);
    let connect = |port: usize| {
        let mut driver = NetDriver::connect(&sockets[port]).unwrap();
        let region = inflight.then(|| driver.track_inflight().unwrap());
        // Small buffers: most frames take several, and are cut off if those are not used at once.
        driver.offer_many(0, 200, 256).unwrap();
        let rooms: Vec<u64> = (0..64).map(|_| driver.ram.allocate(2048, 64)).collect();
        (driver, region, rooms)
    };
    let mut ends = [connect(0), connect(1)];
    let (mut number, mut lasts, mut received) = (0, [None; 2], 0);
    let mut exchange = |ends: &mut [_; 2]| {
        let [(a, _, a_rooms), (b, _, b_rooms)]: &mut [(NetDriver, _, Vec<u64>); 2] = ends;
        for _ in 0..20 {
            post(a, a_rooms, number, &numbered(0, 1, number as u64));
            post(b, b_rooms, number, &numbered(1, 0, number as u64));
            number += 1;
        }
        take_all(a, 1, 0, &mut lasts[0]) + take_all(b, 0, 1, &mut lasts[1])
    };
    for kill in 0..KILLS {
        let wanted = received + u64::from(kill * 7 % 40);
        while received < wanted {
            received += exchange(&mut ends);
        }
        // With frames on their way.
        exchange(&mut ends);
        daemon.kill_and_restart().unwrap();
        for (port, (driver, region, _)) in ends.iter_mut().enumerate() {
            driver.resume(&sockets[port], region.as_ref()).unwrap();
        }
    }
    let wanted = received + 200;
    while received < wanted {
        received += exchange(&mut ends);
    }
}

#[test]
fn twenty_kills_damage_no_frame_and_use_no_buffer_twice() {
    survive(true);
}

/// Buffers are used in order, in both directions: the used index says where a successor goes on.
#[test]
fn nor_do_they_where_nobody_remembers_what_was_in_flight() {
    survive(false);
}
