//! Asynchronous I/O on images from one thread, over io_uring.
//!
//! ```text
//!   a slot:   free --begin--> parked --submit--> in flight --short transfer: the rest again--> in flight
//!              ^                ^                    |   `--all done, or an error--> free
//!              `----abandon-----+----no room for it--'
//! ```
//!
//! An engine has one image from its start ([`Engine::new`]), or any number that come and go ([`Engine::attach`],
//! [`Engine::detach`]); a request is for the image that was selected when it began ([`Engine::select`]).
//!
//! Invariants: one slot a request, named by its caller's tag; a slot's buffers are not touched by anybody else until its
//! event is out or it is abandoned; [`Engine::wait`] is the only place where the thread waits, for I/O and for watched
//! descriptors alike.
#![expect(unsafe_code, reason = "the kernel is handed pointers into guest memory")]

mod disks;
mod mapped;
mod range;
mod ring;
mod transfer;
mod watch;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::image::Image;
pub use disks::DiskId;
use disks::{Disk, disk_of};
use range::Zeroes;
pub use range::{Range, RangeOp};
use ring::Ring;
pub use transfer::Transfer;
use transfer::{Progress, Slot};
pub use watch::WatchId;
use watch::Watches;

/// Bytes of aligned memory, for transfers whose own is not, past which no more requests are wanted.
const MAX_BOUNCED: usize = 4 << 20;

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(
        "io_uring is disabled on this host: allow it with 'sysctl kernel.io_uring_disabled=0', or in the container's seccomp profile"
    )]
    Disabled,
    #[error(
        "io_uring may lock no more memory: raise 'ulimit -l' (LimitMEMLOCK= under systemd), or use fewer or shorter queues"
    )]
    Memory(#[source] io::Error),
    #[error("io_uring cannot be set up")]
    Io(#[from] io::Error),
}

/// What [`Engine::next_event`] reports.
#[derive(Debug)]
pub enum Event {
    /// The request of `tag` is over; its buffers are the caller's again.
    Done { tag: u16, result: io::Result<()> },
    /// There is no room on the disk for the request of `tag`, or for the rest of it: it is parked. Only after
    /// [`Engine::park_when_full`].
    Full { tag: u16, error: io::Error },
    /// A watched descriptor has input, or had it meanwhile.
    Readable(WatchId),
    /// A watched descriptor is watched no more: it failed, or hung up.
    WatchLost(WatchId),
}

/// One thread's I/O on its images.
pub struct Engine {
    ring: Ring,
    /// By their numbers.
    disks: Vec<Option<Disk>>,
    selected: DiskId,
    /// By tag, as far as any was used: most queues are much shorter than they may be.
    slots: Vec<Slot>,
    depth: u16,
    /// Not those that are parked.
    in_flight: usize,
    /// Bytes of aligned memory that requests hold.
    bounced: usize,
    park_when_full: bool,
    zeroes: Zeroes,
    watches: Watches,
    /// Requests on mapped images that are over, with the bytes of aligned memory they held.
    finished: Vec<(u16, usize, Progress)>,
}

/// `user_data`: a request's tag, a watch, or something whose completion nobody waits for.
enum Token {
    Slot(u16),
    Watch(WatchId),
    Ignore,
}

impl Token {
    const WATCH: u64 = 1 << 32;
    const IGNORE: u64 = 2 << 32;

    fn encode(self) -> u64 {
        match self {
            Self::Slot(tag) => u64::from(tag),
            Self::Watch(WatchId(id)) => Self::WATCH | u64::from(id),
            Self::Ignore => Self::IGNORE,
        }
    }

    fn decode(word: u64) -> Self {
        match word & !0xffff_ffff {
            0 => Self::Slot(word as u16),
            Self::WATCH => Self::Watch(WatchId(word as u32)),
            _ => Self::Ignore,
        }
    }
}

impl Engine {
    /// Sets up I/O on `image` with up to `depth` requests at once. Call it on the thread that will use it.
    pub fn new(image: Arc<Image>, depth: u16) -> Result<Self, EngineError> {
        let mut engine = Self::without_image(depth)?;
        engine.attach(image)?;
        Ok(engine)
    }

    /// As [`Engine::new`], for images that are attached later.
    pub fn without_image(depth: u16) -> Result<Self, EngineError> {
        let ring = Ring::new(depth).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS) => EngineError::Disabled,
            Some(libc::ENOMEM) => EngineError::Memory(error),
            _ => EngineError::Io(error),
        })?;
        Ok(Self {
            ring,
            disks: Vec::new(),
            selected: DiskId::FIRST,
            slots: Vec::new(),
            depth,
            in_flight: 0,
            bounced: 0,
            park_when_full: false,
            zeroes: Zeroes::default(),
            watches: Watches::default(),
            finished: Vec::new(),
        })
    }

    /// Requests that have been submitted and whose event is not out yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether another request is welcome. If not, some are in flight or parked: wait for an event first.
    pub fn has_room(&self) -> bool {
        self.bounced < MAX_BOUNCED
    }

    /// Whether the request of `tag` is in flight or parked. Tags at or past the depth never are.
    pub fn is_busy(&self, tag: u16) -> bool {
        self.slots.get(usize::from(tag)).is_some_and(Slot::is_busy)
    }

    /// From now on a request that finds the disk full is parked instead of failing, if `park`.
    pub fn park_when_full(&mut self, park: bool) {
        self.park_when_full = park;
    }

    /// Starts moving bytes between the image at `transfer.offset` and `buffers`.
    ///
    /// # Panics
    /// When `tag` is busy, or not below the depth.
    ///
    /// # Safety
    /// The memory of `buffers` stays mapped until the event of `tag`; it may be shared with others that read and write it.
    pub unsafe fn transfer(
        &mut self,
        tag: u16,
        transfer: Transfer,
        buffers: impl IntoIterator<Item = libc::iovec>,
    ) {
        // SAFETY: by our caller's promise.
        unsafe { self.park_transfer(tag, transfer, buffers) };
        self.submit(tag);
    }

    /// As [`Engine::transfer`], but parked: nothing happens before [`Engine::submit`].
    ///
    /// # Panics
    /// As [`Engine::transfer`].
    ///
    /// # Safety
    /// The memory of `buffers` stays mapped until the event of `tag`, or until it is abandoned.
    pub unsafe fn park_transfer(
        &mut self,
        tag: u16,
        transfer: Transfer,
        buffers: impl IntoIterator<Item = libc::iovec>,
    ) {
        let align = self.alignment();
        let slot = self.free_slot(tag);
        slot.begin(transfer, buffers, align);
        self.bounced += slot.bounced();
    }

    /// Makes all writes whose event is out durable.
    ///
    /// # Panics
    /// As [`Engine::transfer`].
    pub fn flush(&mut self, tag: u16) {
        self.free_slot(tag).begin_flush();
        self.submit(tag);
    }

    /// Prepares `op` on all `ranges`, parked. One that ends early, with an error, may have been done to some.
    ///
    /// # Panics
    /// As [`Engine::transfer`].
    pub fn park_ranges(&mut self, tag: u16, op: RangeOp, ranges: Vec<Range>) {
        self.free_slot(tag).begin_ranges(op, ranges);
    }

    /// Starts the parked request of `tag`, or goes on with it.
    ///
    /// # Panics
    /// When it is not parked.
    pub fn submit(&mut self, tag: u16) {
        self.parked_slot(tag).set_parked(false);
        self.in_flight += 1;
        self.submit_slot(tag);
    }

    /// Forgets the parked request of `tag`; it has no event.
    ///
    /// # Panics
    /// As [`Engine::submit`].
    pub fn abandon(&mut self, tag: u16) {
        let slot = self.parked_slot(tag);
        let bounced = slot.bounced();
        slot.free();
        self.bounced -= bounced;
    }

    /// Reports whenever `fd` has input, from now until [`Engine::unwatch`]. Reports are edges: input that is already
    /// known of is not reported again.
    pub fn watch(&mut self, fd: BorrowedFd<'_>) -> WatchId {
        self.watches.add(&mut self.ring, fd)
    }

    /// No event of `id` comes out after this, and nothing refers to the descriptor's file. Call it before the descriptor is
    /// closed.
    pub fn unwatch(&mut self, id: WatchId) {
        self.watches.remove(&mut self.ring, id);
    }

    /// Submits what has gathered and lets events come that are ready, without waiting.
    pub fn poll(&mut self) -> io::Result<()> {
        self.ring.poll()
    }

    /// Whether [`Engine::poll`] would do anything: cheap enough to ask all the time.
    pub fn has_news(&mut self) -> bool {
        self.has_finished() || self.ring.has_news()
    }

    /// Whether something has come that [`Engine::next_event`] looks at.
    pub fn has_events(&mut self) -> bool {
        self.has_finished() || self.ring.has_completions()
    }

    /// Submits what has gathered and waits for at least one event.
    ///
    /// # Errors
    /// The ring is broken; nothing can be waited for any more.
    pub fn wait(&mut self) -> io::Result<()> {
        if self.has_finished() { self.poll() } else { self.ring.wait(None) }
    }

    /// As [`Engine::wait`], but at most for `timeout`.
    ///
    /// # Errors
    /// As [`Engine::wait`].
    pub fn wait_for(&mut self, timeout: Duration) -> io::Result<()> {
        if self.has_finished() { self.poll() } else { self.ring.wait(Some(timeout)) }
    }

    /// The next event that has come, without waiting.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            if let Some((tag, bounced, progress)) = self.finished.pop() {
                return self.settle(tag, bounced, progress);
            }
            let entry = self.ring.next_completion()?;
            let event = match Token::decode(entry.user_data()) {
                Token::Slot(tag) => self.completed(tag, entry.result()),
                Token::Watch(id) => match self.watches.event(&mut self.ring, id, &entry) {
                    Some(Event::Readable(id)) => match self.port_of(id) {
                        Some(disk) => {
                            self.take_news(disk);
                            None
                        }
                        None => Some(Event::Readable(id)),
                    },
                    event => event,
                },
                Token::Ignore => None,
            };
            if event.is_some() {
                return event;
            }
        }
    }

    fn completed(&mut self, tag: u16, result: i32) -> Option<Event> {
        let slot = &mut self.slots[usize::from(tag)];
        let disk = disk_of(&mut self.disks, slot);
        if disk.mapping.is_some() {
            self.completed_mapped(tag, result);
            return None;
        }
        let bounced = slot.bounced();
        let progress = slot.advance(result, &mut disk.support);
        self.settle(tag, bounced, progress)
    }

    /// `bounced`: bytes of aligned memory that the request held.
    fn settle(&mut self, tag: u16, bounced: usize, progress: Progress) -> Option<Event> {
        let slot = &mut self.slots[usize::from(tag)];
        match progress {
            Progress::More => {
                self.submit_slot(tag);
                None
            }
            Progress::Full(error) if self.park_when_full => {
                slot.set_parked(true);
                self.in_flight -= 1;
                Some(Event::Full { tag, error })
            }
            Progress::Full(error) => {
                slot.free();
                Some(self.done(tag, bounced, Err(error)))
            }
            Progress::Done(result) => Some(self.done(tag, bounced, result)),
        }
    }

    fn done(&mut self, tag: u16, bounced: usize, result: io::Result<()>) -> Event {
        self.in_flight -= 1;
        self.bounced -= bounced;
        Event::Done { tag, result }
    }

    fn free_slot(&mut self, tag: u16) -> &mut Slot {
        assert!(tag < self.depth, "request {tag} is past the engine's depth of {}", self.depth);
        let at = usize::from(tag);
        if at >= self.slots.len() {
            self.slots.resize_with(at + 1, Slot::default);
        }
        let slot = &mut self.slots[at];
        assert!(!slot.is_busy(), "request {tag} is in flight");
        slot.aim(self.selected);
        slot
    }

    fn parked_slot(&mut self, tag: u16) -> &mut Slot {
        let slot = self.slots.get_mut(usize::from(tag)).filter(|slot| slot.is_parked());
        slot.unwrap_or_else(|| panic!("request {tag} is not parked"))
    }

    fn submit_slot(&mut self, tag: u16) {
        let slot = &mut self.slots[usize::from(tag)];
        let disk = disk_of(&mut self.disks, slot);
        if disk.mapping.is_some() {
            return self.submit_mapped(tag);
        }
        let entry = slot.entry(&disk.support, &mut self.zeroes).user_data(Token::Slot(tag).encode());
        // SAFETY: what the entry points to lives until its completion: buffers by the promise of `transfer`, iovecs and
        // aligned memory in their slot, which is not reused before; zeroes as long as the engine.
        unsafe { self.ring.push(entry) };
    }
}

/// The kernel may still write to the slots' memory: it does not outlive the engine unfinished.
impl Drop for Engine {
    fn drop(&mut self) {
        while self.in_flight > 0 && self.wait().is_ok() {
            while self.next_event().is_some() {}
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
