//! The writing end of the line: bounded, and never waited for. vCPUs put bytes in, the machine thread sends them on.
//!
//! Invariant: the lock that a vCPU takes is never held across a system call.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::ready;
use crate::bus::Event;

/// What is kept for an end that does not read. Beyond it the oldest bytes go: the newest say what happened.
const BACKLOG: usize = 64 << 10;

/// Sent at once; not more than a pipe that is ready takes whole.
const CHUNK: usize = 4096;

pub struct Output {
    /// What vCPUs wrote.
    backlog: Mutex<VecDeque<u8>>,
    /// The machine thread's.
    sending: Mutex<Sending>,
    wake: Arc<Event>,
}

struct Sending {
    sink: Option<OwnedFd>,
    /// Taken from the backlog and not yet gone out.
    chunk: VecDeque<u8>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Output {
    pub(super) fn new(sink: Option<OwnedFd>, wake: Arc<Event>) -> Self {
        let sending = Mutex::new(Sending { sink, chunk: VecDeque::new() });
        Self { backlog: Mutex::default(), sending, wake }
    }

    /// A new reader, or none. What the last one did not read, the next one gets.
    pub(super) fn connect(&self, sink: Option<OwnedFd>) {
        lock(&self.sending).sink = sink;
    }

    /// The end to wait for, while something is to be sent to it.
    pub fn stalled(&self) -> Option<OwnedFd> {
        let sending = lock(&self.sending);
        let waits = !sending.chunk.is_empty() || !lock(&self.backlog).is_empty();
        sending.sink.as_ref().filter(|_| waits)?.try_clone().ok()
    }

    /// Sends what can be sent without waiting.
    pub(super) fn flush(&self) {
        let mut sending = lock(&self.sending);
        while sending.sink.is_some() {
            if sending.chunk.is_empty() {
                let mut backlog = lock(&self.backlog);
                let count = backlog.len().min(CHUNK);
                sending.chunk.extend(backlog.drain(..count));
            }
            if sending.chunk.is_empty() || !sending.send() {
                return;
            }
        }
    }
}

impl Sending {
    /// Whether anything went out. A reader that is gone is forgotten.
    fn send(&mut self) -> bool {
        let Some(sink) = &self.sink else { return false };
        let (front, _) = self.chunk.as_slices();
        match write_some(sink.as_fd(), front) {
            Some(sent) => {
                self.chunk.drain(..sent);
                sent > 0
            }
            None => {
                self.sink = None;
                false
            }
        }
    }
}

/// How many bytes went out without waiting; `None` if the reader is gone.
fn write_some(sink: BorrowedFd<'_>, bytes: &[u8]) -> Option<usize> {
    if !ready(sink, PollFlags::OUT).contains(PollFlags::OUT) {
        return Some(0);
    }
    match rustix::io::write(sink, bytes) {
        Ok(sent) => Some(sent),
        Err(Errno::AGAIN | Errno::INTR) => Some(0),
        Err(_) => None,
    }
}

/// The uart's transmitter. It takes every byte: a guest must not see that nobody listens.
#[derive(Clone)]
pub struct Transmitter(pub Arc<Output>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut backlog = lock(&self.0.backlog);
        let excess = (backlog.len() + bytes.len()).saturating_sub(BACKLOG).min(backlog.len());
        backlog.drain(..excess);
        let first = backlog.is_empty();
        backlog.extend(bytes);
        drop(backlog);
        // Whoever was woken for the first byte takes those after it too: a burst costs one wake-up.
        if first {
            self.0.wake.signal();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(sink: Option<OwnedFd>) -> Arc<Output> {
        Arc::new(Output::new(sink, Event::new().unwrap().into()))
    }

    #[test]
    fn a_reader_that_does_not_read_costs_the_writer_nothing() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let output = output(Some(writer));
        let mut transmitter = Transmitter(output.clone());
        for n in 0..40_000_u32 {
            transmitter.write_all(&n.to_le_bytes()).unwrap();
            // The pipe takes what it has room for.
            if n == 20_000 {
                output.flush();
            }
        }
        output.flush();
        assert!(output.stalled().is_some());
        let mut seen = Vec::new();
        let mut chunk = [0; 4096];
        while !ready(reader.as_fd(), PollFlags::IN).is_empty() {
            let count = rustix::io::read(&reader, &mut chunk).unwrap();
            seen.extend_from_slice(&chunk[..count]);
            output.flush();
        }
        assert!(output.stalled().is_none());
        assert_eq!(seen[seen.len() - 4..], 39_999_u32.to_le_bytes(), "the newest bytes are kept");
        assert!(seen.len() < 160_000, "the oldest beyond the bound are not");
    }

    #[test]
    fn the_next_reader_gets_what_waited() {
        let output = output(None);
        Transmitter(output.clone()).write_all(b"early").unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        output.connect(Some(writer));
        output.flush();
        let mut chunk = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut chunk), Ok(5));
    }
}
