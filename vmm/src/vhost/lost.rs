//! A session without its daemon, and its way back.
//!
//! ```text
//!          the daemon may still write           it has hung up          connected
//!   loss ──────────────────────────────> Hung ────────────────> Away ────────────> Greeting ──────> readmitted
//!     └───────────────── it has hung up ─────────────────────────^ ^                   │
//!                                                                  └── pause, up to 1 s ┘ no answer, not fit
//! ```
//!
//! Away, a daemon that someone else runs is connected to again and again; one of ours is awaited in the mailbox.
//!
//! Invariants: no successor gets the rings while the daemon before may still write to them; what is wanted to run is
//! kept, changed by starts and stops, until a daemon has it; nothing here waits but on what the thread polls.
//!
//! A socket that hangs up says that its process has no mapping of guest memory any more, or has let go of the session.
//! It does not say that the disk is done: direct I/O that the dead process had submitted can still be on its way in the
//! kernel. `cleave-block` has a lock on its image through the very file description that such I/O keeps open, and its
//! successor waits for that lock, so it has no writable image before the last of it is over. A read, too, is such I/O: it
//! writes guest memory. The lock on a read-only image is shared, and keeps no successor out; there it waits only while the
//! image has a lock whose owner cannot be seen.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::virtio;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::SessionError;
use super::connect::{Greeting, Peer, open};
use super::mailbox::{Start, Successor};
use super::memory::MemoryTable;
use super::ring::Indices;
use super::running::Active;
use super::wire::Wire;
use crate::bus::Event;

/// Pauses between two attempts to reach a daemon that someone else runs.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why a daemon that kept no record of what was in flight leaves nothing to go on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CannotResume {
    #[error(
        "{0} requests were with the daemon, which keeps no record of them (INFLIGHT_SHMFD) and does not complete them in order (IN_ORDER)"
    )]
    Outstanding(u64),
    #[error(
        "the daemon went on using its rings after it was lost, and keeps no record of it (INFLIGHT_SHMFD)"
    )]
    Moved,
}

/// By ring; `None` where guest memory could not be read.
type Left = Vec<Option<Indices>>;

/// The rule where there is no record: the used ring says what is done if it is filled in order, or if nothing was
/// outstanding. Anything else would be guessing, and a wrong guess completes a request twice.
fn can_resume(features: u64, left: &[Option<Indices>], now: &[Option<Indices>]) -> Result<(), CannotResume> {
    if features & virtio::IN_ORDER != 0 {
        return Ok(());
    }
    let outstanding = |indices: &Option<Indices>| indices.map_or(1, |indices| indices.outstanding().into());
    let sum: u64 = left.iter().map(outstanding).sum();
    let used = |indices: &Option<Indices>| indices.map(|indices| indices.used);
    match sum {
        0 if left.iter().map(used).eq(now.iter().map(used)) => Ok(()),
        0 => Err(CannotResume::Moved),
        outstanding => Err(CannotResume::Outstanding(outstanding)),
    }
}

/// What a successor is to run.
#[derive(Debug)]
pub(super) enum Wanted {
    Nothing,
    Fresh(Start),
    /// With the rings as the last daemon left them; they are looked at when it is certain that it is done.
    Resume(Active, Left),
}

impl Wanted {
    pub(super) fn from_active(active: Active) -> Self {
        if active.begun { Self::Resume(active, Left::new()) } else { Self::Fresh(active.start) }
    }

    pub(super) fn set_call(&mut self, queue: u8, call: Option<Arc<Event>>) {
        match self {
            Self::Nothing => {}
            Self::Fresh(start) => start.set_call(queue, call),
            Self::Resume(active, _) => active.start.set_call(queue, call),
        }
    }

    /// What to start on a daemon that keeps a record or not; `None` if nothing is wanted.
    pub(super) fn into_active(
        self,
        keeps_record: bool,
        memory: &MemoryTable,
    ) -> Result<Option<Active>, CannotResume> {
        match self {
            Self::Nothing => Ok(None),
            Self::Fresh(start) => Ok(Some(Active::new(start))),
            Self::Resume(active, _) if active.inflight.is_some() && keeps_record => Ok(Some(active)),
            Self::Resume(active, left) => {
                can_resume(active.start.features, &left, &active.indices(memory))?;
                Ok(Some(Active { inflight: None, ..active }))
            }
        }
    }
}

#[derive(Debug)]
enum Phase {
    /// It has not hung up: it may be writing still.
    Hung(Wire),
    /// Until the next attempt, or until a socket is brought.
    Away(Option<Instant>),
    Greeting(Greeting),
}

/// What waiting has brought.
#[derive(Debug)]
pub(super) enum News {
    None,
    /// A daemon answers; it is to be readmitted.
    Answers(Greeting),
    AttemptFailed(SessionError),
    /// What was wanted cannot be resumed and is not wanted any more.
    NeedsReset(CannotResume),
}

#[derive(Debug)]
pub(super) struct Lost {
    pub(super) since: Instant,
    pub(super) wanted: Wanted,
    peer: Arc<Peer>,
    phase: Phase,
    /// Before the next attempt.
    pause: Duration,
    brought: Option<Successor>,
    /// Of the daemon that was lost, or that is being talked to: see [`Successor::serial`].
    pub(super) serial: u32,
    /// Why the last attempt failed.
    failure: String,
    /// A stop that is answered once the daemon has hung up, or at this time.
    stop_due: Option<Instant>,
}

impl Lost {
    /// After a daemon that may still be writing, with `wire` to it, or after one that certainly is not.
    pub(super) fn new(
        peer: Arc<Peer>,
        serial: u32,
        wanted: Wanted,
        wire: Option<Wire>,
        pause: Duration,
    ) -> Self {
        let since = Instant::now();
        let mut lost = Self {
            since,
            wanted,
            peer,
            phase: Phase::Away(None),
            pause,
            brought: None,
            serial,
            failure: String::new(),
            stop_due: None,
        };
        lost.leave(wire);
        lost
    }

    /// As [`Lost::new`], in the middle of being lost.
    pub(super) fn leave(&mut self, wire: Option<Wire>) {
        match wire {
            Some(wire) => {
                // A good daemon ends the session at this; one that hangs will, if it ever wakes.
                wire.fall_silent();
                self.phase = Phase::Hung(wire);
            }
            None => self.go_away(),
        }
    }

    fn go_away(&mut self) {
        let next = self.peer.path.is_some().then(|| Instant::now() + self.pause);
        self.phase = Phase::Away(next);
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
    }

    pub(super) fn pause(&self) -> Duration {
        self.pause
    }

    /// Whether this is to be told: always of a socket that was brought, once of a path that is tried without end.
    pub(super) fn is_new(&mut self, failure: &SessionError) -> bool {
        let failure = failure.to_string();
        let is_new = self.peer.path.is_none() || self.failure != failure;
        self.failure = failure;
        is_new
    }

    /// What to poll.
    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.phase {
            // A hang-up is always told.
            Phase::Hung(wire) => Some((wire.as_fd(), PollFlags::empty())),
            Phase::Away(_) => None,
            Phase::Greeting(greeting) => Some((greeting.as_fd(), PollFlags::IN)),
        }
    }

    /// When to look again at the latest.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        let phase = match &self.phase {
            Phase::Hung(_) => None,
            Phase::Away(next) => *next,
            Phase::Greeting(greeting) => Some(greeting.end()),
        };
        let brought = self.brought.as_ref().map(|_| self.since);
        [phase, brought, self.stop_due].into_iter().flatten().min()
    }

    /// Takes a daemon that was started since. Whoever was there before has ended.
    pub(super) fn bring(&mut self, successor: Successor) {
        self.brought = Some(successor);
    }

    /// Does what is due.
    pub(super) fn advance(&mut self, memory: &MemoryTable) -> News {
        let hung_up = match self.interest() {
            Some((fd, flags)) => is_ready(fd, flags),
            None => false,
        };
        let brought = self.brought.is_some();
        match &self.phase {
            Phase::Hung(_) if hung_up || brought => {
                self.go_away();
                self.take_stock(memory)
            }
            Phase::Hung(_) => News::None,
            _ if brought => self.greet(),
            Phase::Away(Some(next)) if Instant::now() >= *next => self.greet(),
            Phase::Away(_) => News::None,
            Phase::Greeting(greeting) if hung_up || Instant::now() >= greeting.end() => self.hear(hung_up),
            Phase::Greeting(_) => News::None,
        }
    }

    /// To be called once, as soon as nobody writes to the rings any more.
    pub(super) fn take_stock(&mut self, memory: &MemoryTable) -> News {
        let Wanted::Resume(active, left) = &mut self.wanted else { return News::None };
        *left = active.indices(memory);
        // Requests that it completed without having said so: nobody else will.
        active.start.rings.iter().filter_map(|ring| ring.call.as_ref()).for_each(|call| call.signal());
        if active.inflight.is_some() {
            return News::None;
        }
        match can_resume(active.start.features, left, left) {
            Ok(()) => News::None,
            Err(reason) => {
                self.wanted = Wanted::Nothing;
                News::NeedsReset(reason)
            }
        }
    }

    fn greet(&mut self) -> News {
        let patience = self.peer.patience;
        let greeting = match (self.brought.take(), &self.peer.path) {
            (Some(Successor { socket, serial }), _) => {
                self.serial = serial;
                Greeting::send(socket, patience.first_answer)
            }
            (None, Some(path)) => open(path).and_then(|socket| Greeting::send(socket, patience.deadline)),
            (None, None) => return News::None,
        };
        match greeting {
            Ok(greeting) => {
                self.phase = Phase::Greeting(greeting);
                News::None
            }
            Err(error) => {
                self.go_away();
                News::AttemptFailed(error)
            }
        }
    }

    fn hear(&mut self, in_time: bool) -> News {
        let Phase::Greeting(greeting) = std::mem::replace(&mut self.phase, Phase::Away(None)) else {
            return News::None;
        };
        // Until it is readmitted, which changes this.
        self.go_away();
        if in_time { News::Answers(greeting) } else { News::AttemptFailed(greeting.too_late()) }
    }

    /// What the driver has asked for does not matter any more. Whether the stop can be answered at once: a daemon of
    /// ours that hangs is being killed, which is soon over.
    pub(super) fn stop(&mut self) -> bool {
        self.wanted = Wanted::Nothing;
        let wait = matches!(self.phase, Phase::Hung(_)) && self.peer.path.is_none();
        self.stop_due = wait.then(|| Instant::now() + self.peer.patience.deadline);
        !wait
    }

    /// Whether a stop that had to wait is to be answered now.
    pub(super) fn take_due_stop(&mut self) -> bool {
        let over = !matches!(self.phase, Phase::Hung(_));
        self.stop_due.take_if(|due| over || Instant::now() >= *due).is_some()
    }
}

fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_record_only_certainty_resumes() {
        let at = |rings: &[(u16, u16)]| -> Left {
            rings.iter().map(|&(available, used)| Some(Indices { available, used })).collect()
        };
        let idle = at(&[(7, 7), (0xffff, 0xffff)]);
        assert_eq!(can_resume(0, &idle, &idle), Ok(()));
        assert_eq!(can_resume(0, &idle, &at(&[(9, 7), (0, 0xffff)])), Ok(()), "the guest may go on");
        assert_eq!(can_resume(0, &idle, &at(&[(9, 8), (0, 0xffff)])), Err(CannotResume::Moved));
        let busy = at(&[(7, 7), (1, 0xfffe)]);
        assert_eq!(can_resume(0, &busy, &busy), Err(CannotResume::Outstanding(3)));
        assert_eq!(can_resume(virtio::IN_ORDER, &busy, &busy), Ok(()));
        assert!(can_resume(0, &[None], &[None]).is_err());
    }
}
