//! A shared line: what is printed goes into a history, and from there to each client.

use std::time::Instant;

use cleave_common::port::{OnFull, Sharing};

use super::{Line, TROUBLE_PAUSE};
use crate::history::History;
use crate::iovecs::Iovecs;

/// Bytes read from a client at once.
const INPUT_CHUNK: usize = 4096;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) history: History,
    sharing: Sharing,
    /// What somebody has been sent: who comes when nobody was there gets the rest.
    seen: u64,
    pub(super) dropped: u64,
    /// Whose turn to type it is.
    turn: usize,
}

impl Shared {
    pub(super) fn new(sharing: Sharing) -> Self {
        let history = History::new(usize::try_from(sharing.capacity).unwrap_or(usize::MAX));
        Self { history, sharing, seen: 0, dropped: 0, turn: 0 }
    }

    /// From where on a new client reads: what nobody has seen, and as much of what somebody has as is asked for.
    pub(super) fn place_of_newcomer(&self) -> u64 {
        let recent = self.history.end().saturating_sub(self.sharing.history);
        let place = recent.min(self.seen);
        if place < self.history.start() && self.seen >= self.history.start() {
            self.history.start()
        } else {
            place
        }
    }
}

fn notice(missed: u64) -> Vec<u8> {
    format!("\r\n[cleave-serial: {missed} bytes are missing here, which were not read in time]\r\n")
        .into_bytes()
}

impl Line {
    /// Whether the guest may print `len` bytes now.
    pub(crate) fn has_room(&self, len: usize) -> bool {
        let Some(Shared { history, sharing, seen, .. }) = &self.shared else { return false };
        if sharing.on_full == OnFull::Drop {
            return true;
        }
        let readers = self.clients.iter().filter(|client| client.output.is_some());
        let slowest = readers.map(|client| client.place).min().unwrap_or(*seen);
        let unread = history.end().saturating_sub(slowest);
        unread == 0 || unread + len as u64 <= history.capacity()
    }

    /// The guest prints a chain.
    pub(crate) fn print(&mut self, chain: &Iovecs) {
        if let Some(shared) = &mut self.shared {
            chain.copy_out(|part| shared.history.push(part));
        }
    }

    /// The guest prints a byte when it can do nothing else (EMERG_WRITE).
    pub(crate) fn print_byte(&mut self, byte: u8) {
        if let Some(shared) = &mut self.shared {
            shared.history.push(&[byte]);
        }
    }

    /// Sends the clients what they have not got, as far as they take it. `true`: one of them goes on taking.
    pub(crate) fn flush(&mut self) {
        let Some(shared) = &mut self.shared else { return };
        for client in &mut self.clients {
            loop {
                if !client.notice.is_empty() {
                    let Some(count) = client.write(&client.notice.clone()) else { break };
                    client.notice.drain(..count);
                    continue;
                }
                let missed = shared.history.start().saturating_sub(client.place);
                if missed != 0 {
                    client.place += missed;
                    shared.dropped += missed;
                    client.notice = notice(missed);
                    continue;
                }
                let [first, second] = shared.history.from(client.place);
                let part = if first.is_empty() { second } else { first };
                if part.is_empty() {
                    break;
                }
                let Some(count) = client.write(part) else { break };
                client.place += count as u64;
            }
            shared.seen = shared.seen.max(client.place);
            if client.is_file() && !client.writable && self.retry_at.is_none() {
                self.retry_at = Some(Instant::now() + TROUBLE_PAUSE);
            }
        }
    }

    /// Takes what one of the clients has typed into `chain`; says how much that is.
    pub(crate) fn take_typed(&mut self, chain: &Iovecs) -> usize {
        let Some(shared) = &mut self.shared else { return 0 };
        let mut room = [0; INPUT_CHUNK];
        let most = room.len().min(chain.len());
        let count = self.clients.len();
        for at in 0..count {
            let client = &mut self.clients[(shared.turn + at) % count];
            // Until there is something, or nothing more.
            while client.readable && client.input.is_some() {
                let typed = client.read(&mut room[..most]);
                self.size = typed.size.or(self.size);
                if typed.len != 0 {
                    shared.turn = (shared.turn + at + 1) % count;
                    return chain.copy_in(&room[..typed.len]);
                }
            }
        }
        0
    }
}
