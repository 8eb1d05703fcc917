//! cleave-scsi dies, and a successor goes on where it was: requests, reservations, media, units.

use std::thread;
use std::time::Duration;

use cleave_tests::driver::{Command, lun};

use super::common::{MIB, disk, pattern};
use super::{BLOCK, CD_BLOCK, CDROM, DISK, TEST_UNIT_READY, driver, is_there, path, sense_of, start_both};

const PERSISTENT_RESERVE_OUT: u8 = 0x5f;
const READ_KEYS: [u8; 10] = [0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0];

#[test]
fn killed_at_any_moment_nothing_is_lost_and_the_guest_notices_nothing() {
    let (image, iso) = (disk(8 * MIB), disk(MIB));
    let mut scsi = start_both(&image, &iso, &["--num-queues", "2"]);
    let mut driver = driver(&scsi, 2);
    let region = driver.track_inflight().unwrap();
    assert!(driver.run(&Command::new(DISK, &TEST_UNIT_READY)).unwrap().is_good());
    for round in 0..20u64 {
        let data = pattern(round, 4096);
        for n in 0..16u8 {
            let cdb = [0x2a, 0, 0, 0, 1, n * 8, 0, 0, 8, 0];
            // All of one queue's: its data areas are their own.
            driver
                .submit(0, &Command { tag: n.into(), data_out: &data, ..Command::new(DISK, &cdb) })
                .unwrap();
        }
        thread::sleep(Duration::from_micros(round * 60));
        scsi.daemon.kill_and_restart().unwrap();
        driver.resume(&scsi.daemon.socket, Some(&region)).unwrap();
        for _ in 0..16 {
            let (_, answer) = driver.answer(0).unwrap();
            assert!(answer.is_good(), "round {round}: {answer:?}");
        }
        let read = driver.read(DISK, 256, 128, BLOCK).unwrap();
        assert!(read.data.chunks(4096).all(|chunk| chunk == data), "round {round}");
    }
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), None);
    driver.frontend.stop_queue(2).unwrap();
    assert_eq!(region.marked(2).unwrap(), [0u16; 0]);
}

#[test]
fn a_successor_knows_reservations_media_and_units() {
    let (image, iso, other, more) = (disk(MIB), disk(MIB), disk(2 * MIB), disk(MIB));
    let mut scsi = start_both(&image, &iso, &[]);
    let mut driver = driver(&scsi, 1);
    let region = driver.track_inflight().unwrap();
    for unit in [DISK, CDROM] {
        assert!(driver.run(&Command::new(unit, &TEST_UNIT_READY)).unwrap().is_good());
    }
    // REGISTER a key; RESERVE, write exclusive.
    let mut list = [0; 24];
    list[8..16].copy_from_slice(&0x1122_3344_5566_7788u64.to_be_bytes());
    let register = [PERSISTENT_RESERVE_OUT, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert!(driver.run(&Command { data_out: &list, ..Command::new(DISK, &register) }).unwrap().is_good());
    scsi.ctl(&["change", "unit=2", &format!("path={}", path(&other))]).unwrap();
    scsi.ctl(&["add-disk", &format!("disk={}", path(&more)), "lun=7"]).unwrap();
    scsi.ctl(&["add-cdrom", "lun=8"]).unwrap();
    scsi.ctl(&["remove", "unit=8"]).unwrap();
    assert!(driver.run(&Command::new(CDROM, &[0x1e, 0, 0, 0, 1, 0])).unwrap().is_good());

    scsi.daemon.kill_and_restart().unwrap();
    assert_eq!(scsi.unit("0:1")["path"], path(&image));
    let early = scsi.ctl(&["eject", "unit=2"]).unwrap_err();
    assert!(early.contains("whose driver has not come back"), "{early}");
    driver.resume(&scsi.daemon.socket, Some(&region)).unwrap();
    let keys = driver.run(&Command { data_in: 64, ..Command::new(DISK, &READ_KEYS) }).unwrap();
    assert_eq!(keys.data[8..16], list[8..16]);
    assert_eq!(
        driver.read(CDROM, 800, 1, CD_BLOCK).unwrap().data,
        pattern(0, 2 * MIB as usize)[800 * 2048..][..2048]
    );
    assert!(is_there(&mut driver, 7) && !is_there(&mut driver, 8));
    assert!(driver.read(lun(0, 7), 0, 1, BLOCK).unwrap().is_good());
    assert_eq!(scsi.unit("0:2")["locked"], true, "the guest's lock stays");

    // A driver that starts anew finds what the command line says.
    drop(driver);
    scsi.daemon.kill_and_restart().unwrap();
    let mut driver = super::driver(&scsi, 1);
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), Some((6, 0x29, 0)));
    assert!(!is_there(&mut driver, 7));
    assert_eq!(scsi.unit("0:2")["path"], path(&iso));
    let region = driver.track_inflight().unwrap();
    scsi.daemon.kill_and_restart().unwrap();
    driver.resume(&scsi.daemon.socket, Some(&region)).unwrap();
    assert!(!is_there(&mut driver, 7), "nor do its successors find what an earlier driver had");
    let keys = driver.run(&Command { data_in: 64, ..Command::new(DISK, &READ_KEYS) }).unwrap();
    assert_eq!(keys.data[4..8], [0; 4], "it was not to survive a loss of power");
}

#[test]
fn a_registration_that_is_to_survive_a_loss_of_power_does() {
    let (image, iso) = (disk(MIB), disk(MIB));
    let mut scsi = start_both(&image, &iso, &[]);
    let mut driver = driver(&scsi, 1);
    assert!(driver.run(&Command::new(DISK, &TEST_UNIT_READY)).unwrap().is_good());
    let mut list = [0; 24];
    list[15] = 9;
    list[20] = 1; // APTPL
    let register = [PERSISTENT_RESERVE_OUT, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    assert!(driver.run(&Command { data_out: &list, ..Command::new(DISK, &register) }).unwrap().is_good());
    drop(driver);
    scsi.daemon.kill_and_restart().unwrap();
    let mut driver = super::driver(&scsi, 1);
    let keys = driver.run(&Command { data_in: 64, ..Command::new(DISK, &READ_KEYS) }).unwrap();
    assert_eq!(keys.data[4..16], [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 9]);
}
