//! What every queue's thread knows of the disk it serves.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cleave_common::exit::printable;
use cleave_storage::Image;
use rustix::event::{EventfdFlags, eventfd};
use tracing::warn;

use crate::request::Limits;
use crate::throttle::{Direction, Throttle, Turn};

/// What to do with a write that finds no room on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFull {
    /// The guest is told that it failed.
    Error,
    /// It waits until there is room.
    Pause,
}

/// What became of a request that waited for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// There was some.
    Room,
    /// It met another error.
    Failed,
    /// Its queue stopped, and it stays undone and unanswered.
    Left,
    /// Its queue stopped, and it had to be answered: with an error.
    Stopped,
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
    /// Requests that wait for room.
    waiting_for_room: AtomicUsize,
    throttle: Option<(Instant, Mutex<Throttle>)>,
    /// By queue.
    counts: Vec<Counts>,
    /// By queue: its thread is to look after its requests that wait.
    nudges: Vec<OwnedFd>,
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
        let nudge = |_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            len: image.len().into(),
            logical_block: image.logical_block(),
            read_only: image.is_read_only(),
            durable: AtomicBool::new(true),
            serial,
            name: printable(&image.path().display().to_string()).into_owned(),
            on_full,
            poll,
            waiting_for_room: AtomicUsize::new(0),
            throttle: throttle.map(|throttle| (Instant::now(), Mutex::new(throttle))),
            counts: (0..num_queues).map(|_| Counts::default()).collect(),
            nudges: (0..num_queues).map(nudge).collect::<Result<_, _>>()?,
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

    /// Readable when [`Disk::nudge`] was called for `queue`.
    pub(crate) fn nudge_fd(&self, queue: u16) -> BorrowedFd<'_> {
        self.nudges[usize::from(queue)].as_fd()
    }

    pub(crate) fn nudge(&self, queue: u16) {
        // A counter that is full is readable all the same.
        let _ = rustix::io::write(&self.nudges[usize::from(queue)], &1u64.to_ne_bytes());
    }

    pub(crate) fn nudge_all(&self) {
        (0..self.nudges.len() as u16).for_each(|queue| self.nudge(queue));
    }

    pub(crate) fn is_throttled(&self) -> bool {
        self.throttle.is_some()
    }

    /// Whether a request may go, by the disk's rate limits. The queue whose turn is next is told.
    pub(crate) fn ask(&self, queue: u16, direction: Direction, bytes: u64) -> Turn {
        let Some((start, throttle)) = &self.throttle else { return Turn::Go { next: None } };
        let now = start.elapsed();
        let turn = throttle.lock().unwrap_or_else(PoisonError::into_inner).ask(now, queue, direction, bytes);
        if let Turn::Go { next: Some(next) } = turn {
            self.nudge(next);
        }
        turn
    }

    /// Counts a request that goes without having asked.
    pub(crate) fn charge(&self, direction: Direction, bytes: u64) {
        let Some((start, throttle)) = &self.throttle else { return };
        let now = start.elapsed();
        throttle.lock().unwrap_or_else(PoisonError::into_inner).charge(now, direction, bytes);
    }

    /// Nothing of `queue` waits for the rate limits any more.
    pub(crate) fn leave_line(&self, queue: u16, direction: Direction) {
        let Some((_, throttle)) = &self.throttle else { return };
        let next = throttle.lock().unwrap_or_else(PoisonError::into_inner).leave(queue, direction);
        next.into_iter().for_each(|next| self.nudge(next));
    }

    /// A request begins to wait for room, for the reason `error`.
    pub(crate) fn begin_waiting_for_room(&self, error: &io::Error) {
        if self.waiting_for_room.fetch_add(1, Ordering::Relaxed) == 0 {
            warn!("the disk is full: writes wait until there is room ({error})");
        }
    }

    /// It waits no more. What became of the last one is told: it says why none waits.
    pub(crate) fn end_waiting_for_room(&self, waited: Waited) {
        if self.waiting_for_room.fetch_sub(1, Ordering::Relaxed) != 1 {
            return;
        }
        match waited {
            Waited::Room => warn!("the disk has room again: no write waits any more"),
            Waited::Failed => warn!("no write waits for room any more: the last one has failed"),
            Waited::Left => warn!(
                "no write waits for room any more: their queue has stopped, and they are left undone for whoever goes on"
            ),
            Waited::Stopped => warn!(
                "no write waits for room any more: their queue has stopped, and they fail, for the frontend keeps no record of them (INFLIGHT_SHMFD)"
            ),
        }
    }
}
