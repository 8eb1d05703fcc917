//! The event queue: what the driver is told without having asked (virtio 1.2, 5.6.6.3).
//!
//! ```text
//!   an event:  happens --the driver wants its kind--> waits for a buffer --> told
//!                                                `--too many wait--> missed: the next one says so
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::address::Address;
use crate::config_space::{EVENT_LEN, feature};

/// Events that wait for a buffer at most. A driver has a handful of buffers.
const MAX_WAITING: usize = 64;

/// EVENTS_MISSED, beside an event's kind.
const MISSED: u32 = 1 << 31;

/// What has happened to a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// It has come.
    Rescan,
    /// It is gone.
    Removed,
    /// A parameter has changed: the additional sense code, and its qualifier.
    Changed(u8, u8),
}

impl Event {
    /// CAPACITY DATA HAS CHANGED.
    pub(crate) const CAPACITY: Self = Self::Changed(0x2a, 0x09);
    /// NOT READY TO READY CHANGE, MEDIUM MAY HAVE CHANGED.
    pub(crate) const MEDIUM: Self = Self::Changed(0x28, 0x00);

    fn feature(self) -> u64 {
        match self {
            Self::Rescan | Self::Removed => feature::HOTPLUG,
            Self::Changed(..) => feature::CHANGE,
        }
    }

    /// The kind, and the reason.
    fn words(self) -> (u32, u32) {
        const TRANSPORT_RESET: u32 = 1;
        const PARAM_CHANGE: u32 = 3;
        match self {
            Self::Rescan => (TRANSPORT_RESET, 1),
            Self::Removed => (TRANSPORT_RESET, 2),
            Self::Changed(code, qualifier) => (PARAM_CHANGE, u32::from(code) | u32::from(qualifier) << 8),
        }
    }
}

/// Those that nobody has been told of yet.
#[derive(Debug)]
pub(crate) struct Events {
    waiting: Mutex<Waiting>,
    /// What the driver has acknowledged.
    features: AtomicU64,
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<(Event, Address)>,
    missed: bool,
}

impl Events {
    pub(crate) fn new() -> std::io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { waiting: Mutex::default(), features: AtomicU64::new(0), wake })
    }

    /// Readable when there is something to tell.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The driver wants to hear what these features are about.
    pub(crate) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    /// Those that an earlier driver was to hear.
    pub(crate) fn forget(&self) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Waiting::default();
    }

    pub(crate) fn tell(&self, event: Event, of: Address) {
        if self.features.load(Ordering::Relaxed) & event.feature() == 0 {
            return;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.events.len() < MAX_WAITING {
            waiting.events.push_back((event, of));
        } else {
            waiting.missed = true;
        }
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(crate) fn is_empty(&self) -> bool {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.events.is_empty() && !waiting.missed
    }

    /// The next one, as the driver reads it.
    pub(crate) fn take(&self) -> Option<[u8; EVENT_LEN]> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let next = waiting.events.pop_front();
        let mut bytes = [0; EVENT_LEN];
        let (mut kind, mut reason) = (0, 0);
        match next {
            Some((event, of)) => {
                (kind, reason) = event.words();
                bytes[4..12].copy_from_slice(&of.encode());
            }
            None if !waiting.missed => return None,
            None => {}
        }
        if waiting.events.is_empty() && std::mem::take(&mut waiting.missed) {
            kind |= MISSED;
        }
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[12..].copy_from_slice(&reason.to_le_bytes());
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_hears_what_it_asked_for_and_that_it_missed_some() {
        let at: Address = "2:5".parse().unwrap();
        let events = Events::new().unwrap();
        events.tell(Event::Rescan, at);
        assert_eq!(events.take(), None, "it asked for nothing");
        events.set_features(feature::HOTPLUG | feature::CHANGE);
        events.tell(Event::Removed, at);
        events.tell(Event::CAPACITY, at);
        assert_eq!(events.take(), Some([1, 0, 0, 0, 1, 2, 0, 5, 0, 0, 0, 0, 2, 0, 0, 0]));
        assert_eq!(events.take(), Some([3, 0, 0, 0, 1, 2, 0, 5, 0, 0, 0, 0, 0x2a, 9, 0, 0]));
        assert!(events.is_empty());

        (0..MAX_WAITING + 1).for_each(|_| events.tell(Event::Rescan, at));
        for _ in 1..MAX_WAITING {
            assert_eq!(events.take().map(|event| event[3]), Some(0));
        }
        assert_eq!(events.take().map(|event| event[3]), Some(0x80));
        assert_eq!(events.take(), None);
    }
}
