//! The kernel's two queues: what is handed in, what comes out, and the one place to wait.
#![expect(unsafe_code, reason = "the kernel is handed pointers into guest memory")]

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use io_uring::{IoUring, cqueue, squeue, types};

/// Most submissions that gather before the kernel is told.
const MAX_SQ: u32 = 128;

pub(super) struct Ring {
    uring: IoUring,
    /// What the full submission queue had no room for, in order.
    backlog: VecDeque<squeue::Entry>,
    /// The kernel says in shared memory when it has completions that it delivers only when asked.
    announces: bool,
}

impl Ring {
    /// For up to `depth` requests at once.
    ///
    /// No files are registered with it. When a process is killed the kernel keeps those until it has taken the ring apart,
    /// some 40 ms, and with an image the lock that a successor waits for. An open file that only its requests hold is let
    /// go with the last of them, which is what the successor has to wait for.
    pub(super) fn new(depth: u16) -> io::Result<Self> {
        let (uring, announces) = build(u32::from(depth))?;
        Ok(Self { uring, backlog: VecDeque::new(), announces })
    }

    /// Lines `entry` up for the kernel, without waiting: what keeps it from taking entries is reported by the next wait.
    ///
    /// # Safety
    /// What `entry` points to stays valid until its completion.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: by our caller's promise.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
        self.fill_queue();
        if !self.backlog.is_empty() && self.uring.submit().is_ok() {
            self.fill_queue();
        }
    }

    /// Moves the backlog to the submission queue, as far as it has room.
    fn fill_queue(&mut self) {
        let mut queue = self.uring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: by the promise of `push`'s caller.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// `false`: the kernel takes nothing before the completions that have come are taken out.
    fn submit_backlog(&mut self) -> io::Result<bool> {
        while !self.backlog.is_empty() {
            self.fill_queue();
            match self.uring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_passing(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Whether something has come, or would by [`Ring::poll`]. Looks at shared memory only: cheap enough to ask all the time.
    pub(super) fn has_news(&mut self) -> bool {
        self.has_completions() || !self.backlog.is_empty() || self.kernel_is_due()
    }

    /// Whether the kernel has anything to take or to give.
    fn kernel_is_due(&mut self) -> bool {
        let queue = self.uring.submission();
        !self.announces || queue.taskrun() || queue.cq_overflow() || !queue.is_empty()
    }

    /// Submits what has gathered and lets completions come that are ready, without waiting.
    pub(super) fn poll(&mut self) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        if !self.submit_backlog()? || !self.kernel_is_due() {
            return Ok(());
        }
        let pending = self.uring.submission().len() as u32;
        // SAFETY: no argument is passed, and the entries are valid by `push`.
        match unsafe { self.uring.submitter().enter::<libc::sigset_t>(pending, 0, GETEVENTS, None) } {
            Err(error) if !is_passing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Submits what has gathered and waits for a completion, at most for `timeout`.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.submit_backlog()? {
            return Ok(());
        }
        loop {
            let waited = match timeout {
                None => self.uring.submit_and_wait(1),
                Some(timeout) => {
                    let timespec = types::Timespec::from(timeout);
                    let args = types::SubmitArgs::new().timespec(&timespec);
                    self.uring.submitter().submit_with_args(1, &args)
                }
            };
            match waited {
                Ok(_) => return Ok(()),
                // With a timeout the caller looks at the clock anyway.
                Err(error) if error.kind() == io::ErrorKind::Interrupted && timeout.is_none() => {}
                Err(error) if is_passing(&error) || error.raw_os_error() == Some(libc::ETIME) => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn has_completions(&mut self) -> bool {
        !self.uring.completion().is_empty()
    }

    /// The next completion that has come.
    pub(super) fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.uring.completion().next()
    }
}

/// A signal came, the completion queue overflowed, or the kernel is short of memory: completions first.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
}

/// Completions are delivered when this thread enters the kernel: no interrupts of its work. Kernels before 6.0 do not know
/// some of it. `true`: they are announced.
///
/// They could wait until it asks for them by name (IORING_SETUP_DEFER_TASKRUN), which saves it a hundredth of its time. But
/// of a process that was killed the kernel looks for those every 50 ms only, and each holds the open file, with the lock
/// that a successor waits for, until then.
fn build(depth: u32) -> io::Result<(IoUring, bool)> {
    let entries = depth.clamp(16, MAX_SQ);
    // Every request, and the watches, may complete at once.
    let completions = (depth + 16).next_power_of_two();
    let best = IoUring::builder()
        .setup_cqsize(completions)
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .dontfork()
        .build(entries);
    match best {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_cqsize(completions).dontfork().build(entries).map(|ring| (ring, false))
        }
        other => other.map(|ring| (ring, true)),
    }
}
