//! The session thread's part in losing a daemon and having it back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::protocol;

use super::SessionError;
use super::connect::{Greeting, Negotiated};
use super::lost::{Lost, News, Wanted};
use super::mailbox::Successor;
use super::running::Active;
use super::session::{Running, Session, Worker};
use super::wire::Wire;

/// A daemon that lived this long is connected to at once when it is lost; one that did not may be ending each time.
const LIVED: Duration = Duration::from_secs(1);

impl Worker {
    /// The daemon is lost, and its successor is to run what is `wanted`.
    pub(super) fn lose(&mut self, connection: Negotiated, wanted: Wanted, reason: &SessionError) -> Session {
        let pause = if self.connected.elapsed() < LIVED { self.pause } else { Duration::ZERO };
        let wire = still_writes(connection, &wanted, reason);
        let is_gone = wire.is_none();
        self.observe(|observer| observer.lost(self.serial, reason));
        let mut lost = Lost::new(Arc::clone(&self.peer), self.serial, wanted, wire, pause);
        let news = if is_gone { lost.take_stock(&self.memory) } else { News::None };
        self.hear(lost, news)
    }

    /// Whoever brings a successor knows that the daemon has ended, perhaps before we do.
    pub(super) fn bring(&mut self, session: Session, successor: Successor) -> Session {
        let mut session = match session {
            lost @ Session::Lost(_) => lost,
            connected => self.settle(connected, Err(SessionError::HungUp)),
        };
        if let Session::Lost(lost) = &mut session {
            lost.bring(successor);
        }
        session
    }

    pub(super) fn look_for_a_successor(&mut self, mut lost: Lost) -> Session {
        let news = lost.advance(&self.memory);
        if lost.take_due_stop() {
            self.observe(|observer| observer.stopped());
        }
        self.hear(lost, news)
    }

    fn hear(&mut self, mut lost: Lost, news: News) -> Session {
        match news {
            News::None => {}
            News::Answers(greeting) => return self.readmit(lost, greeting),
            News::AttemptFailed(error) => self.tell_failure(&mut lost, &error),
            News::NeedsReset(reason) => self.observe(|observer| observer.needs_reset(reason)),
        }
        Session::Lost(lost)
    }

    fn tell_failure(&self, lost: &mut Lost, error: &SessionError) {
        if lost.is_new(error) {
            self.observe(|observer| observer.attempt_failed(lost.serial, error));
        }
    }

    /// Lost -> Negotiated or Running, if the daemon that answers will do.
    fn readmit(&mut self, mut lost: Lost, greeting: Greeting) -> Session {
        let shaken = greeting.go_on(&self.peer);
        let fit = shaken.and_then(|connection| connection.offer.replaces(&self.first).map(|()| connection));
        let mut connection = match fit {
            Ok(connection) => connection,
            Err(error) => return self.hear(lost, News::AttemptFailed(error)),
        };
        let mut active = self.take_wanted(&mut lost, connection.wire.has(protocol::INFLIGHT_SHMFD));
        let resumes = active.as_ref().is_some_and(|active| active.begun);
        let replayed = active.as_ref().map_or(0, |active| active.count_in_flight(&self.memory));
        match self.replay(&mut connection, active.as_mut()) {
            Ok(config) => {
                self.connected = Instant::now();
                self.pause = lost.pause();
                self.serial = lost.serial;
                self.observe(|observer| {
                    observer.config(&config);
                    observer.reconnected(lost.since.elapsed(), replayed);
                    if active.is_some() && !resumes {
                        observer.started();
                    }
                });
                match active {
                    Some(active) => Session::Running(Running::new(connection, active)),
                    None => Session::Negotiated(connection),
                }
            }
            Err(error) => {
                lost.wanted = active.map_or(Wanted::Nothing, Wanted::from_active);
                let wire = still_writes(connection, &lost.wanted, &error);
                let is_gone = wire.is_none();
                lost.leave(wire);
                self.tell_failure(&mut lost, &error);
                let news = if is_gone { lost.take_stock(&self.memory) } else { News::None };
                self.hear(lost, news)
            }
        }
    }

    fn take_wanted(&self, lost: &mut Lost, keeps_record: bool) -> Option<Active> {
        let wanted = std::mem::replace(&mut lost.wanted, Wanted::Nothing);
        match wanted.into_active(keeps_record, &self.memory) {
            Ok(active) => active,
            Err(reason) => {
                self.observe(|observer| observer.needs_reset(reason));
                None
            }
        }
    }

    /// Gives a successor what the driver wrote and what it is to run; what its config space is then.
    fn replay(
        &mut self,
        connection: &mut Negotiated,
        active: Option<&mut Active>,
    ) -> Result<Vec<u8>, SessionError> {
        match active {
            Some(active) => {
                connection.start(&self.memory, active, &mut self.written, self.first.num_queues)?;
            }
            // What it refuses without knowing the features is repeated at the start.
            None => {
                let limit = connection.limit();
                self.written
                    .writes()
                    .iter()
                    .try_for_each(|write| connection.write_config(write, limit).map(drop))?;
            }
        }
        let config = match self.written.is_empty() {
            true => None,
            false => connection.config(connection.limit())?,
        };
        Ok(config.unwrap_or_else(|| connection.offer.config.clone()))
    }
}

/// The connection to a daemon that had rings and has not closed it: it may still write to guest memory.
fn still_writes(connection: Negotiated, wanted: &Wanted, reason: &SessionError) -> Option<Wire> {
    (matches!(wanted, Wanted::Resume(..)) && !reason.is_hang_up()).then_some(connection.wire)
}
