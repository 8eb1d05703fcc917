//! When a request on one disk may go, as far as all its queues are concerned: its rate limits, and room on the host.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use tracing::warn;

use crate::throttle::{Direction, Throttle, Turn};

/// What became of a request that waited for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// There was some.
    Room,
    /// It met another error.
    Failed,
    /// Its queue stopped, and it stays undone and unanswered.
    Left,
    /// Its queue stopped, and it had to be answered: with an error.
    Stopped,
}

/// How queues' threads are told, wherever they wait, to look after what waits with them.
#[derive(Debug)]
pub struct Nudges(Vec<OwnedFd>);

impl Nudges {
    pub fn new(queues: u16) -> io::Result<Self> {
        let nudge = |_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self((0..queues).map(nudge).collect::<Result<_, _>>()?))
    }

    /// Readable when `queue` was nudged.
    pub fn fd(&self, queue: u16) -> BorrowedFd<'_> {
        self.0[usize::from(queue)].as_fd()
    }

    pub fn nudge(&self, queue: u16) {
        // A counter that is full is readable all the same.
        let _ = rustix::io::write(&self.0[usize::from(queue)], &1u64.to_ne_bytes());
    }

    pub fn nudge_all(&self) {
        (0..self.0.len() as u16).for_each(|queue| self.nudge(queue));
    }
}

/// Of one disk, for all its queues.
#[derive(Debug)]
pub struct Admission {
    /// What messages call the disk.
    name: String,
    throttle: Option<(Instant, Mutex<Throttle>)>,
    /// Requests that wait for room.
    waiting_for_room: AtomicUsize,
    nudges: Arc<Nudges>,
}

impl Admission {
    /// `name`: what messages call the disk.
    pub fn new(name: impl Into<String>, throttle: Option<Throttle>, nudges: Arc<Nudges>) -> Self {
        Self {
            name: name.into(),
            throttle: throttle.map(|throttle| (Instant::now(), Mutex::new(throttle))),
            waiting_for_room: AtomicUsize::new(0),
            nudges,
        }
    }

    pub fn nudges(&self) -> &Nudges {
        &self.nudges
    }

    pub fn is_throttled(&self) -> bool {
        self.throttle.is_some()
    }

    /// Whether a request may go, by the disk's rate limits. The queue whose turn is next is told.
    pub fn ask(&self, queue: u16, direction: Direction, bytes: u64) -> Turn {
        let Some((start, throttle)) = &self.throttle else { return Turn::Go { next: None } };
        let now = start.elapsed();
        let turn = throttle.lock().unwrap_or_else(PoisonError::into_inner).ask(now, queue, direction, bytes);
        if let Turn::Go { next: Some(next) } = turn {
            self.nudges.nudge(next);
        }
        turn
    }

    /// Counts a request that goes without having asked.
    pub fn charge(&self, direction: Direction, bytes: u64) {
        let Some((start, throttle)) = &self.throttle else { return };
        let now = start.elapsed();
        throttle.lock().unwrap_or_else(PoisonError::into_inner).charge(now, direction, bytes);
    }

    /// Nothing of `queue` waits for the rate limits any more.
    pub fn leave_line(&self, queue: u16, direction: Direction) {
        let Some((_, throttle)) = &self.throttle else { return };
        let next = throttle.lock().unwrap_or_else(PoisonError::into_inner).leave(queue, direction);
        next.into_iter().for_each(|next| self.nudges.nudge(next));
    }

    /// A request begins to wait for room, for the reason `error`.
    pub fn begin_waiting_for_room(&self, error: &io::Error) {
        if self.waiting_for_room.fetch_add(1, Ordering::Relaxed) == 0 {
            warn!("{} is full: writes wait until there is room ({error})", self.name);
        }
    }

    /// It waits no more. What became of the last one is told: it says why none waits.
    pub fn end_waiting_for_room(&self, waited: Waited) {
        if self.waiting_for_room.fetch_sub(1, Ordering::Relaxed) != 1 {
            return;
        }
        match waited {
            Waited::Room => warn!("{} has room again: no write waits any more", self.name),
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
