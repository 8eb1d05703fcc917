//! The terminal on standard input while it is a port's: raw but for one key, and given back as it was.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::stdio::stdin;
use rustix::termios::{
    LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr,
};
use signal_hook::consts::SIGWINCH;

use crate::ports::Size;

/// Ctrl-], which interrupts the program, as Ctrl-C does elsewhere.
const END_KEY: u8 = 0x1d;
/// No key at all (_POSIX_VDISABLE).
const NO_KEY: u8 = 0;

/// Standard input that is a terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    before: Termios,
    resized: UnixStream,
}

impl Terminal {
    pub(crate) fn take() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // Our own log lines share the screen, and they end in a bare newline.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        raw.local_modes |= LocalModes::ISIG;
        raw.special_codes[SpecialCodeIndex::VINTR] = END_KEY;
        raw.special_codes[SpecialCodeIndex::VQUIT] = NO_KEY;
        raw.special_codes[SpecialCodeIndex::VSUSP] = NO_KEY;
        let (resized, raised) = UnixStream::pair()?;
        resized.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(SIGWINCH, raised)?;
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        eprintln!("cleave-serial: Ctrl-] ends it");
        Ok(Self { before, resized })
    }

    /// Readable when the terminal's size has changed.
    pub(crate) fn resized(&self) -> io::Result<OwnedFd> {
        self.resized.as_fd().try_clone_to_owned()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nothing is left to do where this fails: the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}

/// `None`: it is no terminal, or one that has no size.
pub(crate) fn size_of(terminal: BorrowedFd<'_>) -> Option<Size> {
    let size = tcgetwinsize(terminal).ok()?;
    (size.ws_col != 0 && size.ws_row != 0).then_some(Size { columns: size.ws_col, rows: size.ws_row })
}
