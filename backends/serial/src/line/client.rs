//! One client of a line: its two ends, and what is known of them.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::fs::fstat;
use rustix::io::{Errno, IoSliceMut};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send};

use super::{Ends, Kind, Part, Watch};
use crate::ports::Size;
use crate::terminal::size_of;

#[derive(Debug)]
pub(super) struct Client {
    pub(super) id: u32,
    pub(super) input: Option<OwnedFd>,
    pub(super) output: Option<OwnedFd>,
    pub(super) kind: Kind,
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// Nothing that is written to it will be read.
    pub(super) hung_up: bool,
    /// What it has been sent of a shared line's history.
    pub(super) place: u64,
    /// What it is to be told before that.
    pub(super) notice: Vec<u8>,
}

/// What came from a client of a shared line.
#[derive(Debug, Default)]
pub(super) struct Typed {
    pub(super) len: usize,
    pub(super) size: Option<Size>,
}

impl Client {
    pub(super) fn new(id: u32, Ends { input, output, kind }: Ends, place: u64) -> Self {
        let (readable, writable) = (input.is_some(), output.is_some());
        Self { id, input, output, kind, readable, writable, hung_up: false, place, notice: Vec::new() }
    }

    pub(super) fn watch(&mut self, watch: &Watch<'_>) -> io::Result<()> {
        if let Some(input) = &self.input {
            watch.add(input.as_fd(), Part::Input(self.id), EventFlags::IN | EventFlags::RDHUP)?;
        }
        if let Some(output) = &self.output {
            watch.add(output.as_fd(), Part::Output(self.id), EventFlags::OUT)?;
        }
        Ok(())
    }

    pub(super) fn is_file(&self) -> bool {
        matches!(self.kind, Kind::File)
    }

    pub(super) fn is_socket(&self) -> bool {
        matches!(self.kind, Kind::Socket)
    }

    /// One that has hung up has ended once all that it sent is read, also while nobody reads.
    pub(super) fn notice_end(&mut self) {
        let Some(input) = self.input.as_ref().filter(|_| self.hung_up && self.is_socket()) else { return };
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        if matches!(recv(input, &mut [0; 1], flags), Ok((_, 0))) {
            self.input = None;
        }
    }

    /// Nothing goes to it, and nothing comes from it any more.
    pub(super) fn is_gone(&self) -> bool {
        self.input.is_none() && (self.hung_up || self.output.is_none())
    }

    pub(super) fn file_len(&self) -> Option<u64> {
        let output = self.output.as_ref().filter(|_| self.is_file())?;
        u64::try_from(fstat(output).ok()?.st_size).ok()
    }

    /// Writes to an end that is ready. `None`: it takes nothing now, or never again.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Option<usize> {
        let output = self.output.as_ref().filter(|_| self.writable)?;
        let written = match self.kind {
            Kind::Socket => send(output, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            _ => rustix::io::write(output, bytes),
        };
        match written {
            Ok(count) => Some(count),
            Err(Errno::INTR) => Some(0),
            Err(Errno::AGAIN) => {
                self.writable = false;
                None
            }
            Err(_) if self.is_file() => {
                self.writable = false;
                None
            }
            Err(_) => {
                self.output = None;
                None
            }
        }
    }

    /// Reads what was typed. A byte that comes with a descriptor is not typed: the descriptor is that of a terminal, whose
    /// size the console is to have.
    pub(super) fn read(&mut self, room: &mut [u8]) -> Typed {
        let mut typed = Typed::default();
        let Some(input) = self.input.as_ref().filter(|_| self.readable) else { return typed };
        let read = match self.kind {
            Kind::Socket => receive(input.as_fd(), room, &mut typed.size),
            _ => rustix::io::read(input, &mut *room).map(|len| (len, len == 0)),
        };
        match read {
            Ok((_, true)) => self.input = None,
            Ok((len, false)) => typed.len = len,
            Err(Errno::INTR | Errno::CONNRESET) => {}
            Err(Errno::AGAIN) => self.readable = false,
            Err(_) => self.input = None,
        }
        typed
    }
}

/// How much was typed, and whether that was all there will ever be.
fn receive(
    socket: BorrowedFd<'_>,
    room: &mut [u8],
    size: &mut Option<Size>,
) -> rustix::io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut len = recvmsg(socket, &mut [IoSliceMut::new(room)], &mut control, flags)?.bytes;
    let over = len == 0;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            // The kernel ends what it gives with the byte that has them (unix(7)).
            len = len.saturating_sub(1);
            for fd in fds {
                *size = size_of(fd.as_fd()).or(*size);
            }
        }
    }
    Ok((len, over))
}
