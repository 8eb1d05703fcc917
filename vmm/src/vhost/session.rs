//! The session's thread.
//!
//! ```text
//!                  start                      any error, deadline, hang-up
//!   Negotiated ───────────> Running ───┐         ┌──────────────> Lost
//!       ^  └───────────────────────────┼─────────┘                 │
//!       └────────── stop ──────────────┘                           └─ answers stops at once, until quit
//! ```
//!
//! Invariants: each state owns what it needs and a transition consumes it; every stop is answered by exactly one
//! `stopped`; once lost, no more is read from the daemon nor written to it, and its socket is closed.
//!
//! A later reconnect is one more arrow, from Lost back to Negotiated: what it replays (features, rings) is in
//! [`Start`], which Lost will then keep.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{Config, FrontendRequest, VringAddr, VringFd, VringState};
use rustix::event::{PollFd, PollFlags, poll};

use super::SessionError;
use super::connect::{Negotiated, get_config};
use super::mailbox::{ConfigWrite, Mailbox, Notes, Start};
use super::memory::MemoryTable;
use super::ring::Ring;
use super::wire::{Limit, Wire};
use crate::bus::Event;
use crate::sandbox;

/// Stack of a session's thread in bytes: it calls nothing deep, and there may be 31 of them.
const STACK: usize = 128 << 10;

/// Who hears what became of the notes in a mailbox. Called on the session's thread; must not wait.
pub trait Observer: Send + Sync {
    /// The daemon has the rings.
    fn started(&self);
    /// The rings are stopped, or the daemon is lost: either way it is told nothing more of them.
    fn stopped(&self);
    /// Config space as the daemon has it after a write.
    fn config(&self, config: &[u8]);
    /// The daemon is gone, hangs or makes no sense. Said once.
    fn lost(&self, reason: &SessionError);
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
        let worker = Worker { mailbox: Arc::clone(&mailbox), memory, observer };
        let name = self.device.clone();
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
struct Running {
    session: Negotiated,
    rings: Vec<Ring>,
}

enum Session {
    Negotiated(Negotiated),
    Running(Running),
    Lost,
}

struct Worker {
    mailbox: Arc<Mailbox>,
    memory: Arc<MemoryTable>,
    observer: Weak<dyn Observer>,
}

impl Worker {
    fn run(self, session: Negotiated) {
        let mut session = Session::Negotiated(session);
        loop {
            self.wait(&session);
            session = self.checked(session);
            let notes = self.mailbox.take();
            if notes.quit {
                return;
            }
            session = self.work(session, notes);
        }
    }

    /// Sleeps until there is a note, or the daemon does something it was not asked for.
    fn wait(&self, session: &Session) {
        let ready = PollFd::new(&self.mailbox.ready, PollFlags::IN);
        // A signal or a failure only means one look too many.
        let _ = match session.wire() {
            Some(wire) => poll(&mut [ready, PollFd::from_borrowed_fd(wire.as_fd(), PollFlags::IN)], None),
            None => poll(&mut [ready], None),
        };
    }

    fn checked(&self, mut session: Session) -> Session {
        match session.connection().map_or(Ok(()), |connection| connection.wire.check_idle()) {
            Ok(()) => session,
            Err(error) => self.lose(&error),
        }
    }

    /// Works the notes off. Once a newer note asks for a stop or the end, what is left of these is void.
    fn work(&self, mut session: Session, notes: Notes) -> Session {
        let Notes { quit: _, stop, config_writes, start, late_config_writes, calls } = notes;
        if stop {
            session = self.settle(session.stop());
            self.observe(|observer| observer.stopped());
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
            let result = session.set_call(queue, call);
            session = self.settle(result);
        }
        session
    }

    fn start(&self, session: Session, start: Start) -> Session {
        match session {
            Session::Negotiated(session) => match session.start(&self.memory, start) {
                Ok(running) => {
                    self.observe(|observer| observer.started());
                    Session::Running(running)
                }
                Err(error) => self.lose(&error),
            },
            // The transport starts a session once between two stops; a lost one has nobody to tell.
            other => other,
        }
    }

    /// All of the writes have one deadline: a guest decides how many there are.
    fn write_config(&self, mut session: Session, writes: VecDeque<ConfigWrite>) -> Session {
        let Some(limit) = session.connection().map(|connection| Limit::new(connection.deadline)) else {
            return session;
        };
        for write in writes {
            if self.mailbox.must_stop() {
                break;
            }
            let Some(connection) = session.connection() else { break };
            match connection.write_config(write, limit) {
                Ok(None) => {}
                Ok(Some(config)) => self.observe(|observer| observer.config(&config)),
                Err(error) => session = self.lose(&error),
            }
        }
        session
    }

    fn settle(&self, result: Result<Session, SessionError>) -> Session {
        result.unwrap_or_else(|error| self.lose(&error))
    }

    fn lose(&self, reason: &SessionError) -> Session {
        self.observe(|observer| observer.lost(reason));
        Session::Lost
    }

    fn observe(&self, tell: impl FnOnce(&dyn Observer)) {
        if let Some(observer) = self.observer.upgrade() {
            tell(observer.as_ref());
        }
    }
}

impl Session {
    fn wire(&self) -> Option<&Wire> {
        match self {
            Self::Negotiated(session) => Some(&session.wire),
            Self::Running(running) => Some(&running.session.wire),
            Self::Lost => None,
        }
    }

    fn connection(&mut self) -> Option<&mut Negotiated> {
        match self {
            Self::Negotiated(session) => Some(session),
            Self::Running(running) => Some(&mut running.session),
            Self::Lost => None,
        }
    }

    fn stop(self) -> Result<Self, SessionError> {
        match self {
            Self::Negotiated(mut session) => {
                session.reset(Limit::new(session.deadline))?;
                Ok(Self::Negotiated(session))
            }
            Self::Running(running) => running.stop().map(Self::Negotiated),
            Self::Lost => Ok(Self::Lost),
        }
    }

    fn set_call(mut self, queue: u8, call: Option<Arc<Event>>) -> Result<Self, SessionError> {
        if let Self::Running(running) = &mut self {
            running.set_call(queue, call)?;
        }
        Ok(self)
    }
}

impl Negotiated {
    fn start(mut self, memory: &MemoryTable, start: Start) -> Result<Running, SessionError> {
        let limit = Limit::new(self.deadline);
        let protocol_features = if self.rings_start_disabled { virtio::PROTOCOL_FEATURES } else { 0 };
        let features = start.features | protocol_features;
        self.wire.tell(FrontendRequest::SetFeatures, &features, &[], limit)?;
        let files: Vec<_> = memory.regions().iter().map(|region| region.file.as_fd()).collect();
        self.wire.tell(FrontendRequest::SetMemTable, &memory.payload(), &files, limit)?;
        for ring in &start.rings {
            self.start_ring(ring, limit)?;
        }
        // A kick that the daemon takes from a ring which is not enabled yet is lost: unless it has acknowledged the last
        // request, an answer to another one says that it has got so far.
        if !self.wire.has(protocol::REPLY_ACK) {
            self.wire.ask::<u64>(FrontendRequest::GetFeatures, &(), limit)?;
        }
        // What the driver added before the daemon had the ring, or before the kick was its ioeventfd.
        for ring in &start.rings {
            ring.kick.signal();
        }
        Ok(Running { session: self, rings: start.rings })
    }

    fn start_ring(&mut self, ring: &Ring, limit: Limit) -> Result<(), SessionError> {
        let index = u32::from(ring.index);
        let state = |num| VringState { index, num };
        let addresses = VringAddr {
            index,
            flags: 0,
            descriptor: ring.addresses.descriptor,
            used: ring.addresses.used,
            available: ring.addresses.available,
            log: 0,
        };
        self.wire.tell(FrontendRequest::SetVringNum, &state(u32::from(ring.size)), &[], limit)?;
        self.wire.tell(FrontendRequest::SetVringBase, &state(0), &[], limit)?;
        self.wire.tell(FrontendRequest::SetVringAddr, &addresses, &[], limit)?;
        // The kick comes last: a daemon may start the ring with it.
        self.give_call(ring, limit)?;
        let kick = VringFd { index: ring.index, no_fd: false };
        self.wire.tell(FrontendRequest::SetVringKick, &kick, &[ring.kick.as_fd()], limit)?;
        if self.rings_start_disabled {
            self.wire.tell(FrontendRequest::SetVringEnable, &state(1), &[], limit)?;
        }
        Ok(())
    }

    fn give_call(&mut self, ring: &Ring, limit: Limit) -> Result<(), SessionError> {
        let call = VringFd { index: ring.index, no_fd: ring.call.is_none() };
        let fds: Vec<_> = ring.call.iter().map(|event| event.as_fd()).collect();
        self.wire.tell(FrontendRequest::SetVringCall, &call, &fds, limit)
    }

    fn reset(&mut self, limit: Limit) -> Result<(), SessionError> {
        if !self.wire.has(protocol::RESET_DEVICE) {
            return Ok(());
        }
        self.wire.tell(FrontendRequest::ResetDevice, &(), &[], limit)
    }

    /// Passes a write on and reads what became of it; `None` if the daemon has no config space or refused the write.
    fn write_config(&mut self, write: ConfigWrite, limit: Limit) -> Result<Option<Vec<u8>>, SessionError> {
        if !self.wire.has(protocol::CONFIG) {
            return Ok(None);
        }
        let ConfigWrite { offset, data } = write;
        let payload = Config { offset, flags: 0, data };
        match self.wire.tell(FrontendRequest::SetConfig, &payload, &[], limit) {
            Err(SessionError::Refused { code, .. }) => {
                tracing::debug!("device {}: config write at {offset} refused ({code})", self.device);
            }
            result => result?,
        }
        let len = self.offer().config.len();
        let config = get_config(&mut self.wire, len, limit)?;
        Ok((!config.is_empty()).then_some(config))
    }
}

impl Running {
    /// A ring stops at GET_VRING_BASE, whose answer says that nothing of it is in flight any more.
    fn stop(self) -> Result<Negotiated, SessionError> {
        let Self { mut session, rings } = self;
        let limit = Limit::new(session.deadline);
        for ring in &rings {
            let state = VringState { index: u32::from(ring.index), num: 0 };
            let base: VringState = session.wire.ask(FrontendRequest::GetVringBase, &state, limit)?;
            tracing::trace!("device {}: queue {} stopped at {}", session.device, ring.index, base.num);
            if session.rings_start_disabled {
                session.wire.tell(FrontendRequest::SetVringEnable, &state, &[], limit)?;
            }
        }
        session.reset(limit)?;
        Ok(session)
    }

    fn set_call(&mut self, queue: u8, call: Option<Arc<Event>>) -> Result<(), SessionError> {
        let Some(ring) = self.rings.iter_mut().find(|ring| ring.index == queue) else { return Ok(()) };
        ring.call = call;
        let ring = ring.clone();
        self.session.give_call(&ring, Limit::new(self.session.deadline))
    }
}
