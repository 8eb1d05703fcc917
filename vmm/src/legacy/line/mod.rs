//! The line: what the uart's wires lead to on the host.
//!
//! vCPU threads write to its [`Output`] and never touch the host's end, which may be a full pipe or a slow disk: the
//! machine thread sends on what they wrote, and what is not taken is kept, up to a bound. Everything else (input, clients that come and go, the keys of a
//! terminal) is the machine thread's, through [`Line`].

mod output;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::PollFd;
use rustix::event::{PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use super::terminal::{Command, Keys, RawTerminal};
use crate::bus::Event;
use crate::config::UartConfig;
pub use output::{Output, Transmitter};

/// Bytes read from the host at once; not more than these wait for the guest to read them.
const INPUT_CHUNK: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum LineError {
    #[error("--uart file={path}: {source}", path = .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("--uart unix={path}: {source}", path = .path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("--uart unix={path}: a program already listens there", path = .0.display())]
    SocketBusy(PathBuf),
    #[error("--uart unix={path}: exists and is not a socket; it is left alone", path = .0.display())]
    NotASocket(PathBuf),
    #[error("--uart pty: {0}")]
    Pty(io::Error),
    #[error("--uart stdio: {0}")]
    Stdio(io::Error),
}

/// Where input comes from, and what keeps the line up.
enum End {
    /// No input will ever come.
    Mute,
    Stdio {
        input: Option<OwnedFd>,
        keys: Keys,
        terminal: Option<RawTerminal>,
    },
    /// The slave is held open: without it the master reads as hung up whenever nobody else has the terminal.
    Pty {
        input: OwnedFd,
        _slave: OwnedFd,
    },
    Socket {
        listener: UnixListener,
        path: PathBuf,
        client: Option<OwnedFd>,
    },
}

pub struct Line {
    end: End,
    output: Arc<Output>,
    /// Read from the host and not yet taken by the uart.
    pending: Vec<u8>,
}

impl Line {
    /// Opens the line. `wake` is signalled when the machine thread should call [`Line::serve`].
    pub fn open(config: &UartConfig, wake: &Arc<Event>) -> Result<Self, LineError> {
        let (end, sink) = match config {
            UartConfig::Off => (End::Mute, None),
            UartConfig::Stdio => open_stdio().map_err(LineError::Stdio)?,
            UartConfig::Pty => open_pty().map_err(LineError::Pty)?,
            UartConfig::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                let file = file.map_err(|source| LineError::File { path: path.clone(), source })?;
                (End::Mute, Some(file.into()))
            }
            UartConfig::Unix(path) => (listen(path)?, None),
        };
        let output = Arc::new(Output::new(sink, wake.clone()));
        Ok(Self { end, output, pending: Vec::new() })
    }

    /// The end that the uart writes to.
    pub fn output(&self) -> Arc<Output> {
        self.output.clone()
    }

    /// What the machine thread waits for on the line's behalf.
    pub fn interest(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let wants_input = self.pending.is_empty();
        let input = self.input().filter(|_| wants_input).map(|fd| (fd, PollFlags::IN));
        let newcomer = match &self.end {
            End::Socket { listener, client: None, .. } => Some((listener.as_fd(), PollFlags::IN)),
            _ => None,
        };
        input.into_iter().chain(newcomer)
    }

    /// Moves what can move in both directions, without waiting, and returns the commands typed at the terminal.
    /// `receive` takes input, and says how many bytes of it it had room for.
    pub fn serve(&mut self, receive: impl FnOnce(&[u8]) -> usize) -> Vec<Command> {
        self.accept();
        let mut commands = Vec::new();
        if self.pending.is_empty() && self.input().is_some_and(|fd| is_ready(fd, PollFlags::IN)) {
            commands = self.read_input();
        }
        let taken = receive(&self.pending);
        self.pending.drain(..taken);
        self.output.flush();
        commands
    }

    fn input(&self) -> Option<BorrowedFd<'_>> {
        match &self.end {
            End::Mute => None,
            End::Stdio { input, .. } => input.as_ref().map(AsFd::as_fd),
            End::Pty { input, .. } => Some(input.as_fd()),
            End::Socket { client, .. } => client.as_ref().map(AsFd::as_fd),
        }
    }

    fn read_input(&mut self) -> Vec<Command> {
        let Some(input) = self.input() else { return Vec::new() };
        let mut chunk = [0; INPUT_CHUNK];
        match rustix::io::read(input, &mut chunk) {
            Ok(0) => self.hang_up(),
            Ok(count) => {
                if let End::Stdio { keys, terminal: Some(_), .. } = &mut self.end {
                    return keys.sort(&chunk[..count], &mut self.pending);
                }
                self.pending.extend_from_slice(&chunk[..count]);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => self.hang_up(),
        }
        Vec::new()
    }

    /// The other end of the line went away: a socket waits for the next client, the rest stay silent.
    fn hang_up(&mut self) {
        match &mut self.end {
            End::Stdio { input, .. } => *input = None,
            End::Socket { client, .. } => {
                *client = None;
                self.output.connect(None);
            }
            End::Pty { .. } | End::Mute => self.end = End::Mute,
        }
    }

    fn accept(&mut self) {
        let End::Socket { listener, client: client @ None, .. } = &mut self.end else { return };
        if let Ok((stream, _)) = listener.accept()
            && let Ok(writer) = stream.try_clone()
        {
            *client = Some(stream.into());
            self.output.connect(Some(writer.into()));
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.output.flush();
        if let End::Socket { path, .. } = &self.end {
            // Somebody may have removed it already: then there is nothing to tidy.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn open_stdio() -> io::Result<(End, Option<OwnedFd>)> {
    let input = Some(rustix::stdio::stdin().try_clone_to_owned()?);
    let output = rustix::stdio::stdout().try_clone_to_owned()?;
    Ok((End::Stdio { input, keys: Keys::default(), terminal: RawTerminal::take() }, Some(output)))
}

fn open_pty() -> io::Result<(End, Option<OwnedFd>)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let path = ptsname(&master, Vec::new())?;
    let path = path.to_string_lossy().into_owned();
    let slave: OwnedFd = File::options().read(true).write(true).open(&path)?.into();
    // The line is for a person: no echo of what the guest prints back into the guest.
    let mut raw = rustix::termios::tcgetattr(&slave)?;
    raw.make_raw();
    rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &raw)?;
    eprintln!("cleave: the uart is at {path}");
    let output = master.try_clone()?;
    Ok((End::Pty { input: master, _slave: slave }, Some(output)))
}

fn listen(path: &PathBuf) -> Result<End, LineError> {
    let fail = |source| LineError::Socket { path: path.clone(), source };
    if let Ok(found) = std::fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt;
        if !found.file_type().is_socket() {
            return Err(LineError::NotASocket(path.clone()));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(LineError::SocketBusy(path.clone()));
        }
        std::fs::remove_file(path).map_err(fail)?;
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    Ok(End::Socket { listener, path: path.clone(), client: None })
}

/// Whether `fd` is ready for `what` now. Standard input and output may be shared with a shell, so they are asked
/// rather than made non-blocking.
fn is_ready(fd: BorrowedFd<'_>, what: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
}
