//! The control socket: media and units change while a driver has them.

use std::io::Write;

use cleave_tests::driver::{Command, ScsiDriver, lun};

use super::common::{MIB, disk, disk_in, pattern};
use super::{
    BLOCK, CD_BLOCK, CDROM, DISK, TEST_UNIT_READY, driver, is_there, path, sense_of, start, start_both,
};

const START_STOP: u8 = 0x1b;
const EJECT: [u8; 6] = [START_STOP, 0, 0, 0, 2, 0];
const PREVENT: [u8; 6] = [0x1e, 0, 0, 0, 1, 0];
const ALLOW: [u8; 6] = [0x1e, 0, 0, 0, 0, 0];

const TRANSPORT_RESET: u32 = 1;
const PARAM_CHANGE: u32 = 3;

/// As Linux reads a LUN of target 0 in an event: in peripheral device addressing.
fn reported(number: u8) -> [u8; 8] {
    [1, 0, 0, number, 0, 0, 0, 0]
}

fn settle(driver: &mut ScsiDriver, lun: [u8; 8]) {
    assert!(driver.run(&Command::new(lun, &TEST_UNIT_READY)).unwrap().is_good());
}

#[test]
fn a_medium_is_changed_and_ejected_and_the_guest_knows() {
    let (image, iso) = (disk(MIB), disk(MIB));
    let other = disk(2 * MIB);
    other.as_file().write_all(&pattern(3, 2 * MIB as usize)).unwrap();
    let scsi = start_both(&image, &iso, &[]);
    let mut driver = driver(&scsi, 1);
    (0..4).for_each(|_| driver.offer_event().unwrap());
    settle(&mut driver, CDROM);
    assert!(driver.read(CDROM, 0, 1, CD_BLOCK).unwrap().is_good());

    scsi.ctl(&["change", "unit=2", &format!("path={}", path(&other))]).unwrap();
    assert_eq!(driver.event().unwrap(), (PARAM_CHANGE, reported(2), 0x28));
    assert_eq!(sense_of(&mut driver, CDROM, &TEST_UNIT_READY), Some((6, 0x28, 0)));
    let mut content = pattern(0, 2 * MIB as usize);
    content.splice(.., std::fs::read(other.path()).unwrap());
    assert_eq!(driver.read(CDROM, 700, 4, CD_BLOCK).unwrap().data, content[700 * 2048..704 * 2048]);
    let whole = std::fs::canonicalize(other.path()).unwrap();
    assert_eq!(scsi.unit("0:2")["path"], whole.to_str().unwrap());

    scsi.ctl(&["eject", "unit=2"]).unwrap();
    assert_eq!(driver.event().unwrap(), (PARAM_CHANGE, reported(2), 0x28));
    assert_eq!(sense_of(&mut driver, CDROM, &TEST_UNIT_READY), Some((2, 0x3a, 2)));
    assert_eq!(
        (&scsi.unit("0:2")["path"], &scsi.unit("0:2")["tray-open"]),
        (&serde_json::Value::Null, &true.into())
    );
    // It is not locked any more: the daemon has let go of it.
    is_let_go(&other);

    scsi.ctl(&["change", "unit=0:2", &format!("path={}", path(&iso))]).unwrap();
    driver.event().unwrap();
    settle(&mut driver, CDROM);
    let refused = scsi.ctl(&["change", "unit=1", &format!("path={}", path(&iso))]).unwrap_err();
    assert!(refused.contains("unit 0:1 is a disk"), "{refused}");
    let refused = scsi.ctl(&["eject", "unit=9"]).unwrap_err();
    assert!(refused.contains("there is no unit 0:9"), "{refused}");
    let refused = scsi.ctl(&["change", "unit=2", "path=/nowhere"]).unwrap_err();
    assert!(refused.contains("/nowhere"), "{refused}");
}

/// Somebody else can have the file, to write it: nobody has it locked any more.
fn is_let_go(file: &tempfile::NamedTempFile) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let scsi =
            cleave_tests::driver::Daemon::start("cleave-scsi", &["--lun", &format!("disk={}", path(file))]);
        match scsi {
            Ok(_) => return,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
    }
}

#[test]
fn a_guest_that_holds_the_tray_is_asked_and_obeyed() {
    let (image, iso) = (disk(MIB), disk(MIB));
    let scsi = start_both(&image, &iso, &[]);
    let mut driver = driver(&scsi, 1);
    settle(&mut driver, CDROM);
    assert!(driver.run(&Command::new(CDROM, &PREVENT)).unwrap().is_good());
    assert_eq!(scsi.unit("0:2")["locked"], true);
    let refused = scsi.ctl(&["eject", "unit=2"]).unwrap_err();
    assert!(refused.contains("the guest has locked the tray"), "{refused}");
    assert_eq!(sense_of(&mut driver, CDROM, &EJECT), Some((5, 0x53, 2)));
    assert!(driver.read(CDROM, 0, 1, CD_BLOCK).unwrap().is_good());
    // GET EVENT STATUS NOTIFICATION: the operator wants it out.
    let gesn = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];
    let event = driver.run(&Command { data_in: 8, ..Command::new(CDROM, &gesn) }).unwrap();
    assert_eq!(event.data[4] & 0xf, 1, "{event:?}");

    assert!(driver.run(&Command::new(CDROM, &ALLOW)).unwrap().is_good());
    assert!(driver.run(&Command::new(CDROM, &EJECT)).unwrap().is_good());
    assert_eq!(scsi.unit("0:2")["tray-open"], true);
    assert_eq!(scsi.unit("0:2")["path"], serde_json::Value::Null);

    // By force, out and in.
    scsi.ctl(&["change", "unit=2", &format!("path={}", path(&iso))]).unwrap();
    settle(&mut driver, CDROM);
    assert!(driver.run(&Command::new(CDROM, &PREVENT)).unwrap().is_good());
    scsi.ctl(&["eject", "unit=2", "force=true"]).unwrap();
    assert_eq!(sense_of(&mut driver, CDROM, &TEST_UNIT_READY), Some((2, 0x3a, 2)));
}

#[test]
fn units_come_and_go() {
    let (image, iso, more) = (disk(MIB), disk(MIB), disk(2 * MIB));
    let scsi = start_both(&image, &iso, &["--num-queues", "2"]);
    let mut driver = driver(&scsi, 2);
    (0..4).for_each(|_| driver.offer_event().unwrap());
    settle(&mut driver, DISK);
    let said = scsi.ctl(&["add-disk", &format!("disk={}", path(&more)), "lun=7", "serial=123"]).unwrap();
    assert!(said.contains("0:7"), "{said}");
    assert_eq!(driver.event().unwrap(), (TRANSPORT_RESET, reported(7), 1));
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), Some((6, 0x3f, 0x0e)));
    assert!(is_there(&mut driver, 7));
    let data = pattern(4, 8 * 512);
    assert!(driver.write(lun(0, 7), 4000, &data, BLOCK).unwrap().is_good());
    assert_eq!(driver.read(lun(0, 7), 4000, 8, BLOCK).unwrap().data, data);
    let serial = [0x12, 1, 0x80, 0, 64, 0];
    let page = driver.run(&Command { data_in: 64, ..Command::new(lun(0, 7), &serial) }).unwrap();
    assert_eq!(page.data[4..7], *b"123");
    let refused = scsi.ctl(&["add-disk", &format!("disk={}", path(&more)), "lun=7"]).unwrap_err();
    assert!(refused.contains("is in use") || refused.contains("two units"), "{refused}");

    scsi.ctl(&["remove", "unit=7"]).unwrap();
    assert_eq!(driver.event().unwrap(), (TRANSPORT_RESET, reported(7), 2));
    assert!(!is_there(&mut driver, 7));
    is_let_go(&more);
    scsi.ctl(&["add-cdrom", "lun=8"]).unwrap();
    assert_eq!(sense_of(&mut driver, lun(0, 8), &[0x12, 0, 0, 0, 36, 0]), None);
    let refused = scsi.ctl(&["add-disk", &format!("disk={}", path(&more)), "format=qcow2"]).unwrap_err();
    assert!(refused.contains("unless it is raw"), "{refused}");
}

#[test]
fn a_disk_that_grows_is_larger() {
    let place = tempfile::tempdir().unwrap();
    let image = disk_in(place.path(), MIB);
    let scsi = start(&["--lun", &format!("disk={},lun=1", image.path().display())]);
    let mut driver = driver(&scsi, 1);
    (0..4).for_each(|_| driver.offer_event().unwrap());
    settle(&mut driver, DISK);
    let capacity = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    image.as_file().set_len(3 * MIB).unwrap();
    scsi.ctl(&["resize", "unit=1"]).unwrap();
    assert_eq!(driver.event().unwrap(), (PARAM_CHANGE, reported(1), 0x092a));
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), Some((6, 0x2a, 9)));
    let answer = driver.run(&Command { data_in: 8, ..Command::new(DISK, &capacity) }).unwrap();
    assert_eq!(answer.data[..4], (3 * 2048u32 - 1).to_be_bytes());
    image.as_file().set_len(4 * MIB).unwrap();
    scsi.daemon.signal(rustix::process::Signal::HUP).unwrap();
    assert_eq!(driver.event().unwrap(), (PARAM_CHANGE, reported(1), 0x092a));
}
