//! What others want of a request queue's thread: that tasks end, that one starts, that it looks again.
//!
//! ```text
//!   closed --the thread serves a vring--> open --its vring goes--> closed
//! ```
//!
//! Invariants: an order is posted to an open mailbox only, and taken before it closes; a [`Ticket`] is called in when the
//! last task that it is for has been answered, or was not there.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cleave_scsi::{Nexus, TaskManagement, TaskName};
use cleave_storage::Nudges;

use crate::address::Address;
use crate::request::Response;

/// Which tasks.
#[derive(Debug, Clone)]
pub(crate) enum Which {
    /// Those that a function names.
    Named { function: TaskManagement, from: Nexus, at: Address },
    /// Those of some nexuses on one unit, but for the one that asks: its queue and head.
    Of { nexuses: Vec<Nexus>, at: Address, but: (u16, u16) },
    /// All of one unit.
    All(Address),
}

impl Which {
    /// Whether the task of `name`, of the request `head` of `queue`, is meant.
    pub(crate) fn means(&self, name: &TaskName, target: u8, (queue, head): (u16, u16)) -> bool {
        match self {
            // A nexus is one of a target: its functions do not reach others.
            Self::Named { function, from, at } => target == at.target && function.names(*from, at.lun, name),
            Self::Of { nexuses, at, but } => {
                (target, name.lun) == (at.target, at.lun)
                    && nexuses.contains(&name.nexus)
                    && (queue, head) != *but
            }
            Self::All(at) => (target, name.lun) == (at.target, at.lun),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Order {
    /// Tasks end, and respond with this; or are only counted (`None`).
    End { which: Which, response: Option<Response>, ticket: Arc<Ticket> },
    /// The tasks that the one of this head wanted ended have ended.
    Proceed(u16),
    /// The task of this head is first in its unit's line: it runs.
    Run(u16),
    /// An image, a limit or a size has changed.
    Look,
}

/// Held by each task that an order is about, until it has been answered. Then its maker is called, with their number.
pub(crate) struct Ticket {
    named: AtomicUsize,
    call: Box<dyn Fn(usize) + Send + Sync>,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("named", &self.named).finish_non_exhaustive()
    }
}

impl Ticket {
    pub(crate) fn new(call: impl Fn(usize) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { named: AtomicUsize::new(0), call: Box::new(call) })
    }

    /// One more task is meant.
    pub(crate) fn names_one(&self) {
        self.named.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        (self.call)(self.named.load(Ordering::Relaxed));
    }
}

/// By request queue.
#[derive(Debug)]
pub(crate) struct Mailboxes {
    boxes: Vec<Mutex<Mailbox>>,
    nudges: Arc<Nudges>,
}

#[derive(Debug, Default)]
struct Mailbox {
    open: bool,
    orders: Vec<Order>,
}

impl Mailboxes {
    pub(crate) fn new(queues: u16, nudges: Arc<Nudges>) -> Self {
        Self { boxes: (0..queues).map(|_| Mutex::default()).collect(), nudges }
    }

    fn lock(&self, queue: u16) -> MutexGuard<'_, Mailbox> {
        self.boxes[usize::from(queue)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `false`: nobody serves that queue.
    pub(crate) fn post(&self, queue: u16, order: Order) -> bool {
        let mut mailbox = self.lock(queue);
        if mailbox.open {
            mailbox.orders.push(order);
            self.nudges.nudge(queue);
        }
        mailbox.open
    }

    pub(crate) fn post_all(&self, order: impl Fn() -> Order) {
        (0..self.boxes.len() as u16).for_each(|queue| {
            self.post(queue, order());
        });
    }

    pub(crate) fn open(&self, queue: u16) {
        self.lock(queue).open = true;
    }

    pub(crate) fn take(&self, queue: u16) -> Vec<Order> {
        std::mem::take(&mut self.lock(queue).orders)
    }

    /// What has been posted and not been taken.
    pub(crate) fn close(&self, queue: u16) -> Vec<Order> {
        let mut mailbox = self.lock(queue);
        mailbox.open = false;
        std::mem::take(&mut mailbox.orders)
    }
}
