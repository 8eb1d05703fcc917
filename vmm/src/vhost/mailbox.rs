//! Notes to a session's thread. Leaving one never waits, and what a guest can leave is bounded: notes of one kind
//! replace or undo each other, config writes have a limit.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ring::Ring;
use crate::bus::Event;

/// Config writes that may wait for the daemon. A driver writes a handful and then goes on to something else.
const MAX_CONFIG_WRITES: usize = 64;

/// What a driver that set DRIVER_OK wants to run.
#[derive(Debug, Clone)]
pub struct Start {
    /// Features the driver acknowledged.
    pub features: u64,
    pub rings: Vec<Ring>,
}

impl Start {
    pub(super) fn set_call(&mut self, queue: u8, call: Option<Arc<Event>>) {
        if let Some(ring) = self.ring_mut(queue) {
            ring.call = call;
        }
    }

    pub(super) fn ring_mut(&mut self, queue: u8) -> Option<&mut Ring> {
        self.rings.iter_mut().find(|ring| ring.index == queue)
    }
}

/// A daemon that was started in place of one that ended.
#[derive(Debug)]
pub struct Successor {
    /// Our end of its socket.
    pub socket: UnixStream,
    /// Which one it is, for whoever hears of it later; the first daemon of a session is 0.
    pub serial: u32,
}

/// Bytes a driver wrote to config space.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ConfigWrite {
    pub(super) offset: u32,
    pub(super) data: Vec<u8>,
}

/// What there is to do, in the order of the fields.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) quit: bool,
    pub(super) successor: Option<Successor>,
    /// Stop the rings and reset the device.
    pub(super) stop: bool,
    /// Reset the device, whose rings do not run.
    pub(super) refresh: bool,
    pub(super) config_writes: VecDeque<ConfigWrite>,
    pub(super) start: Option<Start>,
    /// Writes made after the start was asked for: a daemon may refuse them before it knows the driver's features.
    pub(super) late_config_writes: VecDeque<ConfigWrite>,
    /// New call events, by queue.
    pub(super) calls: BTreeMap<u8, Option<Arc<Event>>>,
}

/// The way to a session's thread.
#[derive(Debug)]
pub struct Mailbox {
    notes: Mutex<Notes>,
    pub(super) ready: Event,
}

impl Mailbox {
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { notes: Mutex::default(), ready: Event::new()? }))
    }

    /// Asks for the rings to run. [`super::Observer::started`] or [`super::Observer::lost`] answers.
    pub fn start(&self, start: Start) {
        self.leave(|notes| notes.start = Some(start));
    }

    /// Asks for the rings to stop and the device to be as after power-on. [`super::Observer::stopped`] answers, by the
    /// deadline in any case. What else was asked for and not yet done is not done any more.
    pub fn stop(&self) {
        self.leave(|notes| {
            let (quit, successor) = (notes.quit, notes.successor.take());
            *notes = Notes { quit, successor, stop: true, ..Notes::default() };
        });
    }

    /// Takes back the config writes that wait, and asks for the device to be reset, because of those that do not wait any
    /// more. For a driver that resets the device before it has started it; [`super::Observer::config`] answers.
    pub fn refresh(&self) {
        self.leave(|notes| {
            notes.config_writes.clear();
            notes.refresh = true;
        });
    }

    /// Brings a daemon that was started in place of one that ended.
    pub fn reconnect(&self, successor: Successor) {
        self.leave(|notes| notes.successor = Some(successor));
    }

    /// The daemon is to signal `call` for this queue from now on.
    pub fn set_call(&self, queue: u8, call: Option<Arc<Event>>) {
        self.leave(|notes| {
            notes.calls.insert(queue, call);
        });
    }

    /// Passes a driver's write to config space on; false if too many wait already.
    pub fn write_config(&self, offset: u32, data: &[u8]) -> bool {
        let mut room = false;
        self.leave(|notes| {
            room = notes.config_writes.len() + notes.late_config_writes.len() < MAX_CONFIG_WRITES;
            let writes = match notes.start {
                None => &mut notes.config_writes,
                Some(_) => &mut notes.late_config_writes,
            };
            if room {
                writes.push_back(ConfigWrite { offset, data: data.to_vec() });
            }
        });
        room
    }

    /// Whether a driver's write to config space waits to be passed on.
    pub fn has_config_writes(&self) -> bool {
        let notes = self.lock();
        !notes.config_writes.is_empty() || !notes.late_config_writes.is_empty()
    }

    pub(super) fn quit(&self) {
        self.leave(|notes| notes.quit = true);
    }

    /// Whether a stop or the end is asked for, which goes before whatever else was.
    pub(super) fn must_stop(&self) -> bool {
        let notes = self.lock();
        notes.stop || notes.quit
    }

    pub(super) fn take(&self) -> Notes {
        self.ready.clear();
        std::mem::take(&mut *self.lock())
    }

    fn leave(&self, note: impl FnOnce(&mut Notes)) {
        note(&mut self.lock());
        self.ready.signal();
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
