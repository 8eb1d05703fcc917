//! cleave-net is killed (SIGKILL) under traffic, and a successor goes on: the tap device is the same, no buffer is used
//! twice, no frame comes damaged.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

const KILLS: u32 = 30;

/// Frames of this test carry their number, and follow from it.
fn numbered(to: [u8; 6], from: [u8; 6], number: u64) -> Vec<u8> {
    let mut frame = frame(to, from, number, 60 + (number * 37 % 1400) as usize);
    frame[14..22].copy_from_slice(&number.to_le_bytes());
    frame
}

fn number_of(frame: &[u8]) -> u64 {
    u64::from_le_bytes(frame[14..22].try_into().unwrap())
}

/// Takes what has come, or some of it, and demands that each frame is whole and comes after the last one. Gives how many there were.
fn take_all(driver: &mut NetDriver, last: &mut Option<u64>) -> u64 {
    let mut count = 0;
    while count < 50
        && let Some(frame) = driver.receive_within(0, Duration::from_millis(5)).unwrap()
    {
        let number = number_of(&frame.bytes);
        assert_eq!(frame.bytes, numbered(OURS, WORLDS, number), "frame {number} is damaged");
        assert!(last.is_none_or(|last| number > last), "{number} comes after {last:?}");
        *last = Some(number);
        count += 1;
    }
    count
}

fn survive(inflight: bool) {
    // Small buffers: most frames take several, and are cut off if those are not used at once.
    let Some(net) = start(&[]) else { return };
    let Net { mut daemon, wire } = net;
    let mut driver = NetDriver::connect(&daemon.socket).unwrap();
    let region = inflight.then(|| driver.track_inflight().unwrap());
    driver.offer_many(0, 200, 256).unwrap();
    let index = network::ip("-o link show tap0");
    let over = AtomicBool::new(false);
    let (mut last, mut received, mut seen) = (None, 0, 0);
    thread::scope(|scope| {
        let _end = Ends(&over);
        scope.spawn(|| {
            for number in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                // While nobody has the tap device open there is no link.
                let _ = wire.send(&WIRE_PLAIN, &numbered(OURS, WORLDS, number));
                if number % 16 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        for kill in 0..KILLS {
            let before = received;
            while received < before + u64::from(kill * 7 % 40) {
                received += take_all(&mut driver, &mut last);
            }
            if kill % 2 == 0 {
                driver.send(0, &PLAIN, &numbered(WORLDS, OURS, kill.into())).unwrap();
                seen += 1;
            }
            daemon.kill_and_restart().unwrap();
            received += take_all(&mut driver, &mut last);
            driver.resume(&daemon.socket, region.as_ref()).unwrap();
        }
        let before = received;
        while received < before + 100 {
            received += take_all(&mut driver, &mut last);
        }
    });
    let mut sent = 0;
    while let Some((_, frame)) = wire.receive(A_WHILE) {
        assert_eq!(frame, numbered(WORLDS, OURS, number_of(&frame)));
        sent += 1;
    }
    assert_eq!(sent, seen, "each frame from the guest was sent once");
    take_all(&mut driver, &mut last);
    let name = |line: &str| line.split(':').next().map(str::to_owned);
    assert_eq!(name(&network::ip("-o link show tap0")), name(&index), "the tap device is the same");
    if let Some(region) = &region {
        // What is in flight is what the driver has offered and not got back; nothing else is.
        driver.frontend.stop_queue(0).unwrap();
        assert!(region.marked(0).unwrap().len() <= driver.queues[0].in_flight());
        assert!(region.marked(1).unwrap().is_empty());
    }
}

/// Says so even when a check fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn thirty_kills_damage_no_frame_and_use_no_buffer_twice() {
    survive(true);
}

/// Receive buffers are used in order, and so are the others: the used index says where a successor goes on.
#[test]
fn nor_do_they_where_nobody_remembers_what_was_in_flight() {
    survive(false);
}

#[test]
fn a_successor_lets_everything_through_and_asks_to_be_announced() {
    let Some((mut net, mut driver)) = start_with_driver(&[]) else { return };
    assert_eq!(driver.control(0, 0, &[0]).unwrap(), 0);
    net.wire.send(&WIRE_PLAIN, &frame(GROUP, WORLDS, 1, 90)).unwrap();
    works(&net, &mut driver);
    let status = |driver: &mut NetDriver| driver.frontend.config(6, 2).unwrap()[0];
    assert_eq!(status(&mut driver), 1);
    net.daemon.kill_and_restart().unwrap();
    let socket = net.daemon.socket.clone();
    driver.resume(&socket, None).unwrap();
    assert_eq!(status(&mut driver), 1 | 2, "link up, announce");
    assert_eq!(driver.control(3, 0, &[]).unwrap(), 0);
    assert_eq!(status(&mut driver), 1);
    // It does not know the driver's tables, so it does not filter by them.
    reaches_the_guest(&net, &mut driver, &frame(GROUP, WORLDS, 2, 90));
    assert_eq!(driver.control(0, 0, &[0]).unwrap(), 0);
    reaches_the_guest(&net, &mut driver, &frame(GROUP, WORLDS, 3, 90));
    assert_eq!(driver.control(1, 0, &[0; 8]).unwrap(), 0);
    net.wire.send(&WIRE_PLAIN, &frame(GROUP, WORLDS, 4, 90)).unwrap();
    works(&net, &mut driver);
    // Nobody who has not negotiated it is asked.
    driver.reconnect(&socket, !feature::GUEST_ANNOUNCE).unwrap();
    driver.control(0, 0, &[0]).unwrap();
    net.daemon.kill_and_restart().unwrap();
    driver.resume(&socket, None).unwrap();
    assert_eq!(status(&mut driver), 1);
}
