//! A virtio driver and the vhost-user frontend below it, in one: what a daemon sees of a virtual machine, without one.
//!
//! ```text
//!   Daemon (the program) <--socket-- Frontend --owns--> GuestRam <--rings, buffers-- SplitQueue <-- BlockDriver
//! ```
//!
//! The rings are this crate's own, driver side; nothing is shared with the daemon's but the wire codec. Each layer gives
//! tests its raw parts, to misuse them.

mod balloon;
mod block;
pub mod console;
mod daemon;
mod frontend;
mod inflight;
mod load;
mod log;
mod memory;
mod net;
mod process;
mod queue;
mod scsi;

use std::io;
use std::time::Duration;

use cleave_common::vhost_user::{ChannelError, Malformed};

pub use balloon::{BALLOON_PAGE, BalloonConfig, BalloonDriver};
pub use block::{BlockDriver, DiskConfig, IoStatus, RequestKind};
pub use console::ConsoleDriver;
pub use daemon::{Daemon, binary};
pub use frontend::{Frontend, Negotiated, USER_BASE};
pub use inflight::InflightRegion;
pub use load::{Beside, Extent, Ledger, Load, Report};
pub use log::DirtyLog;
pub use memory::GuestRam;
pub use net::{Frame, HEADER_LEN, NetDriver};
pub use process::Process;
pub use queue::{Buffer, Flags, SplitQueue, Vring};
pub use scsi::{Answer, Command, ScsiDriver, lun};

/// What no answer may take longer than.
pub const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the backend refused {0}")]
    Refused(&'static str),
    #[error("the backend answered {request} with {what}")]
    Answer { request: &'static str, what: String },
    #[error("the backend lacks {0}")]
    Missing(&'static str),
    #[error("no completion came in time")]
    Timeout,
    #[error("the device gave back descriptor {0}, which it was not given")]
    ForeignDescriptor(u32),
    #[error("sector {sector}: {what}")]
    Damaged { sector: u64, what: String },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("{0}")]
    Daemon(String),
}

impl DriverError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

pub type Result<T> = std::result::Result<T, DriverError>;
