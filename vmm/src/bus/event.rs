//! A doorbell between processes: the eventfd that carries a kick or a call.
#![expect(unsafe_code, reason = "vmm-sys-util's EventFd, which kvm-ioctls asks for, does not implement AsFd")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A non-blocking, close-on-exec eventfd. Signals that nobody has taken yet add up to one.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Self)
    }

    pub fn signal(&self) {
        // The only failure is a full counter, and that is signalled already.
        let _ = self.0.write(1);
    }

    /// Whether it is signalled; leaves it so.
    pub fn is_signalled(&self) -> bool {
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }

    /// Takes the signal; whether there was one.
    pub fn clear(&self) -> bool {
        self.0.read().is_ok()
    }

    /// As KVM's irqfd and ioeventfd want it.
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.0` is, which the returned lifetime is tied to.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
