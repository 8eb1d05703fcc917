//! The line: what the uart's wires lead to on the host.
//!
//! vCPU threads write to its [`Output`] and never touch the host's end, which may be a full pipe or a slow disk: the
//! machine thread sends on what they wrote, and what is not taken is kept, up to a bound. Everything else (input, clients that come and go, the keys of a
//! terminal) is the machine thread's, through [`Line`].

mod output;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cleave_common::socket::{self, ListenError, SocketFile};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use rustix::termios::isatty;

use super::terminal::{Command, Keys, Terminal};
use crate::bus::Event;
use crate::config::UartConfig;
pub use output::{Output, Transmitter};

/// Bytes read from the host at once.
const INPUT_CHUNK: usize = 256;
/// Input that waits for the guest to read it, in bytes. Beyond it the host's end has to wait; a person's keys are
/// dropped instead, because ours are among them.
const MOST_PENDING: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum LineError {
    #[error("--uart file={path}: {source}", path = .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("--uart unix={path}: {source}", path = .path.display())]
    Socket { path: PathBuf, source: ListenError },
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
        terminal: Option<Terminal>,
    },
    /// The slave is held open: without it the master reads as hung up whenever nobody else has the terminal.
    Pty {
        input: OwnedFd,
        _slave: OwnedFd,
    },
    Socket {
        listener: UnixListener,
        _file: SocketFile,
        client: Option<Client>,
    },
}

struct Client {
    socket: OwnedFd,
    /// It will send no more, but still listens.
    silent: bool,
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
                // A FIFO without a reader is refused this way; otherwise its opening would wait for one.
                let flags = OFlags::NONBLOCK.bits() as i32;
                let file = OpenOptions::new().create(true).append(true).custom_flags(flags).open(path);
                let file = file.map_err(|source| LineError::File { path: path.clone(), source })?;
                (End::Mute, Some(file.into()))
            }
            UartConfig::Unix(path) => (open_socket(path)?, None),
        };
        let output = Arc::new(Output::new(sink, wake.clone()));
        Ok(Self { end, output, pending: Vec::new() })
    }

    /// The end that the uart writes to.
    pub fn output(&self) -> Arc<Output> {
        self.output.clone()
    }

    /// Takes the person's terminal, where standard input is one: from now on the keys are the guest's.
    pub fn take_terminal(&mut self) {
        if let End::Stdio { terminal, .. } = &mut self.end {
            *terminal = Terminal::take().unwrap_or_else(|error| {
                tracing::warn!("the terminal stays as it is: {error}");
                None
            });
        }
    }

    /// What the machine thread waits for on the line's behalf.
    pub fn interest(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let input = self.input().filter(|_| self.has_room()).map(|fd| (fd, PollFlags::IN));
        let rest = match &self.end {
            End::Socket { listener, client: None, .. } => Some((listener.as_fd(), PollFlags::IN)),
            // That a client is gone is told without being asked for.
            End::Socket { client: Some(client), .. } => Some((client.socket.as_fd(), PollFlags::empty())),
            _ => None,
        };
        let terminal = self.terminal().map(Terminal::fds).into_iter().flatten();
        input.into_iter().chain(rest).chain(terminal.map(|fd| (fd, PollFlags::IN)))
    }

    /// Moves what can move in both directions, without waiting, and returns the commands typed at the terminal.
    /// `receive` takes input, and says how many bytes of it it had room for.
    pub fn serve(&mut self, receive: impl FnOnce(&[u8]) -> usize) -> Vec<Command> {
        if let End::Stdio { terminal: Some(terminal), .. } = &mut self.end {
            terminal.serve();
        }
        self.accept();
        let mut commands = Vec::new();
        if self.has_room() && self.input().is_some_and(|fd| !ready(fd, PollFlags::IN).is_empty()) {
            commands = self.read_input();
        }
        let taken = receive(&self.pending);
        self.pending.drain(..taken);
        self.output.flush();
        self.forget_client();
        commands
    }

    fn input(&self) -> Option<BorrowedFd<'_>> {
        match &self.end {
            End::Mute => None,
            // A terminal that is not ours now is read by somebody else.
            End::Stdio { terminal: Some(terminal), .. } if !terminal.is_ours() => None,
            End::Stdio { input, .. } => input.as_ref().map(AsFd::as_fd),
            End::Pty { input, .. } => Some(input.as_fd()),
            End::Socket { client, .. } => {
                client.as_ref().filter(|client| !client.silent).map(|c| c.socket.as_fd())
            }
        }
    }

    fn terminal(&self) -> Option<&Terminal> {
        match &self.end {
            End::Stdio { terminal, .. } => terminal.as_ref(),
            _ => None,
        }
    }

    /// Whether input is to be read. At a terminal always: whoever types may want to quit a guest that does not read.
    fn has_room(&self) -> bool {
        self.terminal().is_some() || self.pending.len() < MOST_PENDING
    }

    fn read_input(&mut self) -> Vec<Command> {
        let Some(input) = self.input() else { return Vec::new() };
        let mut chunk = [0; INPUT_CHUNK];
        match rustix::io::read(input, &mut chunk) {
            Ok(0) => self.end_input(),
            Ok(count) => {
                if let End::Stdio { keys, terminal: Some(_), .. } = &mut self.end {
                    let commands = keys.sort(&chunk[..count], &mut self.pending);
                    self.pending.truncate(MOST_PENDING);
                    return commands;
                }
                self.pending.extend_from_slice(&chunk[..count]);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => self.end_input(),
        }
        Vec::new()
    }

    /// No more input comes: a client of the socket may still listen, the others stay silent.
    fn end_input(&mut self) {
        match &mut self.end {
            End::Stdio { input, .. } => *input = None,
            End::Socket { client, .. } => client.iter_mut().for_each(|client| client.silent = true),
            End::Pty { .. } | End::Mute => self.end = End::Mute,
        }
    }

    /// A client that has closed makes room for the next.
    fn forget_client(&mut self) {
        let End::Socket { client, .. } = &mut self.end else { return };
        let gone = |client: &Client| {
            ready(client.socket.as_fd(), PollFlags::empty()).intersects(PollFlags::HUP | PollFlags::ERR)
        };
        if client.as_ref().is_some_and(gone) {
            *client = None;
            self.output.connect(None);
        }
    }

    fn accept(&mut self) {
        let End::Socket { listener, client: client @ None, .. } = &mut self.end else { return };
        if let Ok((stream, _)) = listener.accept()
            && stream.set_nonblocking(true).is_ok()
            && let Ok(writer) = stream.try_clone()
        {
            *client = Some(Client { socket: stream.into(), silent: false });
            self.output.connect(Some(writer.into()));
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.output.flush();
    }
}

fn open_stdio() -> io::Result<(End, Option<OwnedFd>)> {
    let input = Some(rustix::stdio::stdin().try_clone_to_owned()?);
    Ok((End::Stdio { input, keys: Keys::default(), terminal: None }, Some(open_stdout()?)))
}

/// A terminal that is ready may still take less than is written and wait for the rest, so it is opened once more,
/// non-blocking: its open file is shared with a shell, which must not find it changed. A pipe that is ready takes a
/// whole chunk, and a file has its own place in it.
fn open_stdout() -> io::Result<OwnedFd> {
    let stdout = rustix::stdio::stdout();
    if isatty(stdout) {
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
        let again = OpenOptions::new().write(true).custom_flags(flags).open("/proc/self/fd/1");
        // Refused where the terminal is somebody else's (su): then as it is.
        if let Ok(terminal) = again {
            return Ok(terminal.into());
        }
    }
    stdout.try_clone_to_owned()
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
    rustix::io::ioctl_fionbio(&master, true)?;
    eprintln!("cleave: the uart is at {path}");
    let output = master.try_clone()?;
    Ok((End::Pty { input: master, _slave: slave }, Some(output)))
}

fn open_socket(path: &Path) -> Result<End, LineError> {
    let (listener, file) =
        socket::listen(path).map_err(|source| LineError::Socket { path: path.to_owned(), source })?;
    Ok(End::Socket { listener, _file: file, client: None })
}

/// Which of `what` `fd` is ready for now, and whether it has hung up. Standard input may be shared with a shell, so it
/// is asked rather than made non-blocking.
fn ready(fd: BorrowedFd<'_>, what: PollFlags) -> PollFlags {
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    match poll(&mut fds, Some(&Timespec::default())) {
        Ok(1) => fds[0].revents(),
        _ => PollFlags::empty(),
    }
}
