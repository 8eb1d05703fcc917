//! The signals a person or a service manager sends, as file descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};

use crate::bus::Caught;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// SIGTERM: let the guest shut down; once more: at once.
    Terminate,
    /// SIGINT, SIGQUIT, SIGHUP (the terminal went away): stop at once.
    Quit,
    /// SIGUSR1: say how the devices are.
    Report,
}

pub struct Signals {
    terminate: Caught,
    quit: Caught,
    report: Caught,
}

impl Signals {
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: Caught::of(&[SIGTERM])?,
            quit: Caught::of(&[SIGINT, SIGQUIT, SIGHUP])?,
            report: Caught::of(&[SIGUSR1])?,
        })
    }

    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.terminate.as_fd(), self.quit.as_fd(), self.report.as_fd()]
    }

    /// The requests since the last call, each signal counted.
    pub fn take(&mut self) -> Vec<Request> {
        [
            (&mut self.terminate, Request::Terminate),
            (&mut self.quit, Request::Quit),
            (&mut self.report, Request::Report),
        ]
        .into_iter()
        .flat_map(|(caught, request)| std::iter::repeat_n(request, caught.take()))
        .collect()
    }
}
