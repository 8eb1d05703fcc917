//! Asynchronous I/O on one image from one thread, over io_uring.
//!
//! ```text
//!   a slot:   free --submit--> in flight --short transfer: the rest again--> in flight --all moved, or an error--> free
//! ```
//!
//! Invariants: one slot a request, named by its caller's tag; a slot's buffers are not touched by anybody else until its
//! event is out; [`Engine::wait`] is the only place where the thread waits, for I/O and for watched descriptors alike.
#![expect(unsafe_code, reason = "the kernel is handed pointers into guest memory")]

mod mapped;
mod transfer;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::image::{CacheMode, Image};
use crate::qcow2::Mapped;
use mapped::Mapping;
pub use transfer::Transfer;
use transfer::{Progress, Slot};

/// Most submissions that gather before the kernel is told.
const MAX_SQ: u32 = 128;

/// Bytes of aligned memory, for transfers whose own is not, past which no more requests are wanted.
const MAX_BOUNCED: usize = 4 << 20;

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(
        "io_uring is disabled on this host: allow it with 'sysctl kernel.io_uring_disabled=0', or in the container's seccomp profile"
    )]
    Disabled,
    #[error("io_uring cannot be set up")]
    Io(#[from] io::Error),
}

/// A descriptor being watched for input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchId(u32);

/// What [`Engine::next_event`] reports.
#[derive(Debug)]
pub enum Event {
    /// The transfer or flush of `tag` is over; its buffers are the caller's again.
    Done { tag: u16, result: io::Result<()> },
    /// A watched descriptor has input, or had it meanwhile.
    Readable(WatchId),
    /// A watched descriptor is watched no more: it failed, or hung up.
    WatchLost(WatchId),
}

/// One thread's I/O on one image.
pub struct Engine {
    ring: IoUring,
    /// On an image whose bytes are where its tables say. It goes before the image does.
    mapping: Option<Mapping>,
    /// What the full submission queue had no room for, in order.
    backlog: VecDeque<squeue::Entry>,
    image: Arc<Image>,
    /// By tag, as far as any was used: most queues are much shorter than they may be.
    slots: Vec<Slot>,
    depth: u16,
    in_flight: usize,
    /// Bytes of aligned memory that requests in flight hold.
    bounced: usize,
    watches: Vec<Watch>,
    next_watch: u32,
}

struct Watch {
    id: WatchId,
    fd: i32,
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
        let ring = build_ring(u32::from(depth)).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS) => EngineError::Disabled,
            _ => EngineError::Io(error),
        })?;
        let files: Vec<_> = image.files().map(AsRawFd::as_raw_fd).collect();
        ring.submitter().register_files(&files)?;
        let port = image.mapped().map(Mapped::port).transpose()?;
        let mut engine = Self {
            ring,
            mapping: None,
            backlog: VecDeque::new(),
            image,
            slots: Vec::new(),
            depth,
            in_flight: 0,
            bounced: 0,
            watches: Vec::new(),
            next_watch: 0,
        };
        engine.mapping = port.map(|port| {
            let watch = engine.watch(port.event_fd());
            Mapping::new(port, watch)
        });
        Ok(engine)
    }

    /// Requests whose event is not out yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether another request is welcome. If not, some are in flight: wait for an event first.
    pub fn has_room(&self) -> bool {
        self.bounced < MAX_BOUNCED
    }

    /// Whether the request of `tag` is in flight. Tags at or past the depth never are.
    pub fn is_busy(&self, tag: u16) -> bool {
        self.slots.get(usize::from(tag)).is_some_and(Slot::is_busy)
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
        let align = self.alignment();
        let slot = self.free_slot(tag);
        slot.begin(transfer, buffers, align);
        self.bounced += slot.bounced();
        self.in_flight += 1;
        self.submit_slot(tag);
    }

    /// Makes all writes whose event is out durable.
    ///
    /// # Panics
    /// As [`Engine::transfer`].
    pub fn flush(&mut self, tag: u16) {
        self.free_slot(tag).begin_flush();
        self.in_flight += 1;
        self.submit_slot(tag);
    }

    /// Reports whenever `fd` has input, from now until [`Engine::unwatch`]. Reports are edges: input that is already
    /// known of is not reported again.
    pub fn watch(&mut self, fd: BorrowedFd<'_>) -> WatchId {
        let id = WatchId(self.next_watch);
        self.next_watch = self.next_watch.wrapping_add(1);
        self.watches.push(Watch { id, fd: fd.as_raw_fd() });
        self.arm(id, fd.as_raw_fd());
        id
    }

    /// No event of `id` comes out after this, and nothing refers to the descriptor's file. Call it before the descriptor is
    /// closed.
    pub fn unwatch(&mut self, id: WatchId) {
        self.watches.retain(|watch| watch.id != id);
        let cancel =
            opcode::PollRemove::new(Token::Watch(id).encode()).build().user_data(Token::Ignore.encode());
        self.push(cancel);
        // Now: the thread may sleep elsewhere next. What the ring has against it, the next wait reports.
        let _ = self.poll();
    }

    fn arm(&mut self, id: WatchId, fd: i32) {
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        self.push(poll.user_data(Token::Watch(id).encode()));
    }

    /// Submits what has gathered and lets events come that are ready, without waiting.
    pub fn poll(&mut self) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        if !self.submit_backlog()? {
            return Ok(());
        }
        let pending = self.ring.submission().len() as u32;
        // SAFETY: no argument is passed, and the entries are valid by `push`.
        match unsafe { self.ring.submitter().enter::<libc::sigset_t>(pending, 0, GETEVENTS, None) } {
            Err(error) if !is_passing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Submits what has gathered and waits for at least one event.
    ///
    /// # Errors
    /// The ring is broken; nothing can be waited for any more.
    pub fn wait(&mut self) -> io::Result<()> {
        if self.mapping.as_ref().is_some_and(|mapping| !mapping.finished.is_empty()) {
            return self.poll();
        }
        if !self.submit_backlog()? {
            return Ok(());
        }
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_passing(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// The next event that has come, without waiting.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.mapping.as_mut().and_then(Mapping::next_finished) {
                self.in_flight -= 1;
                return Some(event);
            }
            let entry = self.ring.completion().next()?;
            let event = match Token::decode(entry.user_data()) {
                Token::Slot(tag) if self.mapping.is_some() => {
                    self.completed_mapped(tag, entry.result());
                    None
                }
                Token::Slot(tag) => self.completed(tag, entry.result()),
                Token::Watch(id) => self.watched(id, &entry),
                Token::Ignore => None,
            };
            if event.is_some() {
                return event;
            }
        }
    }

    fn completed(&mut self, tag: u16, result: i32) -> Option<Event> {
        let slot = &mut self.slots[usize::from(tag)];
        let bounced = slot.bounced();
        match slot.advance(result) {
            Progress::More => {
                self.submit_slot(tag);
                None
            }
            Progress::Done(result) => {
                self.in_flight -= 1;
                self.bounced -= bounced;
                Some(Event::Done { tag, result })
            }
        }
    }

    fn watched(&mut self, id: WatchId, entry: &cqueue::Entry) -> Option<Event> {
        let fd = self.watches.iter().find(|watch| watch.id == id)?.fd;
        let result = entry.result();
        let readable = result > 0 && result & i32::from(libc::POLLIN) != 0;
        let is_news = self.mapping.as_ref().is_some_and(|mapping| mapping.watch == id);
        if is_news {
            if !cqueue::more(entry.flags()) {
                self.arm(id, fd);
            }
            self.take_news();
            return None;
        }
        if !readable {
            self.unwatch(id);
            return Some(Event::WatchLost(id));
        }
        if !cqueue::more(entry.flags()) {
            self.arm(id, fd);
        }
        Some(Event::Readable(id))
    }

    fn free_slot(&mut self, tag: u16) -> &mut Slot {
        assert!(tag < self.depth, "request {tag} is past the engine's depth of {}", self.depth);
        let at = usize::from(tag);
        if at >= self.slots.len() {
            self.slots.resize_with(at + 1, Slot::default);
        }
        let slot = &mut self.slots[at];
        assert!(!slot.is_busy(), "request {tag} is in flight");
        slot
    }

    fn submit_slot(&mut self, tag: u16) {
        let slot = &mut self.slots[usize::from(tag)];
        match &mut self.mapping {
            Some(mapping) if !slot.is_flush() => {
                let bounced = slot.bounced();
                let step = mapping.next_step(tag, slot);
                self.take_step(tag, step, bounced);
            }
            _ => {
                let entry = slot.entry().user_data(Token::Slot(tag).encode());
                self.push(entry);
            }
        }
    }

    /// Lines `entry` up for the kernel, without waiting: what keeps it from taking entries is reported by the next wait.
    fn push(&mut self, entry: squeue::Entry) {
        self.backlog.push_back(entry);
        self.fill_queue();
        if !self.backlog.is_empty() && self.ring.submit().is_ok() {
            self.fill_queue();
        }
    }

    /// Moves the backlog to the submission queue, as far as it has room.
    fn fill_queue(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: what an entry points to lives until its completion: buffers by the promise of `transfer`, iovecs
            // and aligned memory in their slot, which is not reused before.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// `false`: the kernel takes nothing before the completions that have come are taken out.
    fn submit_backlog(&mut self) -> io::Result<bool> {
        self.fill_queue();
        while !self.backlog.is_empty() {
            match self.ring.submit() {
                Ok(_) => self.fill_queue(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_passing(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// What buffers must be aligned to: address, length.
    fn alignment(&self) -> (usize, usize) {
        match self.image.cache() {
            CacheMode::None => (self.image.memory_align() as usize, self.image.logical_block() as usize),
            CacheMode::Writeback | CacheMode::Writethrough => (1, 1),
        }
    }
}

/// A signal came, the completion queue overflowed, or the kernel is short of memory: completions first.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
}

/// The kernel may still write to the slots' memory: it does not outlive the engine unfinished.
impl Drop for Engine {
    fn drop(&mut self) {
        while self.in_flight > 0 && self.wait().is_ok() {
            while self.next_event().is_some() {}
        }
    }
}

/// Completions are delivered to this thread only, when it asks: no interrupts of its work. Kernels before 6.1 do not
/// know some of it.
fn build_ring(depth: u32) -> io::Result<IoUring> {
    let entries = depth.clamp(16, MAX_SQ);
    // Every request, and the watches, may complete at once.
    let completions = (depth + 16).next_power_of_two();
    let best = IoUring::builder()
        .setup_cqsize(completions)
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_defer_taskrun()
        .dontfork()
        .build(entries);
    match best {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_cqsize(completions).dontfork().build(entries)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests;
