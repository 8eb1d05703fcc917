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

use crate::admission::{Admission, Waited};
use crate::engine::Engine;

use crate::throttle::{Direction, Turn};

/// How long a full disk is left alone before it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What waits of one queue on one disk.
#[derive(Debug)]
pub struct Waiting {
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
    pub fn new(queue: u16) -> Self {
        Self { queue, held: Default::default(), full: VecDeque::new(), retry_at: None }
    }

    /// Submits the parked request of `head`, now or when the rate limits let it go.
    pub fn admit(
        &mut self,
        head: u16,
        direction: Direction,
        bytes: u64,
        admission: &Admission,
        engine: &mut Engine,
    ) {
        if !admission.is_throttled() {
            return engine.submit(head);
        }
        let held = &mut self.held[direction as usize];
        held.requests.push_back((head, bytes));
        if held.requests.len() == 1 {
            self.release(direction, admission, engine);
        }
    }

    /// There is no room for the request of `head`.
    pub fn park_full(&mut self, head: u16) {
        // At the end: what is small enough may fit where the first does not.
        self.full.push_back(head);
        self.retry_at.get_or_insert_with(|| Instant::now() + RETRY);
    }

    /// A request that had found no room has gone well: there is some now.
    pub fn room_found(&mut self, engine: &mut Engine) {
        self.full.drain(..).for_each(|head| engine.submit(head));
        self.retry_at = None;
    }

    /// How many requests.
    pub fn len(&self) -> usize {
        self.held.iter().map(|held| held.requests.len()).sum::<usize>() + self.full.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the request of `head` back, which is abandoned and has no event. `false`: it does not wait here.
    pub fn withdraw(&mut self, head: u16, admission: &Admission, engine: &mut Engine) -> bool {
        if let Some(at) = self.full.iter().position(|full| *full == head) {
            self.full.remove(at);
            engine.abandon(head);
            admission.end_waiting_for_room(Waited::Failed);
            return true;
        }
        for direction in Direction::ALL {
            let held = &mut self.held[direction as usize];
            let Some(at) = held.requests.iter().position(|(held, _)| *held == head) else { continue };
            held.requests.remove(at);
            engine.abandon(head);
            if held.requests.is_empty() {
                held.due = None;
                admission.leave_line(self.queue, direction);
            } else if at == 0 {
                self.release(direction, admission, engine);
            }
            return true;
        }
        false
    }

    /// When [`Waiting::submit_due`] is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.held.iter().filter_map(|held| held.due).chain(self.retry_at).min()
    }

    /// Submits what has waited long enough at `now`. `nudged`: all of it may have.
    pub fn submit_due(&mut self, now: Instant, nudged: bool, admission: &Admission, engine: &mut Engine) {
        for direction in Direction::ALL {
            let held = &self.held[direction as usize];
            if !held.requests.is_empty() && (nudged || held.due.is_some_and(|due| due <= now)) {
                self.release(direction, admission, engine);
            }
        }
        if nudged || self.retry_at.is_some_and(|at| at <= now) {
            if let Some(head) = self.full.pop_front() {
                engine.submit(head);
            }
            self.retry_at = (!self.full.is_empty()).then(|| now + RETRY);
        }
    }

    fn release(&mut self, direction: Direction, admission: &Admission, engine: &mut Engine) {
        let held = &mut self.held[direction as usize];
        held.due = None;
        while let Some((head, bytes)) = held.requests.front() {
            match admission.ask(self.queue, direction, *bytes) {
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
    pub fn end(&mut self, remembered: bool, left: bool, admission: &Admission, engine: &mut Engine) {
        for direction in Direction::ALL {
            let held = &mut self.held[direction as usize];
            if !held.requests.is_empty() {
                admission.leave_line(self.queue, direction);
            }
            for (head, bytes) in held.requests.drain(..) {
                if remembered {
                    engine.abandon(head);
                } else {
                    admission.charge(direction, bytes);
                    engine.submit(head);
                }
            }
            held.due = None;
        }
        if left {
            for head in self.full.drain(..) {
                engine.abandon(head);
                admission.end_waiting_for_room(Waited::Left);
            }
        }
        self.room_found(engine);
    }
}
