//! An exclusive line: each byte goes to one client, straight from guest memory, and comes from one, straight to it.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::time::Instant;

use cleave_runtime::QueueIndex;
use tracing::warn;

use super::{Kind, Line, TROUBLE_PAUSE};
use crate::iovecs::Iovecs;
use crate::kept::Kept;

/// What became of bytes for a client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Bytes(usize),
    /// It takes none now, or there is none.
    Wait,
}

/// What came of asking a client for bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Bytes(usize),
    Wait,
}

impl Line {
    /// Whether [`Line::receive`] may have something.
    pub(crate) fn has_input(&self) -> bool {
        self.clients.iter().any(|client| client.readable && client.input.is_some())
    }

    /// Whether [`Line::send`] may take something.
    pub(crate) fn takes_output(&self) -> bool {
        self.clients.iter().any(|client| client.writable && client.output.is_some())
    }

    /// Sends what is left of the chain of `queue`'s record, of which `base` bytes have gone.
    pub(crate) fn send(&mut self, kept: &Kept, queue: QueueIndex, base: u32, chain: &Iovecs) -> Sent {
        loop {
            let Some(client) = self.clients.first_mut().filter(|client| client.writable) else {
                return Sent::Wait;
            };
            let Some(output) = &client.output else { return Sent::Wait };
            let entries = chain.entries();
            let sent = match &client.kind {
                Kind::Socket => kept.send(output.as_fd(), queue, base, entries),
                Kind::File => kept.write(output.as_fd(), queue, base, entries, client.file_len()),
                Kind::Pty { .. } | Kind::Other => kept.write(output.as_fd(), queue, base, entries, None),
            };
            match sent {
                Ok(count) => return Sent::Bytes(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    client.writable = false;
                    return Sent::Wait;
                }
                Err(error) if client.is_file() => {
                    client.writable = false;
                    return self.file_in_trouble(&error);
                }
                Err(_) => {
                    client.output = None;
                    return Sent::Wait;
                }
            }
        }
    }

    /// A disk that is full may have room again.
    fn file_in_trouble(&mut self, error: &io::Error) -> Sent {
        warn!("a port's file takes nothing now, and is tried again: {error}");
        self.retry_at = Some(Instant::now() + TROUBLE_PAUSE);
        Sent::Wait
    }

    /// Receives into the chain of `queue`'s record.
    pub(crate) fn receive(&mut self, kept: &Kept, queue: QueueIndex, chain: &Iovecs) -> Received {
        loop {
            let Some(client) = self.clients.first_mut().filter(|client| client.readable) else {
                return Received::Wait;
            };
            let Some(input) = &client.input else { return Received::Wait };
            let received = match client.is_socket() {
                true => kept.receive(input.as_fd(), queue, chain.entries()),
                false => kept.read(input.as_fd(), queue, chain.entries()),
            };
            match received {
                Ok(0) => client.input = None,
                Ok(count) => return Received::Bytes(count),
                // What had come before the other side closed in a hurry is there to be read all the same.
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionReset) => {
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    client.readable = false;
                    return Received::Wait;
                }
                Err(_) => client.input = None,
            }
        }
    }
}
