//! What an administrator says by signals, as a file descriptor, so that the one loop that waits sees it too.
#![expect(unsafe_code, reason = "signal masks and signalfd have no safe wrapper here")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes of a `signalfd_siginfo`, which starts with the signal's number.
const SIGINFO_LEN: usize = 128;

/// Readable once a signal has come.
#[derive(Debug)]
pub struct Signals(OwnedFd);

/// Where a server hears what is asked of it: readable when something is.
pub(crate) trait Orders: AsFd {
    /// Takes the next order, if one has come.
    fn take(&self) -> Option<Asked>;
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// SIGTERM, SIGINT: end.
    End,
    /// SIGHUP: look at what is served again, it may have changed.
    Reload,
    /// SIGUSR1: say how things are.
    Report,
}

impl Signals {
    /// Blocks the signals in this thread and those it starts from now on: call it before the first thread.
    pub fn new() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises `set`; all other calls take it initialised, and valid signal numbers.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd has just made `fd`, and nobody else knows of it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

impl Orders for Signals {
    fn take(&self) -> Option<Asked> {
        let mut info = [0; SIGINFO_LEN];
        match rustix::io::read(&self.0, &mut info) {
            Ok(SIGINFO_LEN) if info[..4] == libc::SIGHUP.to_ne_bytes() => Some(Asked::Reload),
            Ok(SIGINFO_LEN) if info[..4] == libc::SIGUSR1.to_ne_bytes() => Some(Asked::Report),
            Ok(SIGINFO_LEN) => Some(Asked::End),
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
