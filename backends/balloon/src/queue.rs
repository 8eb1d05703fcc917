//! One queue's thread, whatever the queue is for.
//!
//! ```text
//!   idle --Start--> waiting for the first kick --kick--> serving --Stop--> idle
//!                                                  `--the ring is broken--> broken --Stop--> idle
//! ```
//!
//! Invariants: the thread waits in one place, and without a time limit unless its queue has one; between two turns nothing
//! is fetched and not used but what [`Work::end`] deals with.

pub(crate) mod hinting;
pub(crate) mod pages;
pub(crate) mod reporting;
pub(crate) mod statistics;

use std::fmt::Display;
use std::time::Instant;

use cleave_common::exit::ExitCode;
use cleave_runtime::{Chain, Command, Complaints, GuestMemory, Inbox, RingError, Segment, Vring, Waiter};
use tracing::{error, warn};

/// Most requests of one turn: then commands are looked at.
const BATCH: u16 = 16;

/// A vring while it is served.
pub(crate) struct Ring {
    pub(crate) vring: Vring,
    broken: bool,
    complaints: Complaints,
}

impl Ring {
    fn serves(&self) -> bool {
        self.vring.is_started() && !self.broken
    }

    pub(crate) fn complain(&mut self, what: &dyn Display) {
        self.complaints.add(self.vring.index(), what);
    }

    /// A broken ring is left alone until it is set up again.
    fn check<T>(&mut self, outcome: Result<T, RingError>) -> Option<T> {
        outcome
            .inspect_err(|error| {
                if !std::mem::replace(&mut self.broken, true) {
                    warn!("{} is broken until it is set up again: {error}", self.vring.index());
                    self.vring.signal_broken();
                }
            })
            .ok()
    }
}

/// What a queue is for.
pub(crate) trait Work {
    /// Does some, a bounded amount. `true`: there may be more.
    fn turn(&mut self, ring: &mut Ring) -> Result<bool, RingError>;

    /// When to have the next turn though nobody asks for one.
    fn wakes_at(&self) -> Option<Instant> {
        None
    }

    /// The ring is given back after this.
    fn end(&mut self, _: &mut Ring) {}
}

/// Does what one request says. Gives the bytes written to it.
pub(crate) trait Requests {
    fn serve(&mut self, ring: &mut Ring, chain: &Chain) -> u32;
}

/// Work whose requests are done one after the other, each as soon as it comes.
pub(crate) struct InTurn<R> {
    requests: R,
    chain: Chain,
}

impl<R> InTurn<R> {
    pub(crate) fn new(requests: R) -> Self {
        Self { requests, chain: Chain::default() }
    }
}

impl<R: Requests> Work for InTurn<R> {
    fn turn(&mut self, ring: &mut Ring) -> Result<bool, RingError> {
        for _ in 0..BATCH {
            let Some(head) = ring.vring.next_head()? else { return Ok(false) };
            let written = match ring.vring.read_chain(head, &mut self.chain) {
                Ok(()) => self.requests.serve(ring, &self.chain),
                Err(error) => {
                    ring.complain(&error);
                    0
                }
            };
            ring.vring.push_used(head, written)?;
            // The driver waits for this one, and may have nothing else to do.
            ring.vring.signal_used()?;
        }
        Ok(true)
    }
}

/// Serves the vrings of one queue, one after the other, until the device is gone.
pub(crate) fn serve(waiter: &Waiter, inbox: &Inbox, work: &mut dyn Work) {
    if let Err(error) = waiter.watch_wake(inbox.wake_fd()) {
        // It would never hear of a stop.
        give_up("a queue's thread cannot wait for commands", &error);
    }
    while let Some(command) = inbox.next() {
        if let Command::Start(vring) = command {
            let mut ring = Ring { vring, broken: false, complaints: Complaints::default() };
            run(waiter, inbox, &mut ring, work);
            work.end(&mut ring);
            inbox.give_back(ring.vring);
        }
    }
}

/// Serves one vring until the session wants it back.
fn run(waiter: &Waiter, inbox: &Inbox, ring: &mut Ring, work: &mut dyn Work) {
    waiter.watch_kick(ring.vring.kick_fd());
    loop {
        let more = ring.serves() && turn(ring, work);
        let until = if ring.serves() { work.wakes_at() } else { None };
        let ready = match until {
            _ if more => waiter.poll(),
            Some(moment) => waiter.wait_until(moment),
            None => waiter.wait(),
        };
        let ready = ready.unwrap_or_else(|error| give_up("waiting for events failed", &error));
        if ready.kick {
            ring.vring.start();
        }
        if ready.wake && matches!(inbox.try_next(), Some(Command::Stop(_))) {
            break;
        }
    }
    waiter.unwatch_kick(ring.vring.kick_fd());
}

/// Works, and asks for a kick at the next request. `true`: there is more to do.
fn turn(ring: &mut Ring, work: &mut dyn Work) -> bool {
    let disabled = ring.vring.disable_kicks();
    ring.check(disabled);
    let worked = work.turn(ring);
    let more = ring.check(worked).unwrap_or(false);
    let signalled = ring.vring.signal_used();
    ring.check(signalled);
    if more || !ring.serves() {
        return more;
    }
    let enabled = ring.vring.enable_kicks();
    ring.check(enabled).unwrap_or(false)
}

/// Without what it waits by, a thread can neither serve nor be stopped.
fn give_up(what: &str, error: &std::io::Error) -> ! {
    error!("{what}: {error}");
    std::process::exit(ExitCode::Host as i32);
}

/// Reads the first bytes of `segments` into `bytes`, as many as there are and as fit. `None`: they are outside of memory.
fn gather<'b>(memory: &GuestMemory, segments: &[Segment], bytes: &'b mut [u8]) -> Option<&'b mut [u8]> {
    let mut filled = 0;
    for segment in segments {
        let len = (segment.len as usize).min(bytes.len() - filled);
        memory.read(&mut bytes[filled..filled + len], segment.addr).ok()?;
        filled += len;
    }
    Some(&mut bytes[..filled])
}
