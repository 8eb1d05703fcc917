//! cleave-scsi between a driver and its images.

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod control;
mod kill;
mod program;
mod tasks;

use cleave_tests::driver::{Command, Daemon, ScsiDriver, binary, lun};
use serde_json::{Map, Value};
use tempfile::{NamedTempFile, TempDir};

/// The units of most tests.
const DISK: [u8; 8] = [1, 0, 0x40, 1, 0, 0, 0, 0];
const CDROM: [u8; 8] = [1, 0, 0x40, 2, 0, 0, 0, 0];

const ABORT_TASK: u32 = 0;
const LOGICAL_UNIT_RESET: u32 = 5;
const QUERY_TASK: u32 = 6;

const BLOCK: u32 = 512;
const CD_BLOCK: u32 = 2048;

const TEST_UNIT_READY: [u8; 6] = [0; 6];

struct Scsi {
    daemon: Daemon,
    directory: TempDir,
}

/// cleave-scsi with a control socket and a state file of its own.
fn start(args: &[&str]) -> Scsi {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let own = ["--control".to_owned(), path("control"), "--state".to_owned(), path("state")];
    let args: Vec<&str> = own.iter().map(String::as_str).chain(args.iter().copied()).collect();
    Scsi { daemon: Daemon::start("cleave-scsi", &args).unwrap(), directory }
}

/// As [`start`], with `disk` as unit 1 and `iso` in the drive that is unit 2.
fn start_both(disk: &NamedTempFile, iso: &NamedTempFile, more: &[&str]) -> Scsi {
    let disk = format!("disk={},lun=1", disk.path().display());
    let iso = format!("{},lun=2", iso.path().display());
    start(&[&["--lun", &disk, "--cdrom", &iso], more].concat())
}

fn driver(scsi: &Scsi, queues: u16) -> ScsiDriver {
    ScsiDriver::connect(&scsi.daemon.socket, queues, 64).unwrap()
}

impl Scsi {
    /// What `cleave-scsi ctl` says, or why it refuses.
    fn ctl(&self, words: &[&str]) -> Result<String, String> {
        let output = std::process::Command::new(binary("cleave-scsi").unwrap())
            .arg("ctl")
            .arg(self.directory.path().join("control"))
            .args(words)
            .output()
            .unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    /// What query-units says of one.
    fn unit(&self, name: &str) -> Map<String, Value> {
        let units: Value = serde_json::from_str(&self.ctl(&["query-units"]).unwrap()).unwrap();
        let unit = units.as_array().unwrap().iter().find(|unit| unit["unit"] == name);
        unit.unwrap_or_else(|| panic!("no unit {name}: {units}")).as_object().unwrap().clone()
    }
}

fn path(file: &NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

/// Sense key, code and qualifier of the answer to a command without data.
fn sense_of(driver: &mut ScsiDriver, lun: [u8; 8], cdb: &[u8]) -> Option<(u8, u8, u8)> {
    driver.execute(&Command::new(lun, cdb)).unwrap().sense_code()
}

/// Whether a unit answers at all.
fn is_there(driver: &mut ScsiDriver, number: u16) -> bool {
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    let answer = driver.execute(&Command { data_in: 36, ..Command::new(lun(0, number), &inquiry) }).unwrap();
    answer.is_good() && answer.data[0] >> 5 == 0
}
