//! The session's thread.
//!
//! ```text
//!                  start                    any error, deadline, hang-up
//!   Negotiated ───────────> Running ───┐         ┌──────────────────> Lost, see `lost`
//!       ^  ^ └─────────────────────────┼─────────┘                     │ │
//!       │  └────────── stop ───────────┘                               │ │
//!       └── nothing is wanted ── a daemon is readmitted ───────────────┘ └─> Running, with what was wanted
//! ```
//!
//! Invariants: each state owns what it needs and a transition consumes it; every stop is answered by exactly one
//! `stopped`; once lost, no more is read from that daemon nor written to it; a daemon is readmitted only if it
//! has all that the guest has seen of the first one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::SessionError;
use super::backend::Told;
use super::connect::{Negotiated, Offer, Patience, Peer};
use super::lost::{CannotResume, Lost, Wanted};
use super::mailbox::{ConfigWrite, Mailbox, Notes, Start};
use super::memory::MemoryTable;
use super::running::{Active, Written};
use super::watch::{Gait, Watch};
use super::wire::Limit;
use crate::bus::Event;
use crate::sandbox;

/// Stack of a session's thread in bytes: it calls nothing deep, and there may be 31 of them.
const STACK: usize = 128 << 10;

/// Who hears what became of the notes in a mailbox. Called on the session's thread; must not wait.
pub trait Observer: Send + Sync {
    /// The daemon has the rings that were asked for.
    fn started(&self);
    /// The rings are stopped, or the daemon is lost: either way it is told nothing more of them.
    fn stopped(&self);
    /// Config space as the daemon has it: after a write, a reset, a change of its own, or a reconnect.
    fn config(&self, config: &[u8]);
    /// The daemon of this [`super::Successor::serial`] is gone, hangs or makes no sense. Said once, until another is there.
    fn lost(&self, serial: u32, reason: &SessionError);
    /// A daemon is back `after` this long, and what ran runs again, with so many requests submitted again.
    fn reconnected(&self, after: Duration, replayed: u64);
    /// Whoever is there instead of the lost daemon will not do; or nobody is.
    fn attempt_failed(&self, serial: u32, reason: &SessionError);
    /// What ran cannot be resumed: only a reset by the driver helps.
    fn needs_reset(&self, reason: CannotResume);
}

/// The thread, which dropping this tells to end: it closes the daemon's socket, by the deadline of what it is just
/// doing. Nobody waits for it.
#[derive(Debug)]
pub struct SessionThread(Arc<Mailbox>);

impl Negotiated {
    /// Hands the connection to a thread that works off `mailbox`.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn spawn(
        self,
        mailbox: Arc<Mailbox>,
        memory: Arc<MemoryTable>,
        observer: Weak<dyn Observer>,
    ) -> io::Result<SessionThread> {
        let worker = Worker {
            mailbox: Arc::clone(&mailbox),
            memory,
            observer,
            peer: Arc::clone(&self.peer),
            first: self.offer.clone(),
            written: Written::default(),
            serial: 0,
            connected: Instant::now(),
            pause: Duration::ZERO,
        };
        let name = self.peer.device.clone();
        thread::Builder::new().name(name).stack_size(STACK).spawn(move || {
            sandbox::confine_thread(sandbox::Thread::Session);
            worker.run(self);
        })?;
        Ok(SessionThread(mailbox))
    }
}

impl Drop for SessionThread {
    fn drop(&mut self) {
        self.0.quit();
    }
}

/// A connection whose rings run.
pub(super) struct Running {
    session: Negotiated,
    active: Active,
    watch: Watch,
}

pub(super) enum Session {
    Negotiated(Negotiated),
    Running(Running),
    Lost(Lost),
}

pub(super) struct Worker {
    mailbox: Arc<Mailbox>,
    pub(super) memory: Arc<MemoryTable>,
    observer: Weak<dyn Observer>,
    pub(super) peer: Arc<Peer>,
    /// What the first daemon offered, and the guest has seen.
    pub(super) first: Offer,
    pub(super) written: Written,
    /// Of the daemon that is there, or was last.
    pub(super) serial: u32,
    /// When it came.
    pub(super) connected: Instant,
    /// Before the next attempt to reach a daemon that keeps ending.
    pub(super) pause: Duration,
}

impl Worker {
    fn run(mut self, session: Negotiated) {
        let mut session = Session::Negotiated(session);
        loop {
            self.wait(&session);
            session = self.look(session);
            let notes = self.mailbox.take();
            if notes.quit {
                return;
            }
            session = self.work(session, notes);
        }
    }

    /// Sleeps until there is a note, the daemon does something it was not asked for, or it is time to look.
    fn wait(&self, session: &Session) {
        let mut fds = vec![PollFd::new(&self.mailbox.ready, PollFlags::IN)];
        let mut add = |fd, flags| fds.push(PollFd::from_borrowed_fd(fd, flags));
        if let Some(connection) = session.connection_ref() {
            add(connection.wire.as_fd(), PollFlags::IN);
            if let Some(channel) = connection.backend.as_ref().and_then(|backend| backend.interest()) {
                add(channel, PollFlags::IN);
            }
        }
        if let Session::Lost(lost) = session
            && let Some((fd, flags)) = lost.interest()
        {
            add(fd, flags);
        }
        let timeout = session.wakes_at().map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        // A signal or a failure only means one look too many.
        let _ = poll(&mut fds, timeout.as_ref());
    }

    /// What the daemon does of itself, or fails to do.
    fn look(&mut self, mut session: Session) -> Session {
        if let Session::Lost(lost) = session {
            return self.look_for_a_successor(lost);
        }
        let result = session.connection().map_or(Ok(()), |connection| self.look_at(connection));
        let result = match (result, &mut session) {
            (Ok(()), Session::Running(running)) => running.look(&self.memory),
            (result, _) => result,
        };
        self.settle(session, result)
    }

    fn look_at(&self, connection: &mut Negotiated) -> Result<(), SessionError> {
        connection.wire.check_idle()?;
        let Some(backend) = &mut connection.backend else { return Ok(()) };
        match backend.serve(&self.peer.device) {
            Told::Nothing => Ok(()),
            Told::ConfigChanged => self.read_config(connection),
        }
    }

    fn read_config(&self, connection: &mut Negotiated) -> Result<(), SessionError> {
        if let Some(config) = connection.config(connection.limit())? {
            self.observe(|observer| observer.config(&config));
        }
        Ok(())
    }

    /// Works the notes off. Once a newer note asks for a stop or the end, what is left of these is void.
    fn work(&mut self, mut session: Session, notes: Notes) -> Session {
        let Notes { quit: _, successor, stop, refresh, config_writes, start, late_config_writes, calls } =
            notes;
        if let Some(successor) = successor {
            session = self.bring(session, successor);
        }
        if stop {
            session = self.stop(session);
        }
        if refresh {
            session = self.reset(session);
        }
        session = self.write_config(session, config_writes);
        if let Some(start) = start.filter(|_| !self.mailbox.must_stop()) {
            session = self.start(session, start);
        }
        session = self.write_config(session, late_config_writes);
        for (queue, call) in calls {
            if self.mailbox.must_stop() {
                break;
            }
            session = self.set_call(session, queue, call);
        }
        session
    }

    fn start(&mut self, session: Session, start: Start) -> Session {
        match session {
            Session::Negotiated(mut connection) => {
                let mut active = Active::new(start);
                let result = connection
                    .start(&self.memory, &mut active, &mut self.written, self.first.num_queues)
                    .and_then(|()| match self.written.is_empty() {
                        true => Ok(()),
                        false => self.read_config(&mut connection),
                    });
                match result {
                    Ok(()) => {
                        self.observe(|observer| observer.started());
                        Session::Running(Running::new(connection, active))
                    }
                    Err(error) => self.lose(connection, Wanted::from_active(active), &error),
                }
            }
            Session::Lost(mut lost) => {
                lost.wanted = Wanted::Fresh(start);
                Session::Lost(lost)
            }
            // The transport starts a session once between two stops.
            running @ Session::Running(_) => running,
        }
    }

    /// Answers by `stopped`, at once or as soon as a daemon that hangs is certainly gone.
    fn stop(&mut self, session: Session) -> Session {
        let mut session = match session {
            Session::Running(Running { session: mut connection, active, .. }) => {
                let limit = connection.limit();
                match connection.stop(&active.start.rings, limit) {
                    Ok(()) => self.reset_within(connection, limit),
                    // Until it has hung up it may still write, although nothing is wanted of it any more.
                    Err(error) => self.lose(connection, Wanted::from_active(active), &error),
                }
            }
            idle => self.reset(idle),
        };
        let now = match &mut session {
            Session::Lost(lost) => lost.stop(),
            _ => true,
        };
        self.written.forget();
        if now {
            self.observe(|observer| observer.stopped());
        }
        session
    }

    fn reset(&mut self, session: Session) -> Session {
        self.written.forget();
        match session {
            Session::Negotiated(connection) => {
                let limit = connection.limit();
                self.reset_within(connection, limit)
            }
            other => other,
        }
    }

    /// A reset undoes what the driver wrote to config space, which it may read as soon as the reset is complete.
    fn reset_within(&mut self, mut connection: Negotiated, limit: Limit) -> Session {
        let result = connection.reset(limit).and_then(|()| connection.config(limit));
        match result {
            Ok(config) => {
                if let Some(config) = config {
                    self.observe(|observer| observer.config(&config));
                }
                Session::Negotiated(connection)
            }
            Err(error) => self.lose(connection, Wanted::Nothing, &error),
        }
    }

    /// All of the writes have one deadline: a guest decides how many there are. What they have come to is read behind the
    /// last one: before that config space is not what the driver takes it for.
    fn write_config(&mut self, mut session: Session, writes: VecDeque<ConfigWrite>) -> Session {
        let limit = session.connection().map(|connection| connection.limit());
        let mut writes = writes.into_iter().peekable();
        while let Some(write) = writes.next() {
            if self.mailbox.must_stop() {
                break;
            }
            let runs = matches!(session, Session::Running(_));
            let (Some(connection), Some(limit)) = (session.connection(), limit) else {
                self.written.note(write);
                continue;
            };
            let accepted = connection.write_config(&write, limit);
            // One that is refused before the start is for the start to repeat; one whose daemon is lost over it, for its
            // successor.
            if !runs || !matches!(accepted, Ok(false)) {
                self.written.note(write);
            }
            let is_last = writes.peek().is_none();
            let result = accepted.and_then(|_| if is_last { connection.config(limit) } else { Ok(None) });
            let result = result.map(|config| {
                if let Some(config) = config {
                    self.observe(|observer| observer.config(&config));
                }
            });
            session = self.settle(session, result);
        }
        session
    }

    fn set_call(&mut self, mut session: Session, queue: u8, call: Option<Arc<Event>>) -> Session {
        let result = match &mut session {
            Session::Running(Running { session, active, .. }) => {
                active.start.set_call(queue, call);
                let ring = active.start.ring_mut(queue).map(|ring| ring.clone());
                ring.map_or(Ok(()), |ring| session.give_call(&ring, session.limit()))
            }
            Session::Lost(lost) => {
                lost.wanted.set_call(queue, call);
                Ok(())
            }
            Session::Negotiated(_) => Ok(()),
        };
        self.settle(session, result)
    }

    pub(super) fn settle(&mut self, session: Session, result: Result<(), SessionError>) -> Session {
        let Err(error) = result else { return session };
        match session {
            Session::Negotiated(connection) => self.lose(connection, Wanted::Nothing, &error),
            Session::Running(Running { session, active, .. }) => {
                self.lose(session, Wanted::from_active(active), &error)
            }
            lost @ Session::Lost(_) => lost,
        }
    }

    pub(super) fn observe(&self, tell: impl FnOnce(&dyn Observer)) {
        if let Some(observer) = self.observer.upgrade() {
            tell(observer.as_ref());
        }
    }
}

impl Running {
    pub(super) fn new(session: Negotiated, active: Active) -> Self {
        let Patience { look, io, .. } = session.peer.patience;
        let watch = Watch::new(look, io);
        Self { session, active, watch }
    }

    /// Now and then: whether the daemon still gets on.
    fn look(&mut self, memory: &MemoryTable) -> Result<(), SessionError> {
        if !self.watch.is_due() {
            return Ok(());
        }
        match self.watch.look(Instant::now(), self.active.indices(memory)) {
            Gait::Moves => Ok(()),
            Gait::StandsStill => self.session.are_you_there(),
            Gait::Stuck { ring, still } => {
                let queue = self.active.start.rings.get(ring).map_or(ring, |ring| ring.index.into());
                Err(SessionError::CompletesNothing { queue, still })
            }
        }
    }
}

impl Session {
    fn connection_ref(&self) -> Option<&Negotiated> {
        match self {
            Self::Negotiated(session) | Self::Running(Running { session, .. }) => Some(session),
            Self::Lost(_) => None,
        }
    }

    fn connection(&mut self) -> Option<&mut Negotiated> {
        match self {
            Self::Negotiated(session) | Self::Running(Running { session, .. }) => Some(session),
            Self::Lost(_) => None,
        }
    }

    /// When to look again at the latest.
    fn wakes_at(&self) -> Option<Instant> {
        let rest = self.connection_ref().and_then(|connection| connection.backend.as_ref()?.wakes_at());
        let state = match self {
            Self::Negotiated(_) => None,
            Self::Running(running) => Some(running.watch.next()),
            Self::Lost(lost) => lost.wakes_at(),
        };
        [rest, state].into_iter().flatten().min()
    }
}
