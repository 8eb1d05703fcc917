//! A host's disk that runs full under the guest's.

mod common;

use std::fs::File;
use std::thread;
use std::time::Duration;

use cleave_tests::driver::{BlockDriver, Buffer, Daemon, DriverError, IoStatus, RequestKind};
use common::{MIB, Tmpfs, pattern, tmpfs};
use rustix::process::Signal;

const PIECE: u64 = MIB;
const SECTORS: u64 = PIECE / 512;

/// A disk of 32 MiB that is all holes, where there is room for 4 MiB.
fn start_on_little_room(args: &[&str]) -> (Tmpfs, Daemon, BlockDriver) {
    let place = tmpfs(4 * MIB);
    let path = place.path().join("disk");
    File::create(&path).unwrap().set_len(32 * MIB).unwrap();
    let path = path.to_str().unwrap().to_owned();
    let args: Vec<&str> = ["--blk-file", &path].into_iter().chain(args.iter().copied()).collect();
    let daemon = Daemon::start("cleave-block", &args).unwrap();
    let driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    (place, daemon, driver)
}

#[test]
fn by_default_the_guest_is_told() {
    let (place, _daemon, mut driver) = start_on_little_room(&["--num-queues", "2"]);
    let outcomes: Vec<IoStatus> =
        (0..6).map(|n| driver.write(n * SECTORS, &pattern(n, PIECE as usize)).unwrap()).collect();
    assert_eq!(outcomes[..3], [IoStatus::Ok; 3]);
    assert_eq!(outcomes[5], IoStatus::IoErr);
    // What is there is there, and may be written again.
    assert_eq!(driver.read(SECTORS, PIECE as u32).unwrap(), (IoStatus::Ok, pattern(1, PIECE as usize)));
    assert_eq!(driver.write(0, &pattern(9, 4096)).unwrap(), IoStatus::Ok);
    let zeroes = driver.deallocate(RequestKind::WriteZeroes, &[(20 * SECTORS, 8 * SECTORS as u32, 0)]);
    assert_eq!(zeroes.unwrap(), IoStatus::IoErr);
    // Giving something back makes room.
    assert_eq!(driver.deallocate(RequestKind::Discard, &[(0, 2 * SECTORS as u32, 0)]).unwrap(), IoStatus::Ok);
    assert_eq!(driver.write(5 * SECTORS, &pattern(5, PIECE as usize)).unwrap(), IoStatus::Ok);
    drop(place);
}

/// Submits a write of `PIECE` for each of `pieces`, each from memory of its own, and kicks.
fn submit_writes(driver: &mut BlockDriver, pieces: std::ops::Range<u64>) -> Vec<u16> {
    let heads = pieces.map(|n| {
        let at = driver.ram.allocate(PIECE, 4096);
        driver.ram.write(at, &pattern(n, PIECE as usize)).unwrap();
        driver
            .submit(0, RequestKind::Out, n * SECTORS, &[Buffer::to_read(at, PIECE as u32)])
            .unwrap()
            .unwrap()
    });
    let heads = heads.collect();
    driver.kick(0).unwrap();
    heads
}

fn completions(driver: &mut BlockDriver, count: usize) -> Vec<(u16, IoStatus)> {
    (0..count)
        .map(|_| {
            let (head, _) = driver.completion(0).unwrap();
            (head, driver.status(0, head).unwrap())
        })
        .collect()
}

fn assert_nothing_completes(driver: &mut BlockDriver) {
    let BlockDriver { queues, ram, .. } = driver;
    let waited = queues[0].wait(ram, Duration::from_millis(200));
    assert!(matches!(waited, Err(DriverError::Timeout)), "{waited:?}");
}

#[test]
fn paused_writes_wait_for_room_and_nothing_is_lost() {
    for cache in ["writeback", "writethrough"] {
        let (place, daemon, mut driver) =
            start_on_little_room(&["--on-full", "pause", "--num-queues", "2", "--cache", cache]);
        let heads = submit_writes(&mut driver, 0..8);
        daemon.wait_for_log("the disk is full").unwrap();
        // How many fit is the file system's business; at least one does not.
        let mut done = Vec::new();
        while done.len() < 3 {
            done.extend(completions(&mut driver, 1));
        }
        thread::sleep(Duration::from_millis(100));
        while let Some((head, _)) = driver.queues[0].pop_used(&driver.ram).unwrap() {
            done.push((head, driver.status(0, head).unwrap()));
        }
        assert!((3..8).contains(&done.len()), "{done:?}");
        // Reads go on, on this queue and the other, and so do flushes and writes that need no room.
        let data = driver.data;
        for queue in [0, 1] {
            let read = driver.request_on(queue, RequestKind::In, 0, &[Buffer::to_write(data, 4096)]).unwrap();
            assert_eq!(read.0, IoStatus::Ok);
        }
        assert_eq!(driver.flush().unwrap(), IoStatus::Ok);
        assert_nothing_completes(&mut driver);

        place.resize(64 * MIB);
        done.extend(completions(&mut driver, 8 - done.len()));
        assert!(
            done.iter().all(|(head, status)| heads.contains(head) && *status == IoStatus::Ok),
            "{done:?}"
        );
        for n in 0..8 {
            let (status, bytes) = driver.read(n * SECTORS, PIECE as u32).unwrap();
            assert!(status == IoStatus::Ok && bytes == pattern(n, PIECE as usize), "piece {n}");
        }
        daemon.wait_for_log("the disk has room again").unwrap();
        assert_eq!(daemon.log().matches("the disk is full").count(), 1, "{}", daemon.log());
        assert_eq!(daemon.log().matches("has room again").count(), 1, "{}", daemon.log());
    }
}

#[test]
fn room_that_the_guest_itself_makes_is_found() {
    let (_place, daemon, mut driver) = start_on_little_room(&["--on-full", "pause", "--num-queues", "2"]);
    submit_writes(&mut driver, 0..2);
    assert!(completions(&mut driver, 2).iter().all(|(_, status)| *status == IoStatus::Ok));
    submit_writes(&mut driver, 2..5);
    daemon.wait_for_log("the disk is full").unwrap();
    let data = driver.data;
    let mut segment = Vec::new();
    segment.extend(0u64.to_le_bytes());
    segment.extend((2 * SECTORS).to_le_bytes());
    driver.ram.write(data, &segment).unwrap();
    let discard = driver.request_on(1, RequestKind::Discard, 0, &[Buffer::to_read(data, 16)]).unwrap();
    assert_eq!(discard.0, IoStatus::Ok);
    assert!(completions(&mut driver, 3).iter().all(|(_, status)| *status == IoStatus::Ok));
}

/// Without the inflight region of vhost-user nobody else could finish them.
#[test]
fn a_stop_does_not_wait_for_room() {
    let (_place, daemon, mut driver) = start_on_little_room(&["--on-full", "pause", "--num-queues", "2"]);
    submit_writes(&mut driver, 0..8);
    daemon.wait_for_log("the disk is full").unwrap();
    // All of them have been fetched: the guest asks to be told of everything.
    assert_eq!(driver.frontend.stop_queue(0).unwrap(), 8);
    let done = completions(&mut driver, 8);
    let failed = done.iter().filter(|(_, status)| *status == IoStatus::IoErr).count();
    assert!((1..=5).contains(&failed), "{done:?}");
    assert_eq!(
        daemon.log().matches("and they fail, for the frontend keeps no record").count(),
        1,
        "{}",
        daemon.log()
    );
    assert!(!daemon.log().contains("has room again"), "{}", daemon.log());
    // The disk serves again, with the same memory of what was lost: none.
    driver.reconnect(&daemon.socket).unwrap();
    assert_eq!(driver.read(0, 4096).unwrap(), (IoStatus::Ok, pattern(0, 4096)));
}

/// The frontend is gone, or will find that they are not done: an error would be an answer that nobody can take back.
#[test]
fn what_waits_for_room_when_the_session_ends_is_not_answered() {
    for hang_up in [true, false] {
        let (_place, mut daemon, mut driver) =
            start_on_little_room(&["--on-full", "pause", "--num-queues", "2"]);
        submit_writes(&mut driver, 0..8);
        daemon.wait_for_log("the disk is full").unwrap();
        if hang_up {
            driver.frontend.channel.socket().shutdown(std::net::Shutdown::Both).unwrap();
        } else {
            daemon.signal(Signal::TERM).unwrap();
            assert!(daemon.wait().unwrap().success());
        }
        daemon.wait_for_log("they are left undone").unwrap();
        let mut done = Vec::new();
        while let Some((head, _)) = driver.queues[0].pop_used(&driver.ram).unwrap() {
            done.push(driver.status(0, head).unwrap());
        }
        assert!(
            (3..8).contains(&done.len()) && done.iter().all(|status| *status == IoStatus::Ok),
            "{done:?}"
        );
        assert!(!daemon.log().contains("has room again"), "{}", daemon.log());
        assert!(!daemon.log().contains(" failed a write"), "{}", daemon.log());
        if hang_up {
            driver.reconnect(&daemon.socket).unwrap();
            assert_eq!(driver.read(0, 4096).unwrap(), (IoStatus::Ok, pattern(0, 4096)));
        }
    }
}
