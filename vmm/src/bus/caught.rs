//! Signals as a descriptor, so that whoever waits for everything else sees them too.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use signal_hook::low_level::pipe::register;

/// Signals that have come and nobody has taken yet.
///
/// A pipe, not a socket: the kernel runs the handler on whichever thread it likes, and a thread that is confined to its
/// work may write but not send.
#[derive(Debug)]
pub struct Caught(File);

impl Caught {
    /// Catches each of `signals` from now on, for as long as the process lives.
    ///
    /// # Errors
    /// When the system refuses a handler, or there is no descriptor left.
    pub fn of(signals: &[i32]) -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        for signal in signals {
            register(*signal, write.try_clone()?)?;
        }
        Ok(Self(read.into()))
    }

    /// How many have come since the last call; never waits.
    pub fn take(&mut self) -> usize {
        let mut total = 0;
        while let Ok(count @ 1..) = self.0.read(&mut [0; 16]) {
            total += count;
        }
        total
    }
}

impl AsFd for Caught {
    /// Readable when one has come.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
