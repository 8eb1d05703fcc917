//! Frames as they pass, into a file or a pipe that tcpdump and Wireshark read while it grows.
//!
//! ```text
//!   queues' threads --a copy, if there is room--> what is to be written --this module's thread--> the file
//!
//!   file:  written, in whole records --the disk is full, or it fails--> over
//!   pipe:  nobody reads: frames are forgotten --somebody opens it--> its header, then frames --closes it--> emptied
//! ```
//!
//! Invariants: no queue's thread ever waits for the file; what waits to be written is bounded, and what finds no room there is
//! counted; a file ends behind a whole record whenever it has been left alone; who reads a pipe starts with its header.
//!
//! Not by a crate: a file has one header of 24 bytes, a frame one of 16.

mod output;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::SystemTime;

use cleave_common::sandbox::{drop_memory_lock, name_thread};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use tracing::{info, warn};

use crate::buffers::GuestBuffers;
pub(crate) use output::{Output, PcapError};

/// Bytes of a frame that are kept, unless told otherwise: all of the largest one.
pub(crate) const MAX_SNAPLEN: u32 = 262_144;

/// Most bytes that wait to be written.
const MAX_WAITING: usize = 4 << 20;

/// The thread's stack.
const STACK: usize = 128 << 10;

const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;
/// Times have nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
/// LINKTYPE_ETHERNET.
const ETHERNET: u32 = 1;

/// The header of a file of frames with up to `snaplen` bytes.
fn file_header(snaplen: u32) -> [u8; FILE_HEADER] {
    let mut header = [0; FILE_HEADER];
    header[..4].copy_from_slice(&MAGIC.to_ne_bytes());
    header[4..6].copy_from_slice(&2u16.to_ne_bytes());
    header[6..8].copy_from_slice(&4u16.to_ne_bytes());
    header[16..20].copy_from_slice(&snaplen.to_ne_bytes());
    header[20..].copy_from_slice(&ETHERNET.to_ne_bytes());
    header
}

/// The header of a frame of `len` bytes of which `kept` follow.
fn record_header(at: SystemTime, kept: u32, len: u32) -> [u8; RECORD_HEADER] {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let words = [since.as_secs() as u32, since.subsec_nanos(), kept, len];
    let mut header = [0; RECORD_HEADER];
    header.chunks_exact_mut(4).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_ne_bytes()));
    header
}

/// A capture under way. Dropping it writes what waits, and ends it.
#[derive(Debug)]
pub(crate) struct Capture {
    shared: Arc<Shared>,
    snaplen: u32,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Whole records.
    waiting: Mutex<Vec<u8>>,
    /// There is something to be written, or the end has come.
    wake: OwnedFd,
    /// Nothing is taken any more.
    over: AtomicBool,
    ends: AtomicBool,
    captured: AtomicU64,
    missed: AtomicU64,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Vec<u8>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Capture {
    /// Writes frames to `output` from now on, of each up to `snaplen` bytes.
    pub(crate) fn start(output: Output, snaplen: u32) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            over: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            captured: AtomicU64::new(0),
            missed: AtomicU64::new(0),
        });
        let theirs = shared.clone();
        let (ready, prepared) = mpsc::channel();
        let thread =
            std::thread::Builder::new().name("pcap".to_owned()).stack_size(STACK).spawn(move || {
                let dropped = drop_memory_lock();
                name_thread("pcap");
                let fit = dropped.is_ok();
                let _ = ready.send(dropped);
                if fit {
                    Writer { shared: &theirs, output, writing: Vec::new() }.run();
                }
            })?;
        // What it has to do before system calls are filtered is done then.
        prepared.recv().map_err(std::io::Error::other)??;
        Ok(Self { shared, snaplen, thread: Some(thread) })
    }

    /// A frame of `len` bytes has passed; it is `offset` bytes from the start of `buffers`.
    pub(crate) fn frame(&self, buffers: &GuestBuffers, offset: usize, len: usize) {
        if self.shared.over.load(Ordering::Relaxed) {
            return;
        }
        let kept = len.min(self.snaplen as usize);
        let header = record_header(SystemTime::now(), kept as u32, len as u32);
        let mut waiting = self.shared.waiting();
        if waiting.len() + header.len() + kept > MAX_WAITING {
            drop(waiting);
            self.shared.missed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let is_first = waiting.is_empty();
        waiting.extend(header);
        let start = waiting.len();
        waiting.resize(start + kept, 0);
        buffers.read_at(offset, &mut waiting[start..]);
        drop(waiting);
        if is_first {
            self.shared.wake();
        }
    }

    pub(crate) fn report(&self) -> String {
        let Shared { captured, missed, over, .. } = &*self.shared;
        let (captured, missed) = (captured.load(Ordering::Relaxed), missed.load(Ordering::Relaxed));
        let over = if over.load(Ordering::Relaxed) { ", and it is over" } else { "" };
        format!("{captured} bytes of frames captured, {missed} frames not{over}")
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread that writes.
struct Writer<'s> {
    shared: &'s Shared,
    output: Output,
    /// What was taken from [`Shared::waiting`]: whole records, but for a first one of a pipe that is half written.
    writing: Vec<u8>,
}

impl Writer<'_> {
    fn run(mut self) {
        loop {
            // The end first: what was captured before it is still to be written.
            let ends = self.shared.ends.load(Ordering::Relaxed);
            if self.writing.is_empty() {
                std::mem::swap(&mut self.writing, &mut *self.shared.waiting());
            }
            match self.output.write(&mut self.writing) {
                Ok(written) => {
                    self.shared.captured.fetch_add(written as u64, Ordering::Relaxed);
                }
                Err(error) => return self.give_up(&error),
            }
            let is_stuck = !self.writing.is_empty();
            if ends && (is_stuck || self.shared.waiting().is_empty()) {
                return;
            }
            if (is_stuck || self.shared.waiting().is_empty())
                && let Err(errno) = self.rest(is_stuck)
            {
                return self.give_up(&PcapError::Wait(errno.into()));
            }
        }
    }

    /// Waits for frames, for a reader to come or go, and, if the pipe is full, for room.
    fn rest(&self, is_stuck: bool) -> Result<(), Errno> {
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        fds.extend(self.output.readers_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        if is_stuck {
            fds.push(PollFd::from_borrowed_fd(self.output.fd(), PollFlags::OUT));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        Ok(())
    }

    fn give_up(&mut self, error: &PcapError) {
        self.shared.over.store(true, Ordering::Relaxed);
        *self.shared.waiting() = Vec::new();
        warn!("the capture is over, the network goes on: {error}");
        info!("{} bytes were captured", self.shared.captured.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests;
