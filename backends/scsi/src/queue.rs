//! One request queue's thread: takes commands off the ring, has the core look at them, the disks do them, and answers.
//!
//! ```text
//!   idle --Start--> waiting for the first kick --kick--> serving --Stop--> draining --in flight = 0--> idle
//!                                                  `--the ring is broken--> broken --Stop--> draining
//!
//!   a request:  fetched --(its unit's gate)--> looked at --I/O--> answered
//!                  |           `-- in line         |--actions-->'
//!                  `-- it is none, or has no unit -`--at once-->'
//! ```
//!
//! Invariants: the thread waits in one place, [`Engine::wait`], for the disks, the kick, the session and for orders of
//! others; a head is in flight at most once; guest memory stays mapped while anything is in flight or parked, for the
//! vring holds it until drained; an image is let go of when no unit has it and no request is on it.

mod finish;
mod image;
mod obey;
mod pieces;
mod start;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cleave_common::exit::ExitCode;
use cleave_runtime::{Chain, Command, Complaints, Inbox, Polling, RingError, Stop, Vring, Way};
use cleave_scsi::{Action, Task};
use cleave_storage::{Engine, Event, WatchId};
use tracing::{error, warn};
use vm_memory::GuestAddress;

use crate::bus::Backing;
use crate::controller::Controller;
use crate::orders::Ticket;
use crate::request::{Header, Response};
use image::Attachment;
use pieces::Pieces;

/// What a queue's thread waits for beside I/O and the kick.
#[derive(Debug, Clone, Copy)]
struct Signals {
    /// The session has a command.
    wake: WatchId,
    /// Something that waits may go on, or somebody has an order.
    nudge: WatchId,
}

/// Serves vrings of request queue `queue`, one after the other, until the device is gone.
pub(crate) fn serve(queue: u16, mut engine: Engine, inbox: &Inbox, controller: &Arc<Controller>) {
    let wake = engine.watch(inbox.wake_fd());
    let nudge = engine.watch(controller.nudges.fd(queue));
    // Whether a unit wants that is looked at when it happens.
    engine.park_when_full(true);
    let mut polling = Polling::new(controller.poll.max(GLANCE));
    while let Some(command) = inbox.next() {
        if let Command::Start(vring) = command {
            controller.mail.open(queue);
            let served = Queue::new(queue, vring, &mut engine, &mut polling, controller);
            inbox.give_back(served.run(inbox, Signals { wake, nudge }));
        }
    }
}

/// Most requests fetched before they are handed to the disks and their completions looked at, as in cleave-block.
const MAX_BATCH: usize = 8;

/// How long a thread looks for work before it sleeps, where that pays, even if nobody asked for polling.
const GLANCE: Duration = Duration::from_micros(3);

/// Bytes of memory of our own for requests' data past which no more requests are fetched.
const MAX_HELD: usize = 4 << 20;

/// A request from its fetching to its answer.
#[derive(Debug, Default)]
struct Pending {
    stage: Stage,
    header: Option<Header>,
    /// Where the whole response goes, if it is one piece.
    response_at: Option<GuestAddress>,
    /// Whose gate it has passed.
    entered: Option<Arc<Backing>>,
    /// It has been named by somebody's order, and responds with this if it can.
    ended: Option<Response>,
    /// Whoever ordered it is told when this is dropped.
    tickets: Vec<Arc<Ticket>>,
}

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Free,
    /// In line at a gate.
    InLine(Arc<Backing>),
    Io(OnDisk),
    Actions {
        task: Task,
        rest: VecDeque<Action>,
        /// Whose image is being flushed.
        attachment: Option<usize>,
    },
}

/// A request on a disk.
#[derive(Debug)]
struct OnDisk {
    task: Task,
    /// Which of [`Queue::attachments`].
    attachment: usize,
    work: Work,
    reads: bool,
    found_full: bool,
}

/// What is to be done when the engine is.
#[derive(Debug)]
enum Work {
    Answer,
    Flush,
    /// What the medium has been flushed for.
    Read {
        offset: u64,
        buffers: Vec<libc::iovec>,
    },
    Pieces(Box<Pieces>),
}

struct Queue<'e> {
    queue: u16,
    vring: Vring,
    engine: &'e mut Engine,
    polling: &'e mut Polling,
    controller: &'e Arc<Controller>,
    kick: WatchId,
    /// By head.
    pending: Vec<Pending>,
    /// Images that requests of this queue are for.
    attachments: Vec<Option<Attachment>>,
    /// Requests that are not answered.
    in_flight: usize,
    /// Bytes of memory that requests hold.
    held: usize,
    /// Requests to be fetched in the next turn.
    batch: usize,
    way: Way,
    /// The request being read.
    chain: Chain,
    buffers: Vec<libc::iovec>,
    /// The guest has been asked for kicks, or may think so.
    kicks_wanted: bool,
    stopping: bool,
    /// What cannot be completed when the queue stops is left unanswered, and not failed.
    leaving: bool,
    broken: bool,
    complaints: Complaints,
    /// Requests answered, those of earlier vrings included.
    served: u64,
}

impl<'e> Queue<'e> {
    fn new(
        queue: u16,
        vring: Vring,
        engine: &'e mut Engine,
        polling: &'e mut Polling,
        controller: &'e Arc<Controller>,
    ) -> Self {
        let kick = engine.watch(vring.kick_fd());
        let pending = (0..vring.size()).map(|_| Pending::default()).collect();
        let served = controller.counts(queue).served();
        Self {
            queue,
            vring,
            engine,
            polling,
            controller,
            kick,
            pending,
            attachments: Vec::new(),
            in_flight: 0,
            held: 0,
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
            self.controller.counts(self.queue).set(self.in_flight, self.served);
            if self.stopping && self.engine.in_flight() == 0 {
                break;
            }
            let waited = if more { self.engine.poll() } else { self.rest() };
            if let Err(error) = waited {
                give_up(&error);
            }
            let nudged = self.take_events(inbox, signals);
            if nudged {
                self.take_orders();
            }
            if nudged || self.deadline().is_some() {
                self.submit_due(nudged);
            }
            let signalled = self.vring.signal_used();
            self.check(signalled);
        }
        self.leave();
        self.engine.unwatch(self.kick);
        self.vring
    }

    /// `true`: somebody has nudged this thread.
    fn take_events(&mut self, inbox: &Inbox, signals: Signals) -> bool {
        let mut nudged = false;
        while let Some(event) = self.engine.next_event() {
            match event {
                Event::Done { tag, result } => self.complete(tag, result),
                Event::Full { tag, error } => self.found_full(tag, error),
                Event::Readable(id) if id == self.kick => self.vring.start(),
                Event::Readable(id) if id == signals.wake => {
                    if let Some(Command::Stop(stop)) = inbox.try_next() {
                        self.stop(stop);
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

    fn stop(&mut self, stop: Stop) {
        self.stopping = true;
        let remembered = self.vring.remembers_in_flight();
        self.leaving = remembered || stop == Stop::SessionOver;
        for attachment in self.attachments.iter_mut().flatten() {
            let Attachment { waiting, backing, .. } = attachment;
            waiting.end(remembered, self.leaving, &backing.admission, self.engine);
        }
    }

    /// Whether requests may be taken off the ring now.
    fn fetches(&self) -> bool {
        !self.stopping
            && !self.broken
            && self.vring.is_started()
            && self.held < MAX_HELD
            && self.engine.has_room()
    }

    /// Takes what the guest has made available. `true`: there is more, for the next turn.
    fn fetch(&mut self) -> bool {
        if !self.fetches() {
            return false;
        }
        let fetched = self.fetch_some(self.batch);
        let more = self.check(fetched).unwrap_or(false);
        self.batch = if more { (2 * self.batch).min(MAX_BATCH) } else { 1 };
        more
    }

    /// Bounded, so that a guest that never stops does not keep the thread from its commands.
    fn fetch_some(&mut self, most: usize) -> Result<bool, RingError> {
        if std::mem::take(&mut self.kicks_wanted) {
            self.vring.disable_kicks()?;
        }
        for _ in 0..most {
            match self.vring.next_head()? {
                Some(head) => {
                    self.way.fetched();
                    self.begin(head)?;
                }
                None => break,
            }
        }
        // What was answered at once; the rest of the turn may be a long sleep.
        self.vring.signal_used()?;
        self.vring.has_available()
    }

    /// Hands over what has been fetched and waits for anything to happen: first with open eyes, if that has paid lately.
    fn rest(&mut self) -> io::Result<()> {
        if let Some(limit) = self.polling.next_look() {
            self.engine.poll()?;
            // What the kernel did at once says nothing about waiting.
            if self.engine.has_events() {
                return Ok(());
            }
            let found = self.look(Instant::now() + limit)?;
            self.polling.looked(found);
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
                if self.engine.has_events() {
                    return Ok(true);
                }
            }
            // A ring that cannot be read is looked at, and found broken, by `fetch`.
            if self.fetches() && self.vring.has_available().unwrap_or(true) {
                return Ok(true);
            }
            let now = Instant::now();
            if now >= end || self.deadline().is_some_and(|deadline| deadline <= now) {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Kicks are asked for only here, when there is nothing left to see.
    fn sleep(&mut self) -> io::Result<()> {
        if self.fetches() {
            // While a disk works, it is the disk that is waited for.
            if self.engine.in_flight() == 0 && self.way.give() && self.vring.has_available().unwrap_or(true) {
                return Ok(());
            }
            self.kicks_wanted = true;
            let enabled = self.vring.enable_kicks();
            if self.check(enabled).unwrap_or(true) {
                return self.engine.poll();
            }
        }
        match self.deadline() {
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
