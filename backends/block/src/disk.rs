//! What every queue's thread knows of the disk it serves.

use std::sync::atomic::AtomicBool;

use crate::request::Limits;

/// What the device and its queues' threads share.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) limits: Limits,
    /// A write completes only when it is on the disk: the guest has switched the write cache off, or cannot flush it.
    pub(crate) durable: AtomicBool,
    pub(crate) serial: String,
}
