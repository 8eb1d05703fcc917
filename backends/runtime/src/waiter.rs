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
pub struct Ready {
    pub kick: bool,
    /// The session has a command.
    pub wake: bool,
    /// What else the device waits for may be ready.
    pub other: bool,
}

impl Ready {
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

#[derive(Debug)]
pub struct Waiter(OwnedFd);

impl Waiter {
    /// # Errors
    /// There is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// # Errors
    /// It cannot be waited for.
    pub fn watch_wake(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watch(fd, WAKE, EventFlags::IN)
    }

    /// Of several descriptors: each is reason enough for a turn.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn watch_other(&self, fd: BorrowedFd<'_>, flags: EventFlags) -> io::Result<()> {
        self.watch(fd, OTHER, flags)
    }

    /// A kick that has come already counts.
    pub fn watch_kick(&self, fd: BorrowedFd<'_>) {
        // What cannot be waited for was refused before (SET_VRING_KICK).
        if let Err(error) = self.watch(fd, KICK, EventFlags::IN) {
            tracing::warn!("the kick descriptor cannot be waited for: {error}");
        }
    }

    pub fn unwatch_kick(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.0, fd);
    }

    fn watch(&self, fd: BorrowedFd<'_>, what: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, EventData::new_u64(what), flags | EventFlags::ET)?)
    }

    /// What has happened already.
    ///
    /// # Errors
    /// Waiting does not work.
    pub fn poll(&self) -> io::Result<Ready> {
        self.take(Some(&Timespec::default()))
    }

    /// Waits until something happens.
    ///
    /// # Errors
    /// Waiting does not work.
    pub fn wait(&self) -> io::Result<Ready> {
        self.take(None)
    }

    /// Waits until something happens, or `moment` has come.
    ///
    /// # Errors
    /// Waiting does not work.
    pub fn wait_until(&self, moment: Instant) -> io::Result<Ready> {
        let left = moment.saturating_duration_since(Instant::now());
        self.take(Some(&Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })))
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
                _ => ready.other = true,
            }
        }
        Ok(ready)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn each_event_is_seen_once_though_nobody_reads_it() {
        let event = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let raise = |fd: &OwnedFd| rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
        let (wake, kick) = (event(), event());
        let waiter = Waiter::new().unwrap();
        waiter.watch_wake(wake.as_fd()).unwrap();
        raise(&kick);
        waiter.watch_kick(kick.as_fd());
        assert_eq!(waiter.wait().unwrap(), Ready { kick: true, ..Ready::default() });
        assert!(!waiter.poll().unwrap().any());
        for _ in 0..2 {
            raise(&kick);
            raise(&wake);
            assert_eq!(waiter.poll().unwrap(), Ready { kick: true, wake: true, other: false });
        }
        waiter.unwatch_kick(kick.as_fd());
        raise(&kick);
        assert!(!waiter.poll().unwrap().any());
    }
}
