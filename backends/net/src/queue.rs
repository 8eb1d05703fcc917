//! One queue's thread, whatever the queue is for.
//!
//! ```text
//!   idle --Start--> waiting for the first kick --kick--> serving --Stop--> idle
//!                                                  `--the ring is broken--> broken --Stop--> idle
//!
//!   a turn:   work, a bounded amount -> interrupt, if one is due -> look what has come, or rest until something does
//!   rest:     look for work (polling) -> ask for kicks, if the ring is what is waited for -> sleep
//! ```
//!
//! Frames go by readv and writev between the tap device and guest memory. Not by io_uring: several reads in flight on one
//! queue complete in any order, and there is nothing to overlap: each call does its whole work, one copy, at once.
//!
//! Invariants: the thread waits in one place; nothing is in flight between two turns but buffers that no frame has used and
//! at most one frame, so a stop is immediate.

pub(crate) mod control;
pub(crate) mod receive;
pub(crate) mod stock;
pub(crate) mod transmit;

use std::fmt::Display;
use std::io;
use std::time::Instant;

use cleave_common::exit::ExitCode;
use cleave_runtime::{Command, Complaints, Inbox, Polling, Ready, RingError, Vring, Waiter};
use tracing::{Span, error, warn};

use crate::port::Port;

/// Most chains or frames of one turn: then commands are looked at.
const BATCH: u16 = 64;

/// Why a ring is left alone until it is set up again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("descriptor {0} is made available again while it is in use")]
    HeadTwice(u16),
}

/// What is to be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing: there is more to do.
    Again,
    /// The driver, to make something available.
    Driver,
    /// The port, to have a frame or to take one.
    Port,
    /// This moment: a rate limit lets nothing pass before.
    At(Instant),
}

/// What a queue is for.
pub(crate) trait Work {
    /// Does some. The ring has been started and is not broken.
    fn turn(&mut self, ring: &mut Ring) -> Result<Next, QueueError>;

    /// The port may have a frame, or room for one.
    fn port_is_ready(&mut self) {}

    /// The ring is given back after this.
    fn end(&mut self, ring: &mut Ring);
}

/// A vring while it is served.
pub(crate) struct Ring {
    pub(crate) vring: Vring,
    broken: bool,
    /// The guest has been asked for kicks, or may think so.
    kicks_wanted: bool,
    complaints: Complaints,
    /// Where it is said: of several devices in this process each has its name there, whichever thread finds what is wrong.
    span: Span,
}

impl Ring {
    pub(crate) fn new(vring: Vring) -> Self {
        Self {
            vring,
            broken: false,
            kicks_wanted: true,
            complaints: Complaints::default(),
            span: Span::current(),
        }
    }

    pub(crate) fn serves(&self) -> bool {
        self.vring.is_started() && !self.broken
    }

    /// A broken ring is left alone until it is set up again.
    fn check<T>(&mut self, outcome: Result<T, QueueError>) -> Option<T> {
        outcome
            .inspect_err(|error| {
                if self.leave_alone(error) {
                    self.vring.signal_broken();
                }
            })
            .ok()
    }

    /// The ring is broken. `true`: it was not before, and the frontend is to be told.
    pub(crate) fn leave_alone(&mut self, error: &QueueError) -> bool {
        let first = !std::mem::replace(&mut self.broken, true);
        if first {
            let index = self.vring.index();
            self.span.in_scope(|| warn!("{index} is broken until it is set up again: {error}"));
        }
        first
    }

    pub(crate) fn complain(&mut self, what: &dyn Display) {
        let Self { vring, complaints, span, .. } = self;
        span.in_scope(|| complaints.add(vring.index(), what));
    }
}

/// A queue's thread, with what it waits by.
pub(crate) struct Server<'a> {
    pub(crate) inbox: &'a Inbox,
    pub(crate) waiter: &'a Waiter,
    pub(crate) polling: &'a mut Polling,
}

impl Server<'_> {
    /// Serves `vring` until the session wants it back.
    pub(crate) fn run(&mut self, vring: Vring, work: &mut dyn Work) -> Vring {
        let mut ring = Ring::new(vring);
        self.waiter.watch_kick(ring.vring.kick_fd());
        loop {
            let next = if ring.serves() { self.turn(&mut ring, work) } else { Next::Port };
            let ready = match next {
                Next::Again => self.waiter.poll(),
                Next::At(moment) => self.waiter.wait_until(moment),
                Next::Driver | Next::Port => self.rest(&mut ring, next),
            };
            let ready = ready.unwrap_or_else(|error| give_up("waiting for events failed", &error));
            if ready.kick {
                ring.vring.start();
            }
            if ready.other {
                work.port_is_ready();
            }
            if ready.wake && matches!(self.inbox.try_next(), Some(Command::Stop(_))) {
                break;
            }
        }
        work.end(&mut ring);
        self.waiter.unwatch_kick(ring.vring.kick_fd());
        ring.vring
    }

    fn turn(&mut self, ring: &mut Ring, work: &mut dyn Work) -> Next {
        if std::mem::take(&mut ring.kicks_wanted) {
            let disabled = ring.vring.disable_kicks().map_err(QueueError::from);
            ring.check(disabled);
        }
        let worked = work.turn(ring);
        let next = ring.check(worked);
        let signalled = ring.vring.signal_used().map_err(QueueError::from);
        ring.check(signalled);
        next.unwrap_or(Next::Port)
    }

    /// Waits for anything to happen: first with open eyes, if that has paid lately.
    fn rest(&mut self, ring: &mut Ring, next: Next) -> io::Result<Ready> {
        if let Some(limit) = self.polling.next_look() {
            let ready = self.look(ring, next, Instant::now() + limit)?;
            self.polling.looked(ready.is_some());
            if let Some(ready) = ready {
                return Ok(ready);
            }
        }
        // Kicks are asked for only here, when there is nothing left to see.
        if next == Next::Driver && ring.serves() {
            ring.kicks_wanted = true;
            let enabled = ring.vring.enable_kicks().map_err(QueueError::from);
            if ring.check(enabled).unwrap_or(true) {
                return self.waiter.poll();
            }
        }
        self.waiter.wait()
    }

    /// Looks for work until `end`. `None`: there is none.
    fn look(&mut self, ring: &mut Ring, next: Next, end: Instant) -> io::Result<Option<Ready>> {
        loop {
            let ready = self.waiter.poll()?;
            // A ring that cannot be read is looked at, and found broken, by the next turn.
            let available =
                next == Next::Driver && ring.serves() && ring.vring.has_available().unwrap_or(true);
            if ready.any() || available {
                return Ok(Some(ready));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::hint::spin_loop();
        }
    }
}

/// Without what it waits by, a thread can neither serve nor be stopped.
pub(crate) fn give_up(what: &str, error: &io::Error) -> ! {
    error!("{what}: {error}");
    std::process::exit(ExitCode::Host as i32);
}

/// Ends the process if the port is no more: whoever started it can start another one, with a port.
pub(crate) fn end_if_gone(port: &dyn Port, error: &io::Error) {
    if port.is_gone() {
        give_up("the tap device is gone", error);
    }
}
