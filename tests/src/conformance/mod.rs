//! What any vhost-user block backend has to do, as checks with names: each is a session, or some, of its own.
//!
//! A check that needs what the backend does not offer is not applicable; so is one that writes, unless the subject may be
//! written to. What is demanded is what the specifications demand of a device ("MUST"), and what every guest relies on.

mod identity;
mod inflight;
mod requests;
mod rings;
mod sessions;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::driver::{BlockDriver, DriverError, Frontend, IoStatus};

/// Feature bits of virtio-blk (virtio 1.2, 5.2.3).
mod feature {
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

const MIB: u64 = 1 << 20;

/// A backend that listens on a socket.
#[derive(Debug, Clone)]
pub struct Subject {
    pub socket: PathBuf,
    /// What is on the disk is not needed.
    pub may_write: bool,
}

/// One check.
#[derive(Clone, Copy)]
pub struct Check {
    pub name: &'static str,
    /// What is demanded.
    pub demand: &'static str,
    run: fn(&Subject) -> Outcome,
}

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    /// With what the backend does not offer.
    NotApplicable(String),
    Fail(String),
}

/// Why a check ended early.
enum End {
    NotApplicable(String),
    Fail(String),
}

impl From<DriverError> for End {
    fn from(error: DriverError) -> Self {
        Self::Fail(error.to_string())
    }
}

type Outcome = Result<(), End>;

/// All checks, in the order in which they are to run.
pub fn checks() -> Vec<Check> {
    [identity::CHECKS, requests::CHECKS, rings::CHECKS, sessions::CHECKS, inflight::CHECKS].concat()
}

impl Check {
    /// Runs it; it takes no longer than some times [`crate::driver::PATIENCE`].
    pub fn run(&self, subject: &Subject) -> Verdict {
        match (self.run)(subject) {
            Ok(()) => Verdict::Pass,
            Err(End::NotApplicable(what)) => Verdict::NotApplicable(what),
            Err(End::Fail(what)) => Verdict::Fail(what),
        }
    }
}

impl Subject {
    fn frontend(&self) -> Result<Frontend, End> {
        let stream = UnixStream::connect(&self.socket).map_err(|error| {
            End::Fail(format!("nobody listens on {} any more: {error}", self.socket.display()))
        })?;
        Ok(Frontend::over(stream))
    }

    /// With one queue and all that is offered.
    fn driver(&self) -> Result<BlockDriver, End> {
        self.driver_with(u64::MAX, 1)
    }

    fn driver_with(&self, features: u64, queues: u16) -> Result<BlockDriver, End> {
        Ok(BlockDriver::start(self.frontend()?, features, queues, 128)?)
    }

    /// A driver that may write; the first MiB is there.
    fn writer(&self) -> Result<BlockDriver, End> {
        if !self.may_write {
            return Err(End::NotApplicable("permission to write to the disk".into()));
        }
        let mut driver = self.driver()?;
        needs(driver.negotiated.offered & feature::RO == 0, "a disk that is not read-only")?;
        needs(driver.config()?.sectors * 512 >= MIB, "a disk of a MiB")?;
        Ok(driver)
    }
}

fn demand(holds: bool, otherwise: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(End::Fail(otherwise())) }
}

/// Ends the check as not applicable without `what`.
fn needs(there: bool, what: &str) -> Outcome {
    if there { Ok(()) } else { Err(End::NotApplicable(what.to_owned())) }
}

fn demand_status(what: &str, status: IoStatus, due: IoStatus) -> Outcome {
    demand(status == due, || format!("{what}: the status is {status:?}, {due:?} is due"))
}

/// Bytes that differ from place to place, and with `seed`.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
