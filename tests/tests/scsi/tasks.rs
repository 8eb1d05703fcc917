//! Task management acts on requests in flight.

use std::thread;
use std::time::Duration;

use cleave_tests::driver::{Command, ScsiDriver, lun};

use super::common::{MIB, disk};
use super::{
    ABORT_TASK, DISK, LOGICAL_UNIT_RESET, QUERY_TASK, Scsi, TEST_UNIT_READY, driver, sense_of, start,
};

const COMPLETE: u8 = 0;
const SUCCEEDED: u8 = 10;
const REJECTED: u8 = 11;
const INCORRECT_LUN: u8 = 12;
const ABORTED: u8 = 2;
const RESET: u8 = 4;

const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0];

/// A disk that lets one request a minute pass.
fn stalled() -> (tempfile::NamedTempFile, Scsi) {
    let image = disk(MIB);
    let spec = format!("disk={},lun=1,throttle.iops-total=1,throttle.iops-size=64", image.path().display());
    let scsi = start(&["--lun", &spec, "--num-queues", "2"]);
    (image, scsi)
}

fn read(tag: u64) -> Command<'static> {
    Command { tag, data_in: 4096, ..Command::new(DISK, &READ) }
}

/// Fills the rate limit's bucket: nothing passes for a minute.
fn stall(driver: &mut ScsiDriver) {
    assert!(driver.run(&read(1)).unwrap().is_good());
}

#[test]
fn a_request_that_waits_is_aborted_and_others_stay() {
    let (_image, scsi) = stalled();
    let mut driver = driver(&scsi, 2);
    stall(&mut driver);
    let first = driver.submit(0, &read(10)).unwrap();
    driver.submit(0, &read(11)).unwrap();
    let other = driver.submit(1, &read(12)).unwrap();
    assert_eq!(driver.function(QUERY_TASK, DISK, 10).unwrap(), SUCCEEDED);
    assert_eq!(driver.function(QUERY_TASK, DISK, 77).unwrap(), COMPLETE);
    assert_eq!(driver.function(ABORT_TASK, DISK, 77).unwrap(), COMPLETE);
    assert_eq!(driver.function(ABORT_TASK, DISK, 10).unwrap(), COMPLETE);
    let (head, answer) = driver.answer(0).unwrap();
    assert_eq!((head, answer.response), (first, ABORTED));
    assert_eq!(driver.function(QUERY_TASK, DISK, 10).unwrap(), COMPLETE);
    assert_eq!(driver.function(QUERY_TASK, DISK, 11).unwrap(), SUCCEEDED);
    thread::sleep(Duration::from_millis(50));
    assert!(!driver.has_answer(0).unwrap() && !driver.has_answer(1).unwrap());

    // The unit's reset ends what is left of it, on all queues.
    assert_eq!(driver.function(LOGICAL_UNIT_RESET, DISK, 0).unwrap(), COMPLETE);
    assert_eq!(driver.answer(0).unwrap().1.response, RESET);
    let (head, answer) = driver.answer(1).unwrap();
    assert_eq!((head, answer.response), (other, RESET));
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), Some((6, 0x29, 3)));
}

#[test]
fn functions_that_make_no_sense_are_answered() {
    let (_image, scsi) = stalled();
    let mut driver = driver(&scsi, 1);
    assert_eq!(driver.function(2, DISK, 0).unwrap(), REJECTED, "CLEAR ACA");
    assert_eq!(driver.function(99, DISK, 0).unwrap(), REJECTED);
    assert_eq!(driver.function(ABORT_TASK, lun(0, 9), 0).unwrap(), INCORRECT_LUN);
    assert_eq!(driver.function(ABORT_TASK, lun(7, 0), 0).unwrap(), 3, "BAD_TARGET");
    assert_eq!(driver.function(ABORT_TASK, [0; 8], 0).unwrap(), 3, "BAD_TARGET");
}

#[test]
fn an_ordered_task_waits_and_those_after_it_wait_for_it() {
    let (_image, scsi) = stalled();
    let mut driver = driver(&scsi, 2);
    stall(&mut driver);
    driver.submit(0, &read(10)).unwrap();
    // It has been looked at: another queue's thread might be quicker.
    assert_eq!(driver.function(QUERY_TASK, DISK, 10).unwrap(), SUCCEEDED);
    let ready = |tag, attribute| Command { tag, attribute, ..Command::new(DISK, &TEST_UNIT_READY) };
    let ordered = driver.submit(1, &ready(11, 1)).unwrap();
    let after = driver.submit(1, &ready(12, 0)).unwrap();
    let ahead = driver.submit(1, &ready(13, 2)).unwrap();
    let (head, answer) = driver.answer(1).unwrap();
    assert!(head == ahead && answer.is_good());
    thread::sleep(Duration::from_millis(50));
    assert!(!driver.has_answer(1).unwrap());
    assert_eq!(driver.function(ABORT_TASK, DISK, 10).unwrap(), COMPLETE);
    assert_eq!(driver.answer(0).unwrap().1.response, ABORTED);
    assert_eq!(driver.answer(1).unwrap().0, ordered);
    assert_eq!(driver.answer(1).unwrap().0, after);
}

#[test]
fn one_in_line_is_aborted_and_lets_the_next_pass() {
    let (_image, scsi) = stalled();
    let mut driver = driver(&scsi, 2);
    stall(&mut driver);
    driver.submit(0, &read(10)).unwrap();
    // It has been looked at: another queue's thread might be quicker.
    assert_eq!(driver.function(QUERY_TASK, DISK, 10).unwrap(), SUCCEEDED);
    let ready = |tag, attribute| Command { tag, attribute, ..Command::new(DISK, &TEST_UNIT_READY) };
    let ordered = driver.submit(1, &ready(11, 1)).unwrap();
    let after = driver.submit(1, &ready(12, 0)).unwrap();
    assert_eq!(driver.function(ABORT_TASK, DISK, 11).unwrap(), COMPLETE);
    let answers = [driver.answer(1).unwrap(), driver.answer(1).unwrap()];
    let of = |head| answers.iter().find(|(other, _)| *other == head).unwrap().1.clone();
    assert_eq!((of(ordered).response, of(after).response), (ABORTED, 0));
}

#[test]
fn what_waits_does_not_hold_up_the_end_of_a_session() {
    let (_image, scsi) = stalled();
    let mut driver = driver(&scsi, 2);
    stall(&mut driver);
    driver.submit(0, &read(10)).unwrap();
    driver.submit(1, &Command { attribute: 1, ..read(11) }).unwrap();
    driver.submit(1, &read(12)).unwrap();
    driver.reconnect(&scsi.daemon.socket).unwrap();
    // A new driver: it hears of the reset, and is not held up by what the old one had in line.
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), Some((6, 0x29, 0)));
    assert_eq!(sense_of(&mut driver, DISK, &TEST_UNIT_READY), None);
}
