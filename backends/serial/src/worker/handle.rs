//! The device's and the control socket's way to the thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Sender};

use cleave_runtime::{QueueIndex, Vring};
use rustix::event::{EventfdFlags, eventfd};

use super::Worker;
use crate::ports::Size;

/// What the device wants of the thread.
pub(crate) enum Command {
    Start(Vring),
    Stop(QueueIndex, Sender<Option<Vring>>),
    Features(u64),
    Kept(cleave_runtime::Kept, Sender<io::Result<()>>),
    Reset,
    /// EMERG_WRITE.
    Print(u8),
    /// Anything that is asked and answered at once.
    Ask(Box<dyn FnOnce(&mut Worker) + Send>),
}

/// What the thread and the device both know.
#[derive(Debug)]
pub(crate) struct Announced {
    /// Columns and rows of port 0.
    size: AtomicU32,
    /// Readable when it has changed.
    changed: OwnedFd,
}

impl Announced {
    pub(super) fn new() -> io::Result<Self> {
        let changed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { size: AtomicU32::new(0), changed })
    }

    pub(crate) fn size(&self) -> Size {
        let size = self.size.load(Ordering::Relaxed);
        Size { columns: size as u16, rows: (size >> 16) as u16 }
    }

    pub(super) fn set_size(&self, Size { columns, rows }: Size) {
        let size = u32::from(columns) | u32::from(rows) << 16;
        if self.size.swap(size, Ordering::Relaxed) != size {
            let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
        }
    }

    pub(crate) fn changed_fd(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }

    pub(crate) fn take_change(&self) -> bool {
        rustix::io::read(&self.changed, &mut [0; 8]).is_ok()
    }
}

/// The device's, and the control socket's, way to the thread.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    pub(super) commands: Sender<Command>,
    pub(super) wake: Arc<OwnedFd>,
    pub(crate) announced: Arc<Announced>,
}

impl Handle {
    pub(crate) fn command(&self, command: Command) {
        // The thread takes them as long as the process lives.
        let _ = self.commands.send(command);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    /// Asks the thread something. `None`: it has ended.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Option<T> {
        let (reply, answer) = mpsc::channel();
        self.command(Command::Ask(Box::new(move |worker| {
            let _ = reply.send(question(worker));
        })));
        answer.recv().ok()
    }
}
