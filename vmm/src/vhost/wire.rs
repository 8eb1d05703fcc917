//! Requests and their answers on one connection.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::protocol;
use cleave_common::vhost_user::{Channel, Flags, FrontendRequest, Message, Payload, Received};

use super::SessionError;

/// The time one operation has, however many requests it takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    end: Instant,
    span: Duration,
}

impl Limit {
    pub(super) fn new(span: Duration) -> Self {
        Self { end: Instant::now() + span, span }
    }

    pub(super) fn end(self) -> Instant {
        self.end
    }

    /// What to say when it has passed while `request` was to be answered.
    pub(super) fn passed(self, request: FrontendRequest) -> SessionError {
        SessionError::Timeout { request, limit: self.span }
    }
}

/// A connection and the protocol features negotiated on it.
#[derive(Debug)]
pub(super) struct Wire {
    channel: Channel,
    protocol_features: u64,
}

impl Wire {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel, protocol_features: 0 }
    }

    pub(super) fn negotiated(&mut self, protocol_features: u64) {
        self.protocol_features = protocol_features;
    }

    pub(super) fn has(&self, protocol_feature: u64) -> bool {
        self.protocol_features & protocol_feature != 0
    }

    /// A request that the specification gives no answer of its own: acknowledged where REPLY_ACK is negotiated.
    pub(super) fn tell(
        &mut self,
        request: FrontendRequest,
        payload: &impl Payload,
        fds: &[BorrowedFd<'_>],
        limit: Limit,
    ) -> Result<(), SessionError> {
        if !self.has(protocol::REPLY_ACK) {
            return self.send(request, Flags::REQUEST, payload, fds, limit);
        }
        self.send(request, Flags::NEED_REPLY, payload, fds, limit)?;
        match self.answer::<u64>(request, limit)? {
            0 => Ok(()),
            code => Err(SessionError::Refused { request, code }),
        }
    }

    /// A request whose answer is a `P`.
    pub(super) fn ask<P: Payload>(
        &mut self,
        request: FrontendRequest,
        payload: &impl Payload,
        limit: Limit,
    ) -> Result<P, SessionError> {
        self.ask_raw(request, payload, limit)?
            .payload()
            .map_err(|source| SessionError::Malformed { request, source })
    }

    /// As [`Wire::ask`], for an answer whose length says something.
    pub(super) fn ask_raw(
        &mut self,
        request: FrontendRequest,
        payload: &impl Payload,
        limit: Limit,
    ) -> Result<Message, SessionError> {
        self.ask_later(request, payload, limit)?;
        self.receive(request, limit)
    }

    /// Looks at what comes without having been asked for: an end, garbage, or nothing yet.
    pub(super) fn check_idle(&mut self) -> Result<(), SessionError> {
        use cleave_common::vhost_user::ChannelError;
        match self.channel.try_recv() {
            Ok(Received::WouldBlock) => Ok(()),
            Ok(Received::Eof) | Err(ChannelError::Disconnected | ChannelError::Timeout) => {
                Err(SessionError::HungUp)
            }
            Ok(Received::Message(message)) => Err(SessionError::Unasked(message.request)),
            Err(ChannelError::Malformed(source)) => Err(SessionError::Garbage(source)),
            Err(ChannelError::Io(source)) => Err(SessionError::Io(source)),
        }
    }

    /// Sends a request whose answer is taken later, by [`Wire::receive`].
    pub(super) fn ask_later(
        &mut self,
        request: FrontendRequest,
        payload: &impl Payload,
        limit: Limit,
    ) -> Result<(), SessionError> {
        self.send(request, Flags::REQUEST, payload, &[], limit)
    }

    /// Says that nothing more will come; what the daemon still does can be seen on the socket.
    pub(super) fn fall_silent(&self) {
        // A socket that is shut down already is what is wanted.
        let _ = self.channel.socket().shutdown(Shutdown::Write);
    }

    fn answer<P: Payload>(&mut self, request: FrontendRequest, limit: Limit) -> Result<P, SessionError> {
        self.receive(request, limit)?.payload().map_err(|source| SessionError::Malformed { request, source })
    }

    fn send(
        &mut self,
        request: FrontendRequest,
        flags: Flags,
        payload: &impl Payload,
        fds: &[BorrowedFd<'_>],
        limit: Limit,
    ) -> Result<(), SessionError> {
        self.channel
            .send(request, flags, &payload.encode(), fds, Some(limit.end))
            .map_err(|error| SessionError::during(request, limit.span, error))
    }

    pub(super) fn receive(
        &mut self,
        request: FrontendRequest,
        limit: Limit,
    ) -> Result<Message, SessionError> {
        let message = self
            .channel
            .recv(Some(limit.end))
            .map_err(|error| SessionError::during(request, limit.span, error))?
            .ok_or(SessionError::Closed { request })?;
        if message.request != u32::from(request) || !message.flags.is_reply() {
            return Err(SessionError::WrongAnswer { request, got: message.request });
        }
        Ok(message)
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
