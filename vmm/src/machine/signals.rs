//! The signals a person or a service manager sends, as file descriptors.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use signal_hook::low_level::pipe;

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
    terminate: UnixStream,
    quit: UnixStream,
    report: UnixStream,
}

impl Signals {
    pub fn catch() -> io::Result<Self> {
        let (terminate, write) = UnixStream::pair()?;
        pipe::register(SIGTERM, write)?;
        let (quit, write) = UnixStream::pair()?;
        for signal in [SIGINT, SIGQUIT] {
            pipe::register(signal, write.try_clone()?)?;
        }
        pipe::register(SIGHUP, write)?;
        let (report, write) = UnixStream::pair()?;
        pipe::register(SIGUSR1, write)?;
        for stream in [&terminate, &quit, &report] {
            stream.set_nonblocking(true)?;
        }
        Ok(Self { terminate, quit, report })
    }

    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.terminate.as_fd(), self.quit.as_fd(), self.report.as_fd()]
    }

    /// The requests since the last call, each signal counted.
    pub fn take(&mut self) -> Vec<Request> {
        let mut requests = Vec::new();
        let mut bytes = [0; 16];
        for (stream, request) in [
            (&mut self.terminate, Request::Terminate),
            (&mut self.quit, Request::Quit),
            (&mut self.report, Request::Report),
        ] {
            if let Ok(count) = stream.read(&mut bytes) {
                requests.extend(std::iter::repeat_n(request, count));
            }
        }
        requests
    }
}
