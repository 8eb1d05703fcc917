//! cleave-balloon between a driver and the host's memory: a page that is given back is a hole in the file that guest memory is.

mod control;
mod hostile;
mod huge;
mod kill;
mod pages;
mod program;

use std::time::{Duration, Instant};

use cleave_common::control::Client;
use cleave_tests::driver::{BALLOON_PAGE as PAGE, BalloonDriver, Daemon};
use serde_json::{Map, Value};

const MIB: u64 = 1 << 20;

/// Of each of the two regions of guest memory.
const HALF: u64 = 64 * MIB;

/// Pages that no ring of the driver's and no buffer of its is in.
const FIRST: u32 = (32 * MIB / PAGE) as u32;

const SOON: Duration = Duration::from_secs(10);

/// Feature bits (virtio 1.2, 5.5.3).
mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const PAGE_POISON: u64 = 1 << 4;
    pub const REPORTING: u64 = 1 << 5;
}

struct Balloon {
    daemon: Daemon,
    control: std::path::PathBuf,
    /// The control socket and the state are in it.
    _directory: tempfile::TempDir,
}

impl Balloon {
    fn start(args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let (control, state) = (path("control"), path("state"));
        let own = ["--min", "16M", "--control", control.as_str(), "--state", state.as_str()];
        let args: Vec<&str> = own.into_iter().chain(args.iter().copied()).collect();
        let daemon = Daemon::start("cleave-balloon", &args).unwrap();
        Self { daemon, control: control.into(), _directory: directory }
    }

    /// With a driver that has every feature.
    fn with_driver(args: &[&str]) -> (Self, BalloonDriver) {
        let balloon = Self::start(args);
        let driver = BalloonDriver::connect(&balloon.daemon.socket, HALF).unwrap();
        (balloon, driver)
    }

    fn ask(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let arguments: Map<String, Value> = arguments.as_object().unwrap().clone();
        Client::connect(&self.control)
            .and_then(|mut client| client.call(command, &arguments, &[]))
            .map_err(|error| error.to_string())
    }

    fn status(&self) -> Value {
        self.ask("status", serde_json::json!({})).unwrap()
    }
}

/// Fills these pages, so that the host has memory for them.
fn fill(driver: &BalloonDriver, pfns: &[u32]) {
    for pfn in pfns {
        driver.ram.write(u64::from(*pfn) * PAGE, &[*pfn as u8 | 1; PAGE as usize]).unwrap();
    }
}

fn is_hole(driver: &BalloonDriver, pfn: u32) -> bool {
    driver.ram.is_hole(u64::from(pfn) * PAGE).unwrap()
}

fn keeps_its_content(driver: &BalloonDriver, pfn: u32) -> bool {
    driver.ram.read(u64::from(pfn) * PAGE, PAGE as usize).unwrap() == [pfn as u8 | 1; PAGE as usize]
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
