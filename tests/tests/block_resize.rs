//! A disk whose size changes while a guest uses it.

mod common;

use std::time::{Duration, Instant};

use cleave_tests::driver::{BlockDriver, Daemon, IoStatus, PATIENCE, RequestKind};
use common::{MIB, disk, pattern, start};
use rustix::process::Signal;

/// Tells the daemon to look again and waits until config space says `len` bytes.
fn reload(daemon: &Daemon, driver: &mut BlockDriver, len: u64) {
    daemon.signal(Signal::HUP).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while driver.config().unwrap().sectors != len / 512 {
        assert!(Instant::now() < deadline, "the capacity never became {len} bytes: {}", daemon.log());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_disk_grows_and_shrinks_under_a_running_guest() {
    let image = disk(2 * MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let last = |len: u64| len / 512 - 8;
    for len in [4 * MIB, MIB, 16 * MIB] {
        image.as_file().set_len(len).unwrap();
        reload(&daemon, &mut driver, len);
        assert_eq!(driver.write(last(len), &pattern(len, 4096)).unwrap(), IoStatus::Ok);
        assert_eq!(driver.read(last(len), 4096).unwrap(), (IoStatus::Ok, pattern(len, 4096)));
        for sector in [last(len) + 1, last(len) + 8, 1 << 40] {
            assert_eq!(driver.read(sector, 4096).unwrap().0, IoStatus::IoErr);
            assert_eq!(driver.write(sector, &pattern(1, 4096)).unwrap(), IoStatus::IoErr);
            let zeroes = driver.deallocate(RequestKind::WriteZeroes, &[(sector, 8, 0)]);
            assert_eq!(zeroes.unwrap(), IoStatus::IoErr);
        }
        assert_eq!(driver.read(0, 4096).unwrap(), (IoStatus::Ok, pattern(0, 4096)));
        assert_eq!(image.as_file().metadata().unwrap().len(), len);
    }
}

#[test]
fn a_size_that_no_disk_has_changes_nothing() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    for len in [0, 1000] {
        image.as_file().set_len(len).unwrap();
        daemon.signal(Signal::HUP).unwrap();
        daemon.wait_for_log(if len == 0 { "is empty" } else { "which is not a multiple of 512" }).unwrap();
        assert_eq!(driver.config().unwrap().sectors, MIB / 512);
        // It is cut off all the same.
        assert_eq!(driver.read(64, 4096).unwrap().0, IoStatus::IoErr);
        daemon
            .wait_for_log(&format!("disk {} failed a read at sector 64: ", image.path().display()))
            .unwrap();
    }
    image.as_file().set_len(2 * MIB).unwrap();
    reload(&daemon, &mut driver, 2 * MIB);
    assert_eq!(driver.read(64, 4096).unwrap(), (IoStatus::Ok, vec![0; 4096]));
}
