//! One queue's thread: takes requests off the ring, puts them on the disk's, and back.
//!
//! ```text
//!   idle --Start--> waiting for the first kick --kick--> serving --Stop--> draining --in flight = 0--> idle
//!                                                  `--the ring is broken--> broken --Stop--> draining
//!
//!   a turn:   fetch a few -> submit -> rest, if there is nothing more to fetch -> complete -> submit what is due
//!   rest:     look for work (polling) -> give way -> ask for kicks -> sleep in the engine
//! ```
//!
//! Invariants: the thread waits in one place, [`Engine::wait`], for the disk, the kick and the session at once; a head is
//! in flight at most once; guest memory stays mapped while anything is in flight or parked, for the vring holds it until
//! drained; what waits for room on a full disk does not hold up a stop.

mod look;
mod requests;

use std::io;
use std::time::{Duration, Instant};

use cleave_common::exit::ExitCode;
use cleave_runtime::{Chain, Command, Complaints, Inbox, RingError, Stop, Vring, Way};
use cleave_storage::{Engine, Event, Waiting, WatchId};
use tracing::{error, warn};

use crate::disk::{Disk, OnFull};
use look::Looks;
use requests::Pending;

/// What a queue's thread waits for beside I/O and the kick.
#[derive(Debug, Clone, Copy)]
struct Signals {
    /// The session has a command.
    wake: WatchId,
    /// Something that waits may go on.
    nudge: WatchId,
}

/// Serves vrings of queue `index`, one after the other, until the device is gone.
pub(crate) fn serve(index: u16, mut engine: Engine, inbox: &Inbox, disk: &Disk) {
    let wake = engine.watch(inbox.wake_fd());
    let mut looks = Looks::new(disk.poll.max(GLANCE));
    let nudge = engine.watch(disk.admission.nudges().fd(index));
    while let Some(command) = inbox.next() {
        if let Command::Start(vring) = command {
            engine.park_when_full(disk.on_full == OnFull::Pause);
            let vring = Queue::new(vring, &mut engine, &mut looks, disk).run(inbox, Signals { wake, nudge });
            inbox.give_back(vring);
        }
    }
}

/// Most requests fetched before they are handed to the disk and its completions looked at. A disk gets its first request
/// alone and at once; the batches double while the guest has more. So the disk works on the first ones while the next
/// are prepared, and the guest on the first completions.
const MAX_BATCH: usize = 8;

/// How long a thread looks for work before it sleeps, where that pays, even if nobody asked for polling: about as long as
/// falling asleep, being kicked and waking up keep the processors busy.
const GLANCE: Duration = Duration::from_micros(3);

struct Queue<'e> {
    vring: Vring,
    engine: &'e mut Engine,
    looks: &'e mut Looks,
    disk: &'e Disk,
    kick: WatchId,
    /// By head.
    pending: Vec<Pending>,
    waiting: Waiting,
    /// Requests to be fetched in the next turn.
    batch: usize,
    way: Way,
    /// The request being read.
    chain: Chain,
    buffers: Vec<libc::iovec>,
    /// The guest has been asked for kicks, or may think so.
    kicks_wanted: bool,
    stopping: bool,
    /// What finds no room when the queue stops is left unanswered, and not failed.
    leaving: bool,
    broken: bool,
    complaints: Complaints,
    /// Requests answered, those of earlier vrings included.
    served: u64,
}

impl<'e> Queue<'e> {
    fn new(vring: Vring, engine: &'e mut Engine, looks: &'e mut Looks, disk: &'e Disk) -> Self {
        let kick = engine.watch(vring.kick_fd());
        let pending = vec![Pending::default(); usize::from(vring.size())];
        let waiting = Waiting::new(vring.index().0);
        let served = disk.counts(vring.index().0).served();
        Self {
            vring,
            engine,
            looks,
            disk,
            kick,
            pending,
            waiting,
            batch: 1,
            way: Way::default(),
            chain: Chain::default(),
            buffers: Vec::new(),
            kicks_wanted: true,
            stopping: false,
            leaving: false,
            broken: false,
            complaints: Complaints::default(),
            served,
        }
    }

    fn run(mut self, inbox: &Inbox, signals: Signals) -> Vring {
        loop {
            let more = self.fetch();
            self.disk.counts(self.vring.index().0).set(
                self.engine.in_flight(),
                self.waiting.len(),
                self.served,
            );
            if self.stopping && self.engine.in_flight() == 0 {
                break;
            }
            let waited = if more { self.engine.poll() } else { self.rest() };
            if let Err(error) = waited {
                give_up(&error);
            }
            // Before the answers: a guest that takes one up has its next request seen without a kick.
            self.spare_kicks();
            let nudged = self.take_events(inbox, signals);
            if nudged || self.waiting.deadline().is_some() {
                self.waiting.submit_due(Instant::now(), nudged, &self.disk.admission, self.engine);
            }
            let signalled = self.vring.signal_used();
            self.check(signalled);
        }
        self.leave_ring();
        self.vring
    }

    /// Whoever serves the ring next finds it as a thread that sleeps has it.
    fn leave_ring(&mut self) {
        self.engine.unwatch(self.kick);
        if self.vring.is_started() && !self.broken && !self.kicks_wanted {
            let enabled = self.vring.enable_kicks();
            self.check(enabled);
        }
    }

    fn spare_kicks(&mut self) {
        if self.fetches() && std::mem::take(&mut self.kicks_wanted) {
            let spared = self.vring.disable_kicks();
            self.check(spared);
        }
    }

    /// `true`: what waits may go on.
    fn take_events(&mut self, inbox: &Inbox, signals: Signals) -> bool {
        let mut nudged = false;
        while let Some(event) = self.engine.next_event() {
            match event {
                Event::Done { tag, result } => {
                    self.looks.answered();
                    self.complete(tag, result);
                }
                Event::Full { tag, error } => self.found_full(tag, error),
                Event::Readable(id) if id == self.kick => self.vring.start(),
                Event::Readable(id) if id == signals.wake => {
                    if let Some(Command::Stop(stop)) = inbox.try_next() {
                        self.stopping = true;
                        let remembered = self.vring.remembers_in_flight();
                        self.leaving = remembered || stop == Stop::SessionOver;
                        self.waiting.end(remembered, self.leaving, &self.disk.admission, self.engine);
                    }
                }
                Event::Readable(id) if id == signals.nudge => nudged = true,
                Event::WatchLost(id) if id == self.kick => {
                    warn!(
                        "{}: the kick descriptor failed; no request is fetched any more",
                        self.vring.index()
                    );
                }
                Event::Readable(_) | Event::WatchLost(_) => {}
            }
        }
        nudged
    }

    /// Whether requests may be taken off the ring now.
    fn fetches(&self) -> bool {
        !self.stopping && !self.broken && self.vring.is_started() && self.engine.has_room()
    }

    /// Takes what the guest has made available. `true`: there is more, for the next turn.
    fn fetch(&mut self) -> bool {
        if !self.fetches() {
            return false;
        }
        self.spare_kicks();
        let fetched = self.fetch_some();
        self.check(fetched).unwrap_or(false)
    }

    /// Bounded, so that a guest that never stops does not keep the thread from its commands.
    fn fetch_some(&mut self) -> Result<bool, RingError> {
        for _ in 0..self.batch {
            match self.vring.next_head()? {
                Some(head) => {
                    self.way.fetched();
                    self.looks.fetched();
                    self.begin(head)?;
                }
                None => break,
            }
        }
        // What was answered at once; the rest of the turn may be a long sleep.
        self.vring.signal_used()?;
        let more = self.vring.has_available()?;
        self.batch = if more { (2 * self.batch).min(MAX_BATCH) } else { 1 };
        Ok(more)
    }

    /// Hands over what has been fetched and waits for anything to happen: first with open eyes, if that has paid lately.
    fn rest(&mut self) -> io::Result<()> {
        if let Some(limit) = self.looks.next_look() {
            self.engine.poll()?;
            // What the kernel did at once says nothing about waiting.
            if self.engine.has_events() {
                return Ok(());
            }
            let found = self.look(Instant::now() + limit)?;
            self.looks.looked(found);
            if found {
                return Ok(());
            }
        }
        self.sleep()
    }

    /// Looks for work until `end`. `true`: there is some.
    fn look(&mut self, end: Instant) -> io::Result<bool> {
        loop {
            if self.engine.has_news() {
                self.engine.poll()?;
                // News may be of no event yet: then the look goes on, and has its end.
                if self.engine.has_events() {
                    return Ok(true);
                }
            }
            // A ring that cannot be read is looked at, and found broken, by `fetch`.
            if self.fetches() && self.vring.has_available().unwrap_or(true) {
                return Ok(true);
            }
            let now = Instant::now();
            if now >= end || self.waiting.deadline().is_some_and(|deadline| deadline <= now) {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Kicks are asked for only here, when there is nothing left to see.
    fn sleep(&mut self) -> io::Result<()> {
        if self.fetches() {
            // While the disk works, it is the disk that is waited for.
            if self.engine.in_flight() == 0 && self.way.give() && self.vring.has_available().unwrap_or(true) {
                return Ok(());
            }
            self.kicks_wanted = true;
            let enabled = self.vring.enable_kicks();
            if self.check(enabled).unwrap_or(true) {
                return self.engine.poll();
            }
        }
        match self.waiting.deadline() {
            None => self.engine.wait(),
            Some(deadline) => self.engine.wait_for(deadline.saturating_duration_since(Instant::now())),
        }
    }

    /// A broken ring is left alone until it is set up again; what is in flight still completes.
    fn check<T>(&mut self, outcome: Result<T, RingError>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                if !std::mem::replace(&mut self.broken, true) {
                    warn!("{} is broken until it is set up again: {error}", self.vring.index());
                    self.vring.signal_broken();
                }
                None
            }
        }
    }

    fn complain(&mut self, what: &dyn std::fmt::Display) {
        self.complaints.add(self.vring.index(), what);
    }
}

/// Without its ring the thread can neither finish what is in flight nor be stopped.
fn give_up(error: &io::Error) -> ! {
    error!("io_uring failed: {error}");
    std::process::exit(ExitCode::Host as i32);
}
