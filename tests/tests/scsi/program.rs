//! The program: its command line, its end, its sandbox.

use std::process::{Command, Output};

use cleave_tests::driver::{Command as Cdb, Daemon, binary};

use super::common::{MIB, disk};
use super::{DISK, TEST_UNIT_READY, driver, path, start, start_both};

fn run(args: &[&str]) -> Output {
    Command::new(binary("cleave-scsi").unwrap()).args(args).output().unwrap()
}

#[test]
fn what_cannot_be_served_is_refused_with_a_line_and_a_code() {
    let image = disk(MIB);
    let odd = tempfile::NamedTempFile::new().unwrap();
    odd.as_file().set_len(1000).unwrap();
    let both = format!("disk={},lun=1", path(&image));
    for (args, code, wanted) in [
        (vec![], 2, "give a --lun or a --cdrom"),
        (vec!["--lun", "disk=/nowhere"], 2, "/nowhere"),
        (vec!["--lun", "/nowhere"], 2, "not of the form key=value"),
        (vec!["--lun", both.as_str(), "--lun", both.as_str()], 2, "two units are at 0:1"),
        (vec!["--lun", "disk=a,serial"], 2, "serial"),
        (vec!["--cdrom", path(&odd)], 2, "1000 bytes"),
        (vec!["--lun", both.as_str(), "--num-queues", "63"], 2, "num-queues"),
        (vec!["--lun", both.as_str(), "--state", "/nowhere/state"], 2, "/nowhere/state"),
    ] {
        let output = run(&[&["--socket-path", "/nowhere/socket"], args.as_slice()].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(wanted), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn what_it_can_do_is_printed_for_management() {
    let output = run(&["--print-capabilities"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["type"], "scsi");
    let help = run(&["--help"]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("cleave-scsi ctl"));
}

#[test]
fn an_image_is_served_once() {
    let (image, iso) = (disk(MIB), disk(MIB));
    let _scsi = start_both(&image, &iso, &[]);
    let refused = Daemon::start("cleave-scsi", &["--lun", &format!("disk={}", path(&image))]).err().unwrap();
    assert!(refused.to_string().contains("is in use"), "{refused}");
    // A CD-ROM image is only read, by as many as like.
    Daemon::start("cleave-scsi", &["--cdrom", path(&iso)]).unwrap();
}

#[test]
fn it_says_how_it_is_and_ends_in_order() {
    let (image, iso) = (disk(MIB), disk(MIB));
    let mut scsi = start_both(&image, &iso, &[]);
    let mut driver = driver(&scsi, 1);
    driver.run(&Cdb::new(DISK, &TEST_UNIT_READY)).unwrap();
    scsi.daemon.signal(rustix::process::Signal::USR1).unwrap();
    scsi.daemon.wait_for_log("2 units; 0 requests are in flight; ").unwrap();
    scsi.daemon.signal(rustix::process::Signal::TERM).unwrap();
    assert_eq!(scsi.daemon.wait().unwrap().code(), Some(0));
    assert!(!scsi.daemon.socket.exists() && !scsi.directory.path().join("control").exists());
}

#[test]
fn without_units_it_waits_for_some() {
    let image = disk(MIB);
    let scsi = start(&[]);
    let mut driver = driver(&scsi, 1);
    assert_eq!(driver.run(&Cdb::new(DISK, &TEST_UNIT_READY)).unwrap().response, 3);
    scsi.ctl(&["add-disk", &format!("disk={}", path(&image)), "lun=1"]).unwrap();
    assert!(driver.run(&Cdb::new(DISK, &TEST_UNIT_READY)).unwrap().is_good());
}
