//! A port's other end on the host: who is there, and what goes to and comes from them. No call waits.
//!
//! ```text
//!   Listen ──a client knocks──> client ──gone──> (the next one)
//!   Connect ──somebody listens──> client ──gone──> (again, after a pause)
//!   Fixed: one client from the start
//!
//!   a client's end is readable or writable until a call says that it is not, and again when epoll says so
//! ```
//!
//! A line is *exclusive*: one client at a time has it, and each byte goes to one client once; or *shared*: what is printed
//! goes into a [`History`], from which each client reads at its own pace.
//!
//! Invariants: a client that does not read stops this line only, or misses bytes of a shared one, which it is told; an
//! exclusive client that has gone is kept until what it sent is read, or until another one knocks.

mod client;
mod exclusive;
mod open;
mod shared;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cleave_common::port::{Place, Sharing};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with,
};
use tracing::{debug, info, warn};

use crate::history::History;
use crate::ports::Size;
use crate::terminal::{Terminal, size_of};
use client::Client;
pub(crate) use exclusive::{Received, Sent};
pub(crate) use open::{NamedFile, OpenError, Opened, open};
use shared::Shared;

/// Most clients of a shared line.
const MAX_CLIENTS: usize = 16;

/// Between two attempts to connect: they double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// How long a file that takes nothing (its disk is full) is left alone, and a listener while descriptors are short.
const TROUBLE_PAUSE: Duration = Duration::from_secs(1);

/// How long after the death of a predecessor its client is taken to be there still.
const GRACE: Duration = Duration::from_secs(3);

/// Where clients come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// A listening socket that does not block.
    Listen(OwnedFd),
    Connect(PathBuf),
    Fixed(Option<Ends>),
}

impl Source {
    /// The descriptors that make one of the same kind elsewhere.
    pub(crate) fn into_fds(self) -> Vec<OwnedFd> {
        match self {
            Self::Listen(fd) => vec![fd],
            Self::Connect(_) | Self::Fixed(None) => Vec::new(),
            Self::Fixed(Some(Ends { input, output, kind })) => match (kind, input, output) {
                (Kind::Pty { slave }, Some(master), _) => vec![master, slave],
                (_, input, output) => input.into_iter().chain(output).collect(),
            },
        }
    }

    /// What such descriptors are for. `None`: they are not as many as are needed.
    pub(crate) fn from_fds(place: &Place, fds: Vec<OwnedFd>) -> Option<Result<Self, OpenError>> {
        let mut fds = fds.into_iter();
        let source = match (place, fds.next(), fds.next()) {
            (Place::UnixConnect(path), None, None) => Ok(Self::Connect(path.clone())),
            (Place::Log, None, None) => Ok(Self::Fixed(None)),
            (Place::Pty { .. }, Some(master), Some(slave)) => open::pty_ends(master, slave),
            (Place::Pipe(_), Some(input), Some(output)) => {
                Ok(Self::Fixed(Some(Ends { input: Some(input), output: Some(output), kind: Kind::Other })))
            }
            (Place::File(_), Some(file), None) => Ok(open::file_end(file)),
            (Place::UnixListen(_) | Place::Tcp(_), Some(listener), None) => open::listener(listener),
            _ => return None,
        };
        fds.next().is_none().then_some(source)
    }
}

/// Two ends of one thing, neither of which blocks.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) input: Option<OwnedFd>,
    pub(crate) output: Option<OwnedFd>,
    pub(crate) kind: Kind,
}

/// What an end is, as far as that matters to whoever writes to it.
#[derive(Debug)]
pub(crate) enum Kind {
    Socket,
    /// A regular file, which is appended to.
    File,
    /// A pseudo-terminal's master. The slave is held open: without it the master is hung up whenever nobody else has it.
    Pty {
        slave: OwnedFd,
    },
    Other,
}

/// Of what an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Listener,
    Input(u32),
    Output(u32),
    Terminal,
}

#[derive(Debug)]
pub(crate) struct Line {
    source: Source,
    clients: Vec<Client>,
    shared: Option<Shared>,
    /// Somebody may be in the listener's backlog.
    knock: bool,
    /// Nothing is tried before.
    retry_at: Option<Instant>,
    pause: Duration,
    /// Until then a predecessor's client is taken to be there.
    lingers_until: Option<Instant>,
    next_id: u32,
    /// The terminal of standard input, and by what its size is told to have changed.
    terminal: Option<(Terminal, OwnedFd)>,
    file: Option<NamedFile>,
    size: Option<Size>,
}

/// Where a line says what it waits for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watch<'e> {
    pub(crate) epoll: BorrowedFd<'e>,
    pub(crate) token: fn(u32, Part) -> u64,
    pub(crate) port: u32,
}

impl Watch<'_> {
    /// `false`: it is a file that is always ready.
    fn add(&self, fd: BorrowedFd<'_>, part: Part, flags: EventFlags) -> io::Result<bool> {
        let data = EventData::new_u64((self.token)(self.port, part));
        match epoll::add(self.epoll, fd, data, flags | EventFlags::ET) {
            Ok(()) => Ok(true),
            Err(Errno::PERM) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Line {
    pub(crate) fn new(opened: Opened, sharing: Option<Sharing>, watch: &Watch<'_>) -> io::Result<Self> {
        let Opened { mut source, file, terminal } = opened;
        let terminal = terminal.map(|terminal| terminal.resized().map(|fd| (terminal, fd))).transpose()?;
        let mut size = None;
        if let Some((_, resized)) = &terminal {
            watch.add(resized.as_fd(), Part::Terminal, EventFlags::IN)?;
            size = size_of(rustix::stdio::stdin());
        }
        let ends = match &mut source {
            Source::Listen(listener) => {
                watch.add(listener.as_fd(), Part::Listener, EventFlags::IN)?;
                None
            }
            Source::Connect(_) => None,
            Source::Fixed(ends) => ends.take(),
        };
        let mut line = Self {
            source,
            clients: Vec::new(),
            shared: sharing.map(Shared::new),
            knock: true,
            retry_at: None,
            pause: FIRST_PAUSE,
            lingers_until: None,
            next_id: 0,
            terminal,
            file,
            size,
        };
        ends.map_or(Ok(()), |ends| line.admit(ends, watch))?;
        Ok(line)
    }

    /// The file that is to be removed in the end.
    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_ref().map(NamedFile::path)
    }

    /// Whether what the guest writes has somewhere to go.
    pub(crate) fn is_open(&self) -> bool {
        self.shared.is_some() || !self.clients.is_empty() || self.lingers_until.is_some()
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    pub(crate) fn clients(&self) -> usize {
        self.clients.len()
    }

    pub(crate) fn history(&self) -> Option<&History> {
        self.shared.as_ref().map(|shared| &shared.history)
    }

    /// Bytes that a client missed, of all there ever were.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.as_ref().map_or(0, |shared| shared.dropped)
    }

    /// Bytes in the file at the other end, if it is one.
    pub(crate) fn file_len(&self) -> Option<u64> {
        self.clients.first()?.file_len()
    }

    /// A predecessor's client may not have come again yet.
    pub(crate) fn linger(&mut self) {
        if self.clients.is_empty() {
            self.lingers_until = Some(Instant::now() + GRACE);
        }
    }

    /// The size that somebody has told since this was asked last.
    pub(crate) fn take_size(&mut self) -> Option<Size> {
        self.size.take()
    }

    pub(crate) fn tell_size(&mut self, size: Size) {
        self.size = Some(size);
    }

    /// When [`Line::look`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let retry = self.retry_at.filter(|_| self.wants_client() || self.clients.iter().any(Client::is_file));
        [retry, self.lingers_until].into_iter().flatten().min()
    }

    /// Takes note of what epoll says.
    pub(crate) fn hear(&mut self, part: Part, events: EventFlags) {
        let of = |id: u32| move |client: &&mut Client| client.id == id;
        match part {
            Part::Listener => self.knock = true,
            Part::Input(id) => {
                if let Some(client) = self.clients.iter_mut().find(of(id)) {
                    client.readable = true;
                    client.hung_up |= events.intersects(EventFlags::HUP | EventFlags::ERR);
                }
            }
            Part::Output(id) => {
                if let Some(client) = self.clients.iter_mut().find(of(id)) {
                    client.writable = true;
                }
            }
            Part::Terminal => {
                if let Some((_, resized)) = &self.terminal {
                    let _ = rustix::io::read(resized, &mut [0; 64]);
                    self.size = size_of(rustix::stdio::stdin());
                }
            }
        }
    }

    /// Takes leave of clients that have gone, and lets others in.
    pub(crate) fn look(&mut self, watch: &Watch<'_>) {
        let now = Instant::now();
        if self.lingers_until.is_some_and(|until| until <= now || !self.clients.is_empty()) {
            self.lingers_until = None;
        }
        if self.retry_at.take_if(|at| *at <= now).is_some() {
            self.knock = true;
            self.clients.iter_mut().filter(|client| client.is_file()).for_each(|file| file.writable = true);
        }
        self.clients.iter_mut().for_each(Client::notice_end);
        self.forget(|client| client.is_gone());
        while self.retry_at.is_none() && self.knock {
            let room = self.wants_client();
            match self.next_client(room) {
                Ok(Some(ends)) => {
                    // Of an exclusive line: its last client has hung up.
                    if self.shared.is_none() {
                        self.forget(|_| true);
                    }
                    if let Err(error) = self.admit(ends, watch) {
                        warn!("port {}: a client cannot be served: {error}", watch.port);
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    warn!("port {}: no client can be had now: {error}", watch.port);
                    self.retry_at = Some(now + TROUBLE_PAUSE);
                }
            }
        }
    }

    fn forget(&mut self, is_gone: impl Fn(&Client) -> bool) {
        let before = self.clients.len();
        self.clients.retain(|client| !is_gone(client));
        if self.clients.len() != before {
            debug!("a client has gone");
            self.knock = true;
        }
    }

    /// Whether there is room for one.
    fn wants_client(&self) -> bool {
        match &self.shared {
            Some(_) => self.clients.len() < MAX_CLIENTS,
            None => self.clients.iter().all(|client| client.hung_up),
        }
    }

    /// Somebody who wants to be a client. `None`: nobody does, or there is no `room`.
    fn next_client(&mut self, room: bool) -> io::Result<Option<Ends>> {
        let ends = |fd: OwnedFd| {
            let output = fd.try_clone()?;
            Ok(Some(Ends { input: Some(fd), output: Some(output), kind: Kind::Socket }))
        };
        match &self.source {
            Source::Listen(listener) if room => {
                match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(fd) => ends(fd),
                    Err(Errno::AGAIN) => {
                        self.knock = false;
                        Ok(None)
                    }
                    Err(Errno::INTR | Errno::CONNABORTED) => Ok(None),
                    Err(errno) => Err(errno.into()),
                }
            }
            Source::Connect(path) if room && self.clients.is_empty() => match dial(path) {
                Ok(fd) => {
                    self.pause = FIRST_PAUSE;
                    ends(fd)
                }
                Err(error) => {
                    debug!("cannot connect to {}: {error}", path.display());
                    self.retry_at = Some(Instant::now() + self.pause);
                    self.pause = LAST_PAUSE.min(self.pause * 2);
                    Ok(None)
                }
            },
            Source::Listen(_) | Source::Connect(_) | Source::Fixed(_) => Ok(None),
        }
    }

    fn admit(&mut self, ends: Ends, watch: &Watch<'_>) -> io::Result<()> {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let place = self.shared.as_ref().map_or(0, Shared::place_of_newcomer);
        let mut client = Client::new(id, ends, place);
        client.watch(watch)?;
        info!("port {}: a client is there", watch.port);
        self.clients.push(client);
        Ok(())
    }
}

fn dial(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // On a unix socket this is done or refused at once; EAGAIN is a backlog that is full.
    connect(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}
