//! Lines over a socket, on a unix one with descriptors, and never a wait that was not asked for.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most bytes of a line.
pub const MAX_LINE: usize = 64 << 10;

/// Most descriptors with a line.
const MAX_FDS: usize = 8;

/// Why no line came or went.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    #[error("a line is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("more than {MAX_FDS} descriptors came with a line")]
    TooManyFds,
    #[error("the other side does not read what it is sent")]
    NotRead,
    #[error("nothing came in time")]
    Timeout,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for LineError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// One line, without its end.
#[derive(Debug)]
pub struct Line {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// A connection, by lines.
#[derive(Debug)]
pub struct Lines {
    stream: OwnedFd,
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
    unsent: Vec<u8>,
    ended: bool,
}

impl Lines {
    /// `stream` is a connected stream socket.
    pub fn new(stream: impl Into<OwnedFd>) -> Self {
        Self {
            stream: stream.into(),
            received: Vec::new(),
            fds: Vec::new(),
            unsent: Vec::new(),
            ended: false,
        }
    }

    /// The next line that has arrived; an empty one is none. `None`: there is no whole one yet, or, if [`Lines::has_ended`],
    /// ever.
    ///
    /// # Errors
    /// What comes is no line, or does not come any more.
    pub fn take(&mut self) -> Result<Option<Line>, LineError> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let mut bytes: Vec<u8> = self.received.drain(..=end).collect();
                bytes.truncate(bytes.trim_ascii_end().len());
                if bytes.is_empty() {
                    continue;
                }
                return Ok(Some(Line { bytes, fds: std::mem::take(&mut self.fds) }));
            }
            if self.received.len() > MAX_LINE {
                return Err(LineError::TooLong);
            }
            if self.ended || !self.receive()? {
                return Ok(None);
            }
        }
    }

    /// Whether [`Lines::take`] has one without reading.
    pub fn has_line(&self) -> bool {
        self.received.contains(&b'\n')
    }

    /// Nothing more comes.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// `false`: nothing is there.
    fn receive(&mut self) -> Result<bool, LineError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 4096];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(got) => got,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => return Ok(true),
            Err(Errno::CONNRESET) => {
                self.ended = true;
                return Ok(true);
            }
            Err(errno) => return Err(errno.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                self.fds.extend(received);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(LineError::TooManyFds);
        }
        self.ended = got.bytes == 0;
        self.received.extend_from_slice(&bytes[..got.bytes]);
        Ok(true)
    }

    /// Sends `text` and a line's end, now or by [`Lines::flush`].
    ///
    /// # Errors
    /// The other side is gone, or has left too much unread.
    pub fn send(&mut self, text: &str) -> Result<(), LineError> {
        self.unsent.extend_from_slice(text.as_bytes());
        self.unsent.push(b'\n');
        self.flush()?;
        if self.unsent.len() > MAX_LINE { Err(LineError::NotRead) } else { Ok(()) }
    }

    /// Sends `text`, a line's end and `fds`, now or not at all. For a connection on which nothing waits.
    ///
    /// # Errors
    /// The other side is gone, or does not read.
    pub fn send_with(&mut self, text: &str, fds: &[BorrowedFd<'_>]) -> Result<(), LineError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(LineError::TooManyFds);
        }
        let parts = [IoSlice::new(text.as_bytes()), IoSlice::new(b"\n")];
        match sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) if sent > text.len() => Ok(()),
            Ok(_) | Err(Errno::AGAIN) => Err(LineError::NotRead),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sends what could not be sent before, as far as that goes.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn flush(&mut self) -> Result<(), LineError> {
        while !self.unsent.is_empty() {
            match rustix::net::send(&self.stream, &self.unsent, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// What to poll for: more to read, and room if something is to be sent.
    pub fn interest(&self) -> PollFlags {
        if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT }
    }

    /// Waits for a line until `deadline`. `None`: the other side has closed.
    ///
    /// # Errors
    /// As [`Lines::take`], and when none came in time.
    pub fn wait(&mut self, deadline: Instant) -> Result<Option<Line>, LineError> {
        loop {
            if let Some(line) = self.take()? {
                return Ok(Some(line));
            }
            if self.ended {
                return Ok(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| LineError::Timeout)?;
            match poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return Err(LineError::Timeout),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Lines {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
