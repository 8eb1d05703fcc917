//! passt as a port: a network for a guest without any privilege.
//!
//! ```text
//!   guest <──rings──> this <──frames in a stream──> passt <──the user's own sockets──> the world
//!
//!   connected ──passt ends, or talks nonsense──> lost ──the keeper has another one──> connected
//!                                                  └──the keeper is gone, too──> this process ends
//! ```
//!
//! There is no virtio-net header on the way, so nobody could complete a checksum or cut a segment that the guest has left
//! to the device: neither is offered. Large frames come from a large MTU instead, which costs nothing here, for TCP ends
//! in passt. What comes from passt crossed no wire: its checksums are vouched for (`DATA_VALID`).
//!
//! Invariants: both directions use one socket, or none; another one is put in place, and the guest's link follows, on the
//! thread that serves the session. A frame for a passt that is not there is dropped, and counted.

mod backoff;
mod command;
mod error;
mod keeper;
mod report;
mod stream;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cleave_common::exit::ExitCode;
use cleave_common::mac::MacAddress;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{Shutdown, shutdown};
use tracing::{debug, error, warn};

use crate::buffers::GuestBuffers;
use crate::config_space::{HEADER_LEN, feature, header_len};
use crate::port::Port;
pub(crate) use command::UserOptions;
pub(crate) use error::UserError;
use report::{Received, Report, receive};
use stream::{Incoming, Outgoing, StreamError};

/// What passt gives guests unless told: the largest that fits its frames.
pub(crate) const DEFAULT_MTU: u16 = 65520;

/// How long the forwarded ports may still be those of the passt of a daemon that was killed: it ends, but not at once.
const PREDECESSOR: Duration = Duration::from_secs(1);

/// Header flags (virtio 1.2, 5.1.6).
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

#[derive(Debug)]
pub(crate) struct UserNetwork {
    mtu: u16,
    /// Bytes of the guest's header.
    header: AtomicU8,
    connected: AtomicBool,
    receiving: Mutex<Receiving>,
    sending: Mutex<Sending>,
    /// Epoll sets of the socket, whichever it is: the queues' threads wait by these.
    readable: OwnedFd,
    writable: OwnedFd,
    /// Readable when passt has been lost.
    lost: OwnedFd,
    /// An epoll set of all that says that the link has changed.
    changes: OwnedFd,
    supervision: Mutex<Supervision>,
}

#[derive(Debug, Default)]
struct Receiving {
    socket: Option<Arc<OwnedFd>>,
    frames: Incoming,
}

#[derive(Debug, Default)]
struct Sending {
    socket: Option<Arc<OwnedFd>>,
    frames: Outgoing,
}

/// What is known of passt.
#[derive(Debug)]
struct Supervision {
    control: OwnedFd,
    program: PathBuf,
    /// The process that serves.
    pid: Option<u32>,
    /// How many have served.
    served: u32,
    /// Why there is none.
    why: String,
    keeper_gone: bool,
}

impl UserNetwork {
    /// Starts passt, and waits until it serves. Call it before there is a thread, and before signals are blocked.
    pub(crate) fn open(options: &UserOptions, guest: MacAddress) -> Result<Self, UserError> {
        let control = keeper::start(options, guest).map_err(UserError::Keeper)?;
        let patience = if options.passt.forwards.is_empty() { Duration::ZERO } else { PREDECESSOR };
        let begun = Instant::now();
        let (pid, socket) = loop {
            match receive(&control)? {
                Received::Report(Report::Serving { pid }, Some(socket)) => break (pid, socket),
                Received::Report(Report::Ended { .. }, _) if begun.elapsed() < patience => {}
                Received::Report(report, _) => return Err(refusal(report, &options.program)),
                Received::Gone | Received::Nothing => return Err(UserError::KeeperGone),
            }
        };
        fcntl_setfl(&control, fcntl_getfl(&control).map_err(io::Error::from)? | OFlags::NONBLOCK)
            .map_err(io::Error::from)?;
        let supervision = Supervision {
            control,
            program: options.program.clone(),
            pid: None,
            served: 0,
            why: String::new(),
            keeper_gone: false,
        };
        let network = Self::with(options.mtu, supervision)?;
        network.serves(&mut network.supervision(), pid, socket)?;
        Ok(network)
    }

    fn with(mtu: u16, supervision: Supervision) -> io::Result<Self> {
        let lost = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let set = || epoll::create(CreateFlags::CLOEXEC);
        let changes = set()?;
        for fd in [supervision.control.as_fd(), lost.as_fd()] {
            epoll::add(&changes, fd, EventData::new_u64(0), EventFlags::IN)?;
        }
        Ok(Self {
            mtu,
            header: AtomicU8::new(HEADER_LEN),
            connected: AtomicBool::new(false),
            receiving: Mutex::default(),
            sending: Mutex::default(),
            readable: set()?,
            writable: set()?,
            lost,
            changes,
            supervision: Mutex::new(supervision),
        })
    }

    fn receiving(&self) -> MutexGuard<'_, Receiving> {
        self.receiving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn supervision(&self) -> MutexGuard<'_, Supervision> {
        self.supervision.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is a passt: process `pid`, by `socket`.
    fn serves(&self, supervision: &mut Supervision, pid: u32, socket: OwnedFd) -> io::Result<()> {
        let socket = Arc::new(socket);
        let (mut receiving, mut sending) = (self.receiving(), self.sending());
        for (set, flags) in [(&self.readable, EventFlags::IN), (&self.writable, EventFlags::OUT)] {
            epoll::add(set, &socket, EventData::new_u64(0), flags | EventFlags::ET)?;
        }
        (receiving.socket, sending.socket) = (Some(socket.clone()), Some(socket));
        receiving.frames.forget();
        sending.frames.forget();
        self.connected.store(true, Ordering::Release);
        supervision.pid = Some(pid);
        supervision.served += 1;
        match supervision.served {
            1 => debug!("passt serves, as process {pid}"),
            _ => warn!("passt serves again, as process {pid}; connections through the one before are lost"),
        }
        Ok(())
    }

    /// There is none on `socket` any more: whoever finds it out has the lock of it.
    fn lose(&self, socket: &mut Option<Arc<OwnedFd>>) {
        if let Some(socket) = socket.take() {
            // It may be there, and talk nonsense: this ends it.
            let _ = shutdown(&socket, Shutdown::Both);
            self.connected.store(false, Ordering::Release);
            let _ = rustix::io::write(&self.lost, &1u64.to_ne_bytes());
        }
    }

    /// Hears what the keeper has to say.
    fn hear(&self) {
        let mut supervision = self.supervision();
        while !supervision.keeper_gone {
            match receive(&supervision.control) {
                Ok(Received::Nothing) => break,
                Ok(Received::Report(Report::Serving { pid }, Some(socket))) => {
                    if let Err(error) = self.serves(&mut supervision, pid, socket) {
                        warn!("passt cannot be used: {error}");
                    }
                }
                Ok(Received::Report(report, _)) => {
                    self.lose(&mut self.receiving().socket);
                    self.lose(&mut self.sending().socket);
                    supervision.ended(report);
                }
                Ok(Received::Gone) | Err(_) => {
                    supervision.keeper_gone = true;
                    let _ = epoll::delete(&self.changes, &supervision.control);
                }
            }
        }
        if supervision.keeper_gone && !self.connected.load(Ordering::Acquire) {
            error!("{}", UserError::KeeperGone);
            std::process::exit(ExitCode::Host as i32);
        }
    }

    /// What has become of a frame that was to be sent.
    fn sent(&self, sending: &mut Sending, sent: io::Result<()>) -> io::Result<()> {
        sent.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected => {
                self.lose(&mut sending.socket);
                no_link()
            }
            _ => error,
        })
    }
}

impl Supervision {
    /// It has ended, or could not be started. That it still cannot is said once.
    fn ended(&mut self, report: Report) {
        let what = match self.pid.take() {
            Some(pid) => format!("passt (process {pid})"),
            None => "passt".to_owned(),
        };
        let why = match refusal(report, &self.program) {
            UserError::Ended { how, said } => format!("{what} {how}{said}"),
            error => cleave_common::exit::one_line(&error),
        };
        if why == self.why {
            debug!("{why}");
        } else {
            warn!("{why}; it is started again");
        }
        self.why = why;
    }
}

/// What a report of a passt that does not serve says.
fn refusal(report: Report, program: &Path) -> UserError {
    let program = program.to_owned();
    match report {
        Report::Failed(libc::ENOENT) => UserError::NoProgram(program),
        Report::Failed(errno) => UserError::Start { program, source: io::Error::from_raw_os_error(errno) },
        Report::Ended { status, said } => {
            let status = ExitStatus::from_raw(status);
            let how = match (status.code(), status.signal()) {
                (None, Some(signal)) => format!("was killed by signal {signal}"),
                (code, _) => format!("ended with exit code {}", code.unwrap_or_default()),
            };
            let said = if said.is_empty() { said } else { format!(": {said}") };
            UserError::Ended { how, said }
        }
        Report::Serving { pid } => UserError::Ended {
            how: format!("serves as process {pid}, without a socket"),
            said: String::new(),
        },
    }
}

/// What a device that is down says.
fn no_link() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

/// Copies `bytes` to `offset` bytes from the start of `buffers`, and what does not fit there into `spill`.
fn put(buffers: &GuestBuffers, spill: &mut [u8], offset: usize, bytes: &[u8]) {
    let fits = buffers.len().saturating_sub(offset).min(bytes.len());
    let (inside, outside) = bytes.split_at(fits);
    buffers.write_at(offset, inside);
    let at = (offset + fits).saturating_sub(buffers.len());
    let room = spill.len().saturating_sub(at).min(outside.len());
    spill[at..at + room].copy_from_slice(&outside[..room]);
}

impl Port for UserNetwork {
    fn features(&self) -> u64 {
        feature::GUEST_CSUM
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn configure(&self, features: u64) -> io::Result<()> {
        self.header.store(header_len(features), Ordering::Relaxed);
        Ok(())
    }

    fn set_active(&self, pair: u16, active: bool) -> io::Result<()> {
        if pair == 0 || !active { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn fd(&self, _pair: u16) -> Option<BorrowedFd<'_>> {
        Some(self.readable.as_fd())
    }

    fn room(&self, _pair: u16) -> Option<(BorrowedFd<'_>, EventFlags)> {
        // An epoll set is only ever readable.
        Some((self.writable.as_fd(), EventFlags::IN))
    }

    fn receive(&self, _pair: u16, buffers: &mut GuestBuffers, spill: &mut [u8]) -> io::Result<usize> {
        let mut receiving = self.receiving();
        let Receiving { socket, frames } = &mut *receiving;
        let Some(from) = socket.as_ref() else { return Err(io::ErrorKind::WouldBlock.into()) };
        match frames.next(|room| rustix::io::read(from, room).map_err(io::Error::from)) {
            Ok(Some(frame)) => {
                let header = usize::from(self.header.load(Ordering::Relaxed));
                let mut fields = [0; HEADER_LEN as usize];
                fields[0] = DATA_VALID;
                put(buffers, spill, 0, &fields[..header]);
                put(buffers, spill, header, frame);
                return Ok(header + frame.len());
            }
            Ok(None) => {}
            Err(error) => {
                match error {
                    StreamError::Closed => debug!("passt: {error}"),
                    _ => warn!("passt: {error}; it is ended"),
                }
                self.lose(socket);
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send(&self, _pair: u16, frame: &GuestBuffers) -> io::Result<()> {
        let mut flags = [0; 2];
        frame.read_at(0, &mut flags);
        if flags[0] & NEEDS_CSUM != 0 || flags[1] != 0 {
            return Err(io::Error::other("it leaves work to the device that the device has not offered"));
        }
        let mut sending = self.sending();
        let Sending { socket: Some(socket), frames } = &mut *sending else { return Err(no_link()) };
        let sent = frames.send(socket, frame, self.header.load(Ordering::Relaxed).into());
        self.sent(&mut sending, sent)
    }

    fn flush(&self, _pair: u16) -> io::Result<()> {
        let mut sending = self.sending();
        let Sending { socket: Some(socket), frames } = &mut *sending else { return Ok(()) };
        let sent = frames.flush(socket);
        self.sent(&mut sending, sent)
    }

    fn is_gone(&self) -> bool {
        // As long as this process is there, there may be another passt.
        false
    }

    fn link_is_up(&self) -> bool {
        let _ = rustix::io::read(&self.lost, &mut [0; 8]);
        self.hear();
        self.connected.load(Ordering::Acquire)
    }

    fn link_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.changes.as_fd())
    }

    fn report(&self) -> Option<String> {
        let supervision = self.supervision();
        let again = match supervision.served.saturating_sub(1) {
            0 => String::new(),
            times => format!(", started again {times} times"),
        };
        Some(match supervision.pid {
            Some(pid) => format!("passt is process {pid}{again}"),
            None => format!("no passt serves{again}: {}", supervision.why),
        })
    }
}
