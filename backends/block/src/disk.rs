//! What every queue's thread knows of the disk it serves.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cleave_common::exit::printable;
use cleave_storage::{Admission, Image, Nudges, Throttle};

use crate::request::Limits;

/// What to do with a write that finds no room on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFull {
    /// The guest is told that it failed.
    Error,
    /// It waits until there is room.
    Pause,
}

/// What the device and its queues' threads share.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Bytes.
    len: AtomicU64,
    logical_block: u32,
    read_only: bool,
    /// A write completes only when it is on the disk: the guest has switched the write cache off, or cannot flush it.
    pub(crate) durable: AtomicBool,
    pub(crate) serial: String,
    /// For messages.
    pub(crate) name: String,
    pub(crate) on_full: OnFull,
    /// How long a queue's thread may look for work before it sleeps.
    pub(crate) poll: Duration,
    /// When requests may go.
    pub(crate) admission: Admission,
    /// By queue.
    counts: Vec<Counts>,
}

/// What one queue's thread has to do and has done. It alone writes here, so that no two threads' writes meet in a cache
/// line.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Counts {
    on_disk: AtomicU64,
    waiting: AtomicU64,
    served: AtomicU64,
}

impl Counts {
    pub(crate) fn set(&self, on_disk: usize, waiting: usize, served: u64) {
        let of = |count: usize| count as u64;
        self.on_disk.store(of(on_disk), Ordering::Relaxed);
        self.waiting.store(of(waiting), Ordering::Relaxed);
        self.served.store(served, Ordering::Relaxed);
    }

    pub(crate) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

impl Disk {
    pub(crate) fn new(
        image: &Image,
        num_queues: u16,
        serial: String,
        on_full: OnFull,
        poll: Duration,
        throttle: Option<Throttle>,
    ) -> io::Result<Self> {
        let nudges = Arc::new(Nudges::new(num_queues)?);
        Ok(Self {
            len: image.len().into(),
            logical_block: image.logical_block(),
            read_only: image.is_read_only(),
            durable: AtomicBool::new(true),
            serial,
            name: printable(&image.path().display().to_string()).into_owned(),
            on_full,
            poll,
            admission: Admission::new("the disk", throttle, nudges),
            counts: (0..num_queues).map(|_| Counts::default()).collect(),
        })
    }

    /// Where the thread of `queue` counts.
    pub(crate) fn counts(&self, queue: u16) -> &Counts {
        &self.counts[usize::from(queue)]
    }

    /// For a person.
    pub(crate) fn report(&self) -> String {
        let sum = |count: fn(&Counts) -> &AtomicU64| -> u64 {
            self.counts.iter().map(|counts| count(counts).load(Ordering::Relaxed)).sum()
        };
        let (on_disk, waiting) = (sum(|counts| &counts.on_disk), sum(|counts| &counts.waiting));
        format!(
            "{} requests are in flight, {waiting} of them waiting for room or for a rate limit; {} were served",
            on_disk + waiting,
            sum(|counts| &counts.served)
        )
    }

    pub(crate) fn limits(&self) -> Limits {
        let len = self.len.load(Ordering::Relaxed);
        Limits { len, logical_block: self.logical_block, read_only: self.read_only }
    }

    /// From now on the disk has so many bytes.
    pub(crate) fn resize(&self, len: u64) {
        self.len.store(len, Ordering::Relaxed);
    }
}
