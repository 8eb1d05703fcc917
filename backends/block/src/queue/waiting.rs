//! Requests of one queue that are parked in its engine: held by the rate limits, or for want of room on the disk.
//!
//! ```text
//!   held:  asked for --first in line, and its time has come--> submitted
//!   full:  the kernel said ENOSPC --a second later, or at a nudge: one to try--> submitted --it went well--> all of them
//! ```
//!
//! Invariants: a request is in one list at most, and parked while it is in one; held requests go in their order.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use cleave_storage::Engine;

use crate::disk::{Disk, Waited};
use crate::throttle::{Direction, Turn};

/// How long a full disk is left alone before it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What waits of one queue.
#[derive(Debug)]
pub(super) struct Waiting {
    queue: u16,
    /// By direction.
    held: [Held; 2],
    full: VecDeque<u16>,
    retry_at: Option<Instant>,
}

#[derive(Debug, Default)]
struct Held {
    /// Heads and their bytes.
    requests: VecDeque<(u16, u64)>,
    /// When the first may go; `None` while others are before it in line.
    due: Option<Instant>,
}

impl Waiting {
    pub(super) fn new(queue: u16) -> Self {
        Self { queue, held: Default::default(), full: VecDeque::new(), retry_at: None }
    }

    /// Submits the parked request of `head`, now or when the rate limits let it go.
    pub(super) fn admit(
        &mut self,
        head: u16,
        direction: Direction,
        bytes: u64,
        disk: &Disk,
        engine: &mut Engine,
    ) {
        if !disk.is_throttled() {
            return engine.submit(head);
        }
        let held = &mut self.held[direction as usize];
        held.requests.push_back((head, bytes));
        if held.requests.len() == 1 {
            self.release(direction, disk, engine);
        }
    }

    /// There is no room for the request of `head`.
    pub(super) fn park_full(&mut self, head: u16) {
        // At the end: what is small enough may fit where the first does not.
        self.full.push_back(head);
        self.retry_at.get_or_insert_with(|| Instant::now() + RETRY);
    }

    /// A request that had found no room has gone well: there is some now.
    pub(super) fn room_found(&mut self, engine: &mut Engine) {
        self.full.drain(..).for_each(|head| engine.submit(head));
        self.retry_at = None;
    }

    /// How many requests.
    pub(super) fn len(&self) -> usize {
        self.held.iter().map(|held| held.requests.len()).sum::<usize>() + self.full.len()
    }

    /// When [`Waiting::submit_due`] is to be called at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.held.iter().filter_map(|held| held.due).chain(self.retry_at).min()
    }

    /// Submits what has waited long enough at `now`. `nudged`: all of it may have.
    pub(super) fn submit_due(&mut self, now: Instant, nudged: bool, disk: &Disk, engine: &mut Engine) {
        for direction in Direction::ALL {
            let held = &self.held[direction as usize];
            if !held.requests.is_empty() && (nudged || held.due.is_some_and(|due| due <= now)) {
                self.release(direction, disk, engine);
            }
        }
        if nudged || self.retry_at.is_some_and(|at| at <= now) {
            if let Some(head) = self.full.pop_front() {
                engine.submit(head);
            }
            self.retry_at = (!self.full.is_empty()).then(|| now + RETRY);
        }
    }

    fn release(&mut self, direction: Direction, disk: &Disk, engine: &mut Engine) {
        let held = &mut self.held[direction as usize];
        held.due = None;
        while let Some((head, bytes)) = held.requests.front() {
            match disk.ask(self.queue, direction, *bytes) {
                Turn::Go { .. } => {
                    engine.submit(*head);
                    held.requests.pop_front();
                }
                Turn::After(wait) => {
                    held.due = Some(Instant::now() + wait);
                    return;
                }
                Turn::InLine => return,
            }
        }
    }

    /// The queue is to stop. What the rate limits hold is submitted, and counted as if it had waited, or, if it is
    /// `remembered`, left to whoever serves the ring next: else a guest would get round them by resetting. What waits for
    /// room is tried once more, unless it is to be `left`.
    pub(super) fn end(&mut self, remembered: bool, left: bool, disk: &Disk, engine: &mut Engine) {
        for direction in Direction::ALL {
            let held = &mut self.held[direction as usize];
            if !held.requests.is_empty() {
                disk.leave_line(self.queue, direction);
            }
            for (head, bytes) in held.requests.drain(..) {
                if remembered {
                    engine.abandon(head);
                } else {
                    disk.charge(direction, bytes);
                    engine.submit(head);
                }
            }
            held.due = None;
        }
        if left {
            for head in self.full.drain(..) {
                engine.abandon(head);
                disk.end_waiting_for_room(Waited::Left);
            }
        }
        self.room_found(engine);
    }
}
