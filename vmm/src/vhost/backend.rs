//! The backend channel (vhost-user, "Back-end communication"): a second socket on which the daemon speaks first.
//!
//! Of all that it could say, a device needs one thing: its config space has changed. Anything else closes the channel,
//! and the device goes on without it.
//!
//! Invariants: however many messages come, config space is read once for all of them, and not sooner than [`REST`] after
//! the last time; an answer is sent before config space is read, because the daemon may wait for it on the thread that
//! would answer us.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::{BackendRequest, Channel, ChannelError, FrontendRequest, Message, Received};

use super::SessionError;
use super::wire::{Limit, Wire};

/// How long the channel is left alone once it has been served.
const REST: Duration = Duration::from_millis(20);

/// Messages taken at once; more of them wait in the socket.
const BATCH: usize = 64;

/// What the daemon made known.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    Nothing,
    ConfigChanged,
}

/// Our end.
#[derive(Debug)]
pub(super) struct BackendChannel {
    /// `None` once it is closed.
    channel: Option<Channel>,
    rests_until: Instant,
}

impl BackendChannel {
    /// Makes the channel and gives the daemon its end.
    pub(super) fn open(wire: &mut Wire, limit: Limit) -> Result<Self, SessionError> {
        let (ours, theirs) = UnixStream::pair().map_err(SessionError::Io)?;
        wire.tell(FrontendRequest::SetBackendReqFd, &(), &[theirs.as_fd()], limit)?;
        Ok(Self { channel: Some(Channel::new(ours)), rests_until: Instant::now() })
    }

    /// What to poll for input now, if anything.
    pub(super) fn interest(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().filter(|_| self.wakes_at().is_none()).map(AsFd::as_fd)
    }

    /// When to look again at a channel that rests.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        (self.channel.is_some() && Instant::now() < self.rests_until).then_some(self.rests_until)
    }

    /// Takes what has come, without waiting.
    pub(super) fn serve(&mut self, device: &str) -> Told {
        let mut told = Told::Nothing;
        if self.interest().is_none() {
            return told;
        }
        for _ in 0..BATCH {
            let Some(channel) = &mut self.channel else { break };
            let (close, complaint) = match channel.try_recv() {
                Ok(Received::WouldBlock) => break,
                Ok(Received::Message(message)) => match take(channel, &message) {
                    Ok(()) => {
                        told = Told::ConfigChanged;
                        (false, None)
                    }
                    Err(complaint) => (true, Some(complaint)),
                },
                Ok(Received::Eof) | Err(ChannelError::Disconnected) => (true, None),
                Err(error) => (true, Some(error.to_string())),
            };
            if let Some(complaint) = complaint {
                tracing::warn!(
                    "device {device}: the daemon's own channel is closed: {complaint}; the device goes on"
                );
            }
            if close {
                self.channel = None;
            }
        }
        if told == Told::ConfigChanged {
            self.rests_until = Instant::now() + REST;
        }
        told
    }
}

fn take(channel: &mut Channel, message: &Message) -> Result<(), String> {
    match BackendRequest::try_from(message.request) {
        Ok(BackendRequest::ConfigChangeMsg) if message.body.is_empty() => {}
        Ok(other) => return Err(format!("it sent {other}, which was not negotiated")),
        Err(unknown) => return Err(unknown.to_string()),
    }
    if !message.flags.needs_reply() {
        return Ok(());
    }
    // A daemon that does not take its answers is not waited for.
    let now = Some(Instant::now());
    channel.reply(BackendRequest::ConfigChangeMsg, &0u64, &[], now).map_err(|error| match error {
        ChannelError::Timeout => "it does not take its answers".to_owned(),
        other => other.to_string(),
    })
}
