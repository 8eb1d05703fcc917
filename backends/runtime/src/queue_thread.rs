//! A named thread that serves one queue whenever it is running, and waits for the next vring when it is not.
//!
//! ```text
//!   idle --start(vring)--> serving --stop()--> draining --vring given back--> idle
//! ```
//!
//! The thread has one place to wait, its own; an eventfd tells it there that a command has come.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use cleave_common::sandbox::{drop_memory_lock, name_thread};
use rustix::event::{EventfdFlags, eventfd};

use crate::device::Stop;
use crate::vring::Vring;

/// What the session wants of a queue thread.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are few, and each is taken at once")]
pub enum Command {
    Start(Vring),
    /// Complete what has been fetched, as far as [`Stop`] says, then [`Inbox::give_back`] the vring.
    Stop(Stop),
}

/// The thread's end.
#[derive(Debug)]
pub struct Inbox {
    wake: Arc<OwnedFd>,
    commands: Receiver<Command>,
    vrings: Sender<Vring>,
}

impl Inbox {
    /// Readable when a command has come; read it empty with [`Inbox::try_next`].
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next command, if one has come.
    pub fn try_next(&self) -> Option<Command> {
        // Whether the count was there says nothing more than the channel does.
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        self.commands.try_recv().ok()
    }

    /// Waits for a command. `None`: the device is gone, and the thread is to end.
    pub fn next(&self) -> Option<Command> {
        self.commands.recv().ok()
    }

    pub fn give_back(&self, vring: Vring) {
        // Nobody to take it: the device is being dropped.
        let _ = self.vrings.send(vring);
    }
}

/// The device's end. Dropping it ends the thread, which must be idle.
#[derive(Debug)]
pub struct QueueThread {
    wake: Arc<OwnedFd>,
    commands: Option<Sender<Command>>,
    vrings: Receiver<Vring>,
    serving: bool,
    thread: Option<JoinHandle<()>>,
}

impl QueueThread {
    /// Runs `body` on a new thread called `name`. It is given its inbox, and serves until [`Inbox::next`] says `None`.
    ///
    /// # Errors
    /// What `prepare` says, which runs on the new thread before this returns: for what belongs to the thread, its I/O rings
    /// above all.
    pub fn spawn<S, E>(
        name: String,
        prepare: impl FnOnce() -> Result<S, E> + Send + 'static,
        body: impl FnOnce(S, Inbox) + Send + 'static,
    ) -> Result<Self, E>
    where
        E: From<std::io::Error> + Send + 'static,
    {
        /// The threads' stacks hold a few frames; what is not touched costs address space only.
        const STACK: usize = 256 << 10;
        let wake = Arc::new(
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(std::io::Error::from)?,
        );
        let (commands, to_thread) = mpsc::channel();
        let (from_thread, vrings) = mpsc::channel();
        let (ready, prepared) = mpsc::channel();
        let inbox = Inbox { wake: wake.clone(), commands: to_thread, vrings: from_thread };
        let thread = thread::Builder::new().name(name).stack_size(STACK).spawn(move || {
            match prepare().and_then(|state| Ok(drop_memory_lock().map(|()| state)?)) {
                Ok(state) => {
                    name_thread("queue");
                    let _ = ready.send(Ok(()));
                    drop(ready);
                    body(state, inbox);
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        prepared.recv().map_err(std::io::Error::other)??;
        Ok(Self { wake, commands: Some(commands), vrings, serving: false, thread: Some(thread) })
    }

    pub fn start(&mut self, vring: Vring) {
        self.serving = self.command(Command::Start(vring));
    }

    /// Waits until the thread has drained its queue. `None` if it was not serving one.
    pub fn stop(&mut self, stop: Stop) -> Option<Vring> {
        if !std::mem::take(&mut self.serving) || !self.command(Command::Stop(stop)) {
            return None;
        }
        self.vrings.recv().ok()
    }

    fn command(&self, command: Command) -> bool {
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(command).is_ok());
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        sent
    }
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        self.stop(Stop::SessionOver);
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
