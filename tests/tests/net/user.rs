//! cleave-net --user between a driver and passt: one that the test plays, which cuts, floods, lies and dies.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use cleave_tests::passt::{FakePasst, Played, in_stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use super::*;

const MAX_FRAME: usize = 65535;

struct User {
    daemon: Daemon,
    fake: FakePasst,
}

/// cleave-net --user with a passt of this test's, the one that was started first.
fn start(args: &[&str]) -> (User, Played) {
    let fake = FakePasst::new();
    let program = fake.program();
    let words = ["--user", "--passt", program.to_str().unwrap(), "--mac", "52:54:00:00:00:01"];
    let words: Vec<&str> = words.into_iter().chain(args.iter().copied()).collect();
    let daemon = Daemon::start("cleave-net", &words).unwrap();
    let played = fake.next();
    (User { daemon, fake }, played)
}

fn start_with_driver() -> (User, Played, NetDriver) {
    let (user, played) = start(&[]);
    let mut driver = NetDriver::connect(&user.daemon.socket).unwrap();
    driver.offer_many(0, 128, 2048).unwrap();
    (user, played, driver)
}

fn both_ways(played: &mut Played, driver: &mut NetDriver) {
    let to_guest = frame(OURS, WORLDS, 7, 100);
    played.write_frame(&to_guest).unwrap();
    assert_eq!(driver.receive(0).unwrap().bytes, to_guest);
    let to_world = frame(WORLDS, OURS, 8, 100);
    driver.send(0, &PLAIN, &to_world).unwrap();
    assert_eq!(played.read_frame().unwrap(), to_world);
}

fn link_is_up(driver: &mut NetDriver) -> bool {
    driver.frontend.config(6, 2).unwrap()[0] & 1 == 1
}

/// Whether something is there to read, now or within a moment.
fn is_readable(stream: &UnixStream) -> bool {
    let moment = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&moment)).unwrap() > 0
}

/// What the daemon answers to SIGUSR1, once that says `words`.
fn reports(user: &User, words: &str) {
    let deadline = std::time::Instant::now() + SOON;
    loop {
        user.daemon.signal(Signal::USR1).unwrap();
        thread::sleep(Duration::from_millis(5));
        let log = user.daemon.log();
        let last = log.lines().rev().find(|line| line.contains("the link is")).unwrap_or_default();
        if last.contains(words) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{words:?} is never reported: {last}");
    }
}

#[test]
fn frames_pass_both_ways_and_what_is_offered_is_what_a_stream_can_carry() {
    let (user, mut played) =
        start(&["--hostfwd", "tcp:2222:22", "--hostfwd", "udp:[::1]:5:6", "--mtu", "9000"]);
    let said = &played.arguments;
    assert!(
        said.contains("--mtu 9000 --tcp-ports 127.0.0.1/2222:22 --udp-ports ::1/5:6 --no-map-gw"),
        "{said}"
    );
    assert_eq!(played.first[6..14], [&OURS[..], &EXPERIMENT].concat());
    let mut driver = NetDriver::connect(&user.daemon.socket).unwrap();
    let offered = driver.negotiated.acked;
    assert_eq!(
        offered & (1 | feature::GUEST_GSO | 0x7800),
        0,
        "no checksums and no segments of the guest's: {offered:#x}"
    );
    assert_eq!(driver.frontend.config(0, 12).unwrap()[..6], OURS);
    assert_eq!(driver.frontend.config(10, 2).unwrap(), 9000u16.to_le_bytes());
    driver.offer_many(0, 16, 2048).unwrap();
    both_ways(&mut played, &mut driver);
    let bytes = frame(OURS, WORLDS, 1, 60);
    played.write_frame(&bytes).unwrap();
    assert_eq!(
        driver.receive(0).unwrap().header,
        [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        "DATA_VALID, one buffer"
    );
    // A driver that knows nothing of checksums is told nothing.
    driver.reconnect(&user.daemon.socket, !feature::GUEST_CSUM).unwrap();
    driver.offer_many(0, 4, 2048).unwrap();
    played.write_frame(&bytes).unwrap();
    assert_eq!(driver.receive(0).unwrap().header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    // What was not offered is not taken: nobody would complete it.
    for (flags, gso) in [(1, 0), (0, 1), (0, 0x80)] {
        let mut header = PLAIN;
        (header[0], header[1]) = (flags, gso);
        driver.send(0, &header, &frame(WORLDS, OURS, 2, 90)).unwrap();
    }
    both_ways(&mut played, &mut driver);
    reports(&user, "(dropped: 0 malformed, 3 failed)");
}

#[test]
fn frames_to_the_guest_are_whole_however_they_come() {
    let (_user, mut played, mut driver) = start_with_driver();
    let frames: Vec<Vec<u8>> =
        (0..60).map(|n| frame(OURS, WORLDS, n, 60 + n as usize * 1109 % (MAX_FRAME - 59))).collect();
    let stream: Vec<u8> = frames.iter().flat_map(|frame| in_stream(frame)).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut left, mut len) = (&stream[..], 1);
            while !left.is_empty() {
                let (piece, rest) = left.split_at(len.min(left.len()));
                played.stream.write_all(piece).unwrap();
                (left, len) = (rest, len * 7 % 30011 + 1);
            }
        });
        for frame in &frames {
            assert!(
                driver.receive(0).unwrap().bytes == *frame,
                "a frame of {} bytes is damaged",
                frame.len()
            );
        }
    });
    both_ways(&mut played, &mut driver);
}

#[test]
fn frames_from_the_guest_are_whole_however_slowly_they_are_read() {
    let (_user, mut played, mut driver) = start_with_driver();
    let frames: Vec<Vec<u8>> =
        (0..80).map(|n| frame(WORLDS, OURS, n, MAX_FRAME - n as usize * 811)).collect();
    let expected: Vec<u8> = frames.iter().flat_map(|frame| in_stream(frame)).collect();
    let got = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut got, mut len) = (Vec::<u8>::new(), 1);
            while got.len() < expected.len() {
                let mut bytes = vec![0; len];
                let count = played.stream.read(&mut bytes).unwrap();
                got.extend(&bytes[..count]);
                // In steps that leave the socket full, and the writer in the middle of a frame.
                thread::sleep(Duration::from_micros(100));
                len = len * 13 % 50021 + 1;
            }
            got
        });
        frames.iter().for_each(|frame| driver.send(0, &PLAIN, frame).unwrap());
        reader.join().unwrap()
    });
    assert!(got == expected, "the stream is damaged");
    both_ways(&mut played, &mut driver);
}

#[test]
fn a_frame_that_is_half_gone_when_the_guest_has_no_more_to_send_is_finished() {
    let (_user, mut played, mut driver) = start_with_driver();
    let large = frame(WORLDS, OURS, 5, MAX_FRAME);
    // One of these counts leaves the last frame cut: the socket has room for three and a bit.
    for count in 1..8 {
        thread::scope(|scope| {
            let sender = scope.spawn(|| (0..count).try_for_each(|_| driver.send(0, &PLAIN, &large)));
            thread::sleep(Duration::from_millis(20));
            for n in 0..count {
                assert!(played.read_frame().unwrap() == large, "frame {n} of {count}");
            }
            sender.join().unwrap().unwrap();
        });
    }
    both_ways(&mut played, &mut driver);
}

#[test]
fn one_that_talks_nonsense_is_ended_and_its_successor_is_heard() {
    let (user, mut played, mut driver) = start_with_driver();
    // Too short to be frames: dropped, and counted.
    for len in [0, 1, 13] {
        played.write_frame(&vec![0x55; len]).unwrap();
    }
    both_ways(&mut played, &mut driver);
    reports(&user, "3 failed), 1 sent");
    // Too long to be one.
    played.stream.write_all(&[0, 1, 0, 0]).unwrap();
    assert_eq!(played.stream.read(&mut [0; 8]).unwrap(), 0, "it is hung up on");
    user.daemon.wait_for_log("announced a frame of 65536 bytes").unwrap();
    // It goes on all the same: nobody but the keeper ends it.
    played.end(7).unwrap();
    let mut next = user.fake.next();
    user.daemon.wait_for_log("ended with exit code 7; it is started again").unwrap();
    reports(&user, "the link is up; passt is process");
    both_ways(&mut next, &mut driver);
}

#[test]
fn what_is_cut_by_its_death_is_lost_and_nothing_after_it() {
    let (user, mut played, mut driver) = start_with_driver();
    for death in 0..5 {
        // Half a frame to the guest.
        played.stream.write_all(&in_stream(&frame(OURS, WORLDS, 1, 2000))[..1000]).unwrap();
        // Half a frame, or some, from the guest: more than the socket holds. The last one waits for room.
        let large = frame(WORLDS, OURS, death, MAX_FRAME);
        thread::scope(|scope| {
            let sender = scope.spawn(|| (0..40).try_for_each(|_| driver.send(0, &PLAIN, &large)));
            assert!(played.read_frame().unwrap() == large);
            thread::sleep(Duration::from_millis(20));
            played.stream.shutdown(Shutdown::Both).unwrap();
            played.end(0).unwrap();
            // A new one starts with a frame's beginning, whichever that is.
            played = user.fake.next();
            // It may come before all are sent, and then it has to take the others.
            while !sender.is_finished() {
                if is_readable(&played.stream) {
                    assert!(played.read_frame().unwrap() == large);
                }
            }
            sender.join().unwrap().unwrap();
        });
        reports(&user, &format!("started again {} times", death + 1));
        let to_world = frame(WORLDS, OURS, 99, 77);
        driver.send(0, &PLAIN, &to_world).unwrap();
        loop {
            match played.read_frame().unwrap() {
                frame if frame == large => {}
                frame => break assert_eq!(frame, to_world),
            }
        }
        both_ways(&mut played, &mut driver);
    }
    reports(&user, "started again 5 times");
}

#[test]
fn while_there_is_none_the_link_is_down_and_nothing_waits() {
    let (user, mut played, mut driver) = start_with_driver();
    both_ways(&mut played, &mut driver);
    assert!(link_is_up(&mut driver));
    user.fake.be_silent(true);
    played.end(1).unwrap();
    let mut silent = user.fake.next();
    reports(&user, "the link is down; no passt serves: passt (process");
    assert!(!link_is_up(&mut driver));
    for n in 0..600 {
        driver.send(0, &PLAIN, &frame(WORLDS, OURS, n, 1000)).unwrap();
    }
    reports(&user, "600 failed)");
    user.fake.be_silent(false);
    silent.end(9).unwrap();
    let mut next = user.fake.next();
    reports(&user, "the link is up");
    both_ways(&mut next, &mut driver);
    assert!(link_is_up(&mut driver));
    assert_eq!(user.daemon.log().matches("connections through the one before are lost").count(), 1);
}

#[test]
fn the_daemons_end_is_passts_and_the_keepers_is_the_daemons() {
    let (mut user, mut played, mut driver) = start_with_driver();
    both_ways(&mut played, &mut driver);
    user.daemon.kill_and_restart().unwrap();
    assert_eq!(played.stream.read(&mut [0; 8]).unwrap(), 0, "nobody has the other end");
    let mut next = user.fake.next();
    driver.resume(&user.daemon.socket, None).unwrap();
    both_ways(&mut next, &mut driver);
    // Of the fork, which is this one's only child.
    let tasks = format!("/proc/{0}/task/{0}/children", user.daemon.pid());
    let children = std::fs::read_to_string(tasks).unwrap();
    let keeper: i32 = children.trim().parse().unwrap();
    let name = std::fs::read_to_string(format!("/proc/{keeper}/comm")).unwrap();
    assert_eq!(name, "passt-keeper\n");
    kill_process(Pid::from_raw(keeper).unwrap(), Signal::KILL).unwrap();
    both_ways(&mut next, &mut driver);
    assert!(user.daemon.is_running(), "it has a passt, and needs no other one");
    drop(next);
    assert_eq!(user.daemon.wait().unwrap().code(), Some(3));
    user.daemon.wait_for_log("the process that starts passt has ended").unwrap();
}

#[test]
fn the_end_in_order_leaves_nothing_behind() {
    let (mut user, mut played) = start(&[]);
    user.daemon.signal(Signal::TERM).unwrap();
    assert_eq!(user.daemon.wait().unwrap().code(), Some(0));
    assert_eq!(played.stream.read(&mut [0; 8]).unwrap(), 0);
    assert!(user.fake.next_within(A_WHILE).is_none(), "no other one is started");
    let refused = |args: &[&str], words: &str| {
        let args = [&["--user", "--passt", "/nowhere/passt"], args].concat();
        let Err(error) = Daemon::start("cleave-net", &args) else { panic!("{args:?} is taken") };
        let said = error.to_string();
        assert!(said.contains(words), "{args:?}: {said}");
    };
    refused(&[], "/nowhere/passt is not there: install the package passt");
    refused(&["--passt", "/bin/true"], "");
    refused(&["--hostfwd", "tcp:1"], "'tcp:1' is no forwarded port: there have to be two ports");
    refused(&["--queues", "2"], "cannot be used with");
    refused(&["--bridge", "br0"], "cannot be used with");
    refused(&["--mtu", "65521"], "with --user it is at most 65520");
}
