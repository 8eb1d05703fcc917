//! A unix socket that carries whole messages with their file descriptors, and never waits past a deadline.
//!
//! ```text
//!   Header(filled < 12) --12 bytes--> Body(filled < size) --size bytes--> a Message, back to Header
//! ```
//!
//! Invariants: what has arrived of an unfinished message stays in the channel, so a receive that times out or would
//! block loses no framing; descriptors are owned from the moment they arrive; after [`Malformed`] or
//! [`ChannelError::Disconnected`] the channel is of no more use.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::message::{Flags, HEADER_LEN, Header, Message};
use super::payload::{Malformed, Payload};
use super::{MAX_BODY_LEN, MAX_FDS};

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The deadline passed first. What has arrived of a message is kept; what was sent may be half a message.
    #[error("the other side did not answer in time")]
    Timeout,
    /// The other side closed the socket (in the middle of a message, or while we were sending).
    #[error("the other side closed the connection")]
    Disconnected,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("vhost-user socket")]
    Io(#[source] std::io::Error),
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Disconnected,
            other => Self::Io(other.into()),
        }
    }
}

/// What a receive that does not wait found.
#[derive(Debug)]
pub enum Received {
    Message(Message),
    /// Nothing, or not all of a message yet: poll for input.
    WouldBlock,
    /// The other side closed the socket between two messages.
    Eof,
}

#[derive(Debug, Default)]
struct Partial {
    header: [u8; HEADER_LEN],
    decoded: Option<Header>,
    body: Vec<u8>,
    /// Bytes of the header, or once that is decoded of the body, that are here.
    filled: usize,
    fds: Vec<OwnedFd>,
}

/// One end of a vhost-user connection.
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
    partial: Partial,
}

impl Channel {
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, partial: Partial::default() }
    }

    /// The socket, to shut down or to hand on. What an unfinished message left in the channel is lost.
    pub fn into_socket(self) -> UnixStream {
        self.socket
    }

    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends one message. `fds` go with its first byte. Without a deadline it waits as long as the other side does
    /// not read.
    ///
    /// # Errors
    /// [`ChannelError::Malformed`] before anything is sent when `body` or `fds` exceed what a message may carry.
    pub fn send(
        &mut self,
        request: impl Into<u32>,
        flags: Flags,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        let request = request.into();
        if body.len() > MAX_BODY_LEN {
            return Err(Malformed::BodyTooLong {
                request,
                len: u32::try_from(body.len()).unwrap_or(u32::MAX),
            }
            .into());
        }
        if fds.len() > MAX_FDS {
            return Err(Malformed::TooManyFds.into());
        }
        let header = Header { request, flags, size: body.len() as u32 }.encode();
        let total = HEADER_LEN + body.len();
        let mut sent = 0;
        while sent < total {
            let parts = if sent < HEADER_LEN {
                [IoSlice::new(&header[sent..]), IoSlice::new(body)]
            } else {
                [IoSlice::new(&body[sent - HEADER_LEN..]), IoSlice::new(&[])]
            };
            let with_first_byte = if sent == 0 { fds } else { &[] };
            match self.sendmsg(&parts, with_first_byte) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Sends `payload` as the answer to `request`.
    pub fn reply(
        &mut self,
        request: impl Into<u32>,
        payload: &impl Payload,
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        self.send(request, Flags::REPLY, &payload.encode(), fds, deadline)
    }

    /// Waits for one whole message; `None` is an orderly end of the connection. Without a deadline it waits for ever.
    pub fn recv(&mut self, deadline: Option<Instant>) -> Result<Option<Message>, ChannelError> {
        loop {
            match self.try_recv()? {
                Received::Message(message) => return Ok(Some(message)),
                Received::Eof => return Ok(None),
                Received::WouldBlock => self.wait(PollFlags::IN, deadline)?,
            }
        }
    }

    /// Takes what has arrived, without waiting.
    pub fn try_recv(&mut self) -> Result<Received, ChannelError> {
        loop {
            if let Some(message) = self.partial.take_message()? {
                return Ok(Received::Message(message));
            }
            match self.recvmsg() {
                Ok(0) if self.partial.is_empty() => return Ok(Received::Eof),
                Ok(0) => return Err(ChannelError::Disconnected),
                Ok(n) => self.partial.filled += n,
                Err(ChannelError::Io(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(ChannelError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Ok(Received::WouldBlock);
                }
                // A peer killed with unread bytes in its queue shows as a reset; between messages that is an end.
                Err(ChannelError::Disconnected) if self.partial.is_empty() => return Ok(Received::Eof),
                Err(error) => return Err(error),
            }
        }
    }

    fn sendmsg(&self, parts: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::NOBUFS);
        }
        sendmsg(&self.socket, parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    /// Reads into the unfinished part only, so that no byte or descriptor of the next message is taken.
    fn recvmsg(&mut self) -> Result<usize, ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let Partial { header, decoded, body, filled, fds } = &mut self.partial;
        let unfilled = if decoded.is_some() { &mut body[*filled..] } else { &mut header[*filled..] };
        let got = recvmsg(&self.socket, &mut [IoSliceMut::new(unfilled)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            fds.clear();
            return Err(Malformed::TooManyFds.into());
        }
        Ok(got.bytes)
    }

    fn wait(&self, events: PollFlags, deadline: Option<Instant>) -> Result<(), ChannelError> {
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(ChannelError::Timeout);
            }
            // A span that does not fit is longer than any machine is up.
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.socket, events)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Partial {
    fn is_empty(&self) -> bool {
        self.filled == 0 && self.decoded.is_none()
    }

    /// Decodes the header as soon as it is whole, and gives the message once its body is.
    fn take_message(&mut self) -> Result<Option<Message>, Malformed> {
        if self.decoded.is_none() && self.filled == HEADER_LEN {
            let header = Header::decode(self.header)?;
            self.body = vec![0; header.size as usize];
            self.filled = 0;
            self.decoded = Some(header);
        }
        match self.decoded {
            Some(header) if self.filled == self.body.len() => {
                let Self { body, fds, .. } = std::mem::take(self);
                Ok(Some(Message { request: header.request, flags: header.flags, body, fds }))
            }
            _ => Ok(None),
        }
    }
}
