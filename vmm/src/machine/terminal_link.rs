//! `--console stdio`: the person's terminal on one side, the console's daemon on the other.
//!
//! The daemon and its successors inherit one end of a socket pair, and we keep both: what is on its way when a daemon is
//! killed is read by the next one. A byte with a descriptor on this socket is not typed: it has the daemon look at the
//! terminal's size (backends/serial/README.md).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use cleave_common::port;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use signal_hook::consts::SIGWINCH;

use crate::bus::{Caught, Event};
use crate::config::UartConfig;
use crate::legacy::line::{Line, LineError, Transmitter};
use crate::legacy::terminal::Command;

/// Bytes read from the daemon at once.
const CHUNK: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("--console stdio")]
    Line(#[from] LineError),
    #[error("--console stdio: {0}")]
    Socket(#[from] io::Error),
}

pub struct TerminalLink {
    line: Line,
    ours: OwnedFd,
    theirs: Arc<OwnedFd>,
    resized: Caught,
    /// The daemon is to hear of the size, as soon as it takes it.
    tell_size: bool,
}

impl TerminalLink {
    /// `wake` is signalled when the machine thread should call [`TerminalLink::serve`].
    pub fn open(wake: &Arc<Event>) -> Result<Self, LinkError> {
        let line = Line::open(&UartConfig::Stdio, wake)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(io::Error::from)?;
        let resized = Caught::of(&[SIGWINCH])?;
        Ok(Self { line, ours, theirs: Arc::new(theirs), resized, tell_size: true })
    }

    /// What the daemon inherits.
    pub fn end_for_daemon(&self) -> Arc<OwnedFd> {
        self.theirs.clone()
    }

    pub fn take_terminal(&mut self) {
        self.line.take_terminal();
    }

    /// The end to wait for, while something is to be sent to it.
    pub fn stalled(&self) -> Option<OwnedFd> {
        self.line.output().stalled()
    }

    /// What the machine thread waits for.
    pub fn interest(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        // What the terminal does not take stays with the daemon, and with the guest.
        let printed = self.stalled().is_none().then(|| (self.ours.as_fd(), PollFlags::IN));
        let resized = (self.resized.as_fd(), PollFlags::IN);
        printed.into_iter().chain([resized]).chain(self.line.interest())
    }

    /// Moves what can move in both directions, without waiting, and returns the commands typed at the terminal.
    pub fn serve(&mut self) -> Vec<Command> {
        self.tell_size |= self.resized.take() > 0;
        if self.tell_size && port::send_terminal(self.ours.as_fd(), rustix::stdio::stdin()).is_ok() {
            self.tell_size = false;
        }
        let output = self.line.output();
        let mut chunk = [0; CHUNK];
        if output.stalled().is_none()
            && let Ok((count, _)) = recv(&self.ours, &mut chunk, RecvFlags::DONTWAIT)
        {
            // It takes every byte.
            let _ = io::Write::write(&mut Transmitter(output), &chunk[..count]);
        }
        let ours = &self.ours;
        self.line.serve(|typed| send_some(ours, typed))
    }
}

/// How much the daemon has room for.
fn send_some(socket: &OwnedFd, typed: &[u8]) -> usize {
    if typed.is_empty() {
        return 0;
    }
    match send(socket, typed, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(count) => count,
        Err(Errno::AGAIN | Errno::INTR) => 0,
        // The pair is ours: it does not break.
        Err(_) => typed.len(),
    }
}
