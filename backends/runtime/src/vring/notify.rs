//! Eventfds towards the frontend.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};

/// A vring's call or error eventfd, which the frontend may exchange while the ring runs (it does so to mask an interrupt).
#[derive(Debug, Clone, Default)]
pub(crate) struct Notifier(Arc<Mutex<Option<OwnedFd>>>);

impl Notifier {
    /// `None`: nobody wants to be told; of a call, the driver polls the used ring.
    pub(crate) fn set(&self, fd: Option<OwnedFd>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = fd;
    }

    pub(crate) fn signal(&self) {
        if let Some(fd) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            signal(fd);
        }
    }
}

/// Adds one to an eventfd. What the frontend gave as one may be anything whose write blocks; one that is not ready is
/// full, and its reader is told already.
fn signal(fd: &OwnedFd) {
    let blocking = fcntl_getfl(fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
    if blocking {
        let mut fds = [PollFd::new(fd, PollFlags::OUT)];
        if !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..)) {
            return;
        }
    }
    // A frontend that went away, or gave a descriptor that cannot be written, loses only its own interrupts.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}
