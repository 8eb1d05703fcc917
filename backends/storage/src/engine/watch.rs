//! Descriptors that are waited for beside the I/O.
#![expect(unsafe_code, reason = "entries of the kernel's queue")]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{cqueue, opcode, types};

use super::ring::Ring;
use super::{Event, Token};

/// A descriptor being watched for input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchId(pub(super) u32);

#[derive(Default)]
pub(super) struct Watches {
    watches: Vec<(WatchId, RawFd)>,
    next: u32,
}

impl Watches {
    pub(super) fn add(&mut self, ring: &mut Ring, fd: BorrowedFd<'_>) -> WatchId {
        let id = WatchId(self.next);
        self.next = self.next.wrapping_add(1);
        self.watches.push((id, fd.as_raw_fd()));
        arm(ring, id, fd.as_raw_fd());
        id
    }

    pub(super) fn remove(&mut self, ring: &mut Ring, id: WatchId) {
        self.watches.retain(|(watch, _)| *watch != id);
        let cancel = opcode::PollRemove::new(Token::Watch(id).encode()).build();
        // SAFETY: the entry points to nothing.
        unsafe { ring.push(cancel.user_data(Token::Ignore.encode())) };
        // Now: the thread may sleep elsewhere next. What the ring has against it, the next wait reports.
        let _ = ring.poll();
    }

    pub(super) fn event(&mut self, ring: &mut Ring, id: WatchId, entry: &cqueue::Entry) -> Option<Event> {
        let (_, fd) = *self.watches.iter().find(|(watch, _)| *watch == id)?;
        let result = entry.result();
        let readable = result > 0 && result & i32::from(libc::POLLIN) != 0;
        if !readable {
            self.remove(ring, id);
            return Some(Event::WatchLost(id));
        }
        if !cqueue::more(entry.flags()) {
            arm(ring, id, fd);
        }
        Some(Event::Readable(id))
    }
}

fn arm(ring: &mut Ring, id: WatchId, fd: RawFd) {
    let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
    // SAFETY: the entry points to nothing.
    unsafe { ring.push(poll.user_data(Token::Watch(id).encode())) };
}
