//! What a queue's thread waits by: an epoll set, edge-triggered, so that nobody has to read what tells of events.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

const KICK: u64 = 1;
const WAKE: u64 = 2;
const OTHER: u64 = 3;

/// What has happened since the last look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) kick: bool,
    /// The session has a command.
    pub(crate) wake: bool,
}

#[derive(Debug)]
pub(crate) struct Waiter(OwnedFd);

impl Waiter {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    pub(crate) fn watch_wake(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watch(fd, WAKE)
    }

    /// Something that is reason enough for a turn.
    pub(crate) fn watch_other(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watch(fd, OTHER)
    }

    /// A kick that has come already counts.
    pub(crate) fn watch_kick(&self, fd: BorrowedFd<'_>) {
        // What cannot be waited for was refused before (SET_VRING_KICK).
        if let Err(error) = self.watch(fd, KICK) {
            tracing::warn!("the kick descriptor cannot be waited for: {error}");
        }
    }

    pub(crate) fn unwatch_kick(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.0, fd);
    }

    fn watch(&self, fd: BorrowedFd<'_>, what: u64) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, EventData::new_u64(what), EventFlags::IN | EventFlags::ET)?)
    }

    /// What has happened already.
    pub(crate) fn poll(&self) -> io::Result<Ready> {
        self.take(Some(&Timespec::default()))
    }

    /// Waits until something happens, or it is time.
    pub(crate) fn wait(&self, until: Option<Instant>) -> io::Result<Ready> {
        let left = until.map(|at| at.saturating_duration_since(Instant::now()));
        self.take(left.and_then(|left| Timespec::try_from(left).ok()).as_ref())
    }

    fn take(&self, timeout: Option<&Timespec>) -> io::Result<Ready> {
        let mut room = [MaybeUninit::<Event>::uninit(); 4];
        let (events, _) = match epoll::wait(&self.0, &mut room, timeout) {
            Err(Errno::INTR) => return Ok(Ready::default()),
            taken => taken?,
        };
        let mut ready = Ready::default();
        for event in events {
            match event.data.u64() {
                KICK => ready.kick = true,
                WAKE => ready.wake = true,
                _ => {}
            }
        }
        Ok(ready)
    }
}
