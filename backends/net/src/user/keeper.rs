//! The process that starts passt, and starts it again: a fork of the daemon, made before that gives up what it takes.
//!
//! ```text
//!   the daemon ──fork──> keeper ──spawn──> passt --fd N
//!       │                  │ looks every 2 ms whether passt reads its first frame  │
//!       │<── Serving(pid, socket) ──┘                                              │
//!       │                  <── it ends: Ended, a pause, another one ───────────────┘
//!       └── ends, however ──> the keeper ends passt, and itself
//! ```
//!
//! The daemon itself cannot: in its sandbox it executes nothing, and what it executed would inherit Landlock, in which
//! passt cannot set up its own sandbox. A confined keeper could not either. So the keeper is left as it was started, but
//! for new privileges, and nobody speaks to it: it never reads from the daemon.
//!
//! Invariants: the keeper holds no descriptor of the daemon's but its end of the control socket, above all not the
//! frontend's; the daemon's end of a socket to passt is not kept here, so passt sees the daemon's end; a socket is handed
//! over only when passt serves it.
#![expect(
    unsafe_code,
    reason = "a process is forked, its descriptors are closed, and passt is told when its parent dies"
)]

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cleave_common::mac::MacAddress;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};
use rustix::thread::{set_name, set_no_new_privs};
use tracing::info;

use super::backoff::Backoff;
use super::command::UserOptions;
use super::report::{Report, send};
use super::stream;

/// How often it is looked whether passt serves already.
const LOOK: Duration = Duration::from_millis(2);

/// Bytes of a line of passt's that are kept.
const MAX_LINE: usize = 400;

/// Forks the keeper, and gives the daemon's end of the control socket. Call it before there is a thread, and before
/// signals are blocked, which passt would inherit.
pub(super) fn start(options: &UserOptions, guest: MacAddress) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let (daemons, keepers) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // SAFETY: there is one thread, so the child finds all locks free and all memory whole.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            close_all_but(&keepers);
            Keeper { control: keepers, options: options.clone(), guest }.run()
        }
        _ => Ok(daemons),
    }
}

/// Whoever waits for the end of one of the daemon's descriptors must not wait for this process's.
fn close_all_but(kept: &OwnedFd) {
    let kept = kept.as_raw_fd().unsigned_abs();
    for (first, last) in [(3, kept.saturating_sub(1)), (kept.saturating_add(1), u32::MAX)] {
        if first <= last {
            // SAFETY: what owns these descriptors is never dropped or used in this process, which leaves by exit.
            unsafe { libc::close_range(first, last, 0) };
        }
    }
}

struct Keeper {
    control: OwnedFd,
    options: UserOptions,
    guest: MacAddress,
}

/// What came of one passt.
enum Outcome {
    /// After it had served for so long, if it did.
    Ended { served: Option<Duration>, status: ExitStatus, said: String },
    /// The daemon is no more.
    Alone,
}

impl Keeper {
    fn run(self) -> ! {
        let _ = set_name(c"passt-keeper");
        let _ = set_no_new_privs(true);
        let mut backoff = Backoff::default();
        loop {
            let (report, served) = match self.attempt() {
                Ok(Outcome::Alone) => std::process::exit(0),
                Ok(Outcome::Ended { served, status, said }) => {
                    (Report::Ended { status: status.into_raw(), said }, served)
                }
                Err(error) => (Report::Failed(error.raw_os_error().unwrap_or(libc::EIO)), None),
            };
            // Nobody there to hear it: there is nothing left to do.
            if send(&self.control, &report, None).is_err() || self.is_alone_after(backoff.pause_after(served))
            {
                std::process::exit(0);
            }
        }
    }

    /// Whether the daemon ends within `pause`.
    fn is_alone_after(&self, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        loop {
            let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).unwrap_or_default();
            match poll(&mut [PollFd::new(&self.control, PollFlags::IN)], Some(&left)) {
                Err(Errno::INTR) => {}
                polled => return polled != Ok(0),
            }
        }
    }

    /// One passt, from its start to its end.
    fn attempt(&self) -> io::Result<Outcome> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // What passt makes nothing of: it only shows when passt begins to read.
        rustix::io::write(&ours, &stream::nothing(self.guest))?;
        fcntl_setfl(&ours, fcntl_getfl(&ours)? | OFlags::NONBLOCK)?;
        let mut child = self.spawn(&theirs)?;
        drop(theirs);
        let attempt = Passt::new(&mut child, ours).and_then(|passt| passt.watch(self));
        if !matches!(attempt, Ok(Outcome::Ended { .. })) {
            let _ = child.kill();
            let _ = child.wait();
        }
        attempt
    }

    fn spawn(&self, socket: &OwnedFd) -> io::Result<Child> {
        fcntl_setfd(socket, FdFlags::empty())?;
        let mut command = Command::new(&self.options.program);
        command.args(self.options.arguments()).arg("--fd").arg(socket.as_raw_fd().to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // SAFETY: the closure makes a system call, and neither allocates nor locks.
        unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
        command.spawn()
    }
}

/// One that runs.
struct Passt<'c> {
    child: &'c mut Child,
    pidfd: OwnedFd,
    lines: Lines,
    /// The daemon's end of its socket, until passt serves it.
    socket: Option<OwnedFd>,
    served_since: Option<Instant>,
}

impl<'c> Passt<'c> {
    fn new(child: &'c mut Child, socket: OwnedFd) -> io::Result<Self> {
        let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        let lines = Lines::new(child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?)?;
        Ok(Self { child, pidfd, lines, socket: Some(socket), served_since: None })
    }

    fn watch(mut self, keeper: &Keeper) -> io::Result<Outcome> {
        loop {
            let mut fds =
                vec![PollFd::new(&keeper.control, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
            fds.extend(self.lines.pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            let look = self.socket.as_ref().and_then(|_| Timespec::try_from(LOOK).ok());
            match poll(&mut fds, look.as_ref()) {
                Err(Errno::INTR) => continue,
                polled => polled?,
            };
            let [alone, ended] = [0, 1].map(|at| !fds[at].revents().is_empty());
            self.lines.read();
            if alone {
                return Ok(Outcome::Alone);
            }
            if ended {
                let status = self.child.wait()?;
                let served = self.served_since.map(|since| since.elapsed());
                let said = if served.is_none() { self.lines.last() } else { String::new() };
                return Ok(Outcome::Ended { served, status, said });
            }
            self.hand_over_when_read(keeper)?;
        }
    }

    /// Bytes that nobody has read are counted as the sender's (SIOCOUTQ): when there are none, passt has come as far as
    /// its loop, and has bound all its ports.
    fn hand_over_when_read(&mut self, keeper: &Keeper) -> io::Result<()> {
        // In this order: what the dead leave unread is not counted either, and they hang up first.
        if let Some(socket) = self.socket.take_if(|socket| is_read(socket) && !is_hung_up(socket)) {
            self.served_since = Some(Instant::now());
            send(&keeper.control, &Report::Serving { pid: self.child.id() }, Some(socket.as_fd()))?;
        }
        Ok(())
    }
}

fn is_read(socket: &OwnedFd) -> bool {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes an int to where `bytes` is.
    let asked = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    asked == 0 && bytes == 0
}

fn is_hung_up(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

/// What passt says on standard error, line by line.
struct Lines {
    /// `None` once passt has closed it.
    pipe: Option<ChildStderr>,
    unfinished: Vec<u8>,
    last: String,
}

impl Lines {
    fn new(pipe: ChildStderr) -> io::Result<Self> {
        fcntl_setfl(&pipe, fcntl_getfl(&pipe)? | OFlags::NONBLOCK)?;
        Ok(Self { pipe: Some(pipe), unfinished: Vec::new(), last: String::new() })
    }

    /// What has come since.
    fn read(&mut self) {
        let mut bytes = [0; 1024];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut bytes) {
                Ok(0) => self.pipe = None,
                Ok(count) => bytes[..count].iter().for_each(|byte| self.take(*byte)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }

    fn take(&mut self, byte: u8) {
        if byte != b'\n' {
            // What is longer is cut.
            if self.unfinished.len() < MAX_LINE {
                self.unfinished.push(byte);
            }
            return;
        }
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.unfinished)).trim().to_owned();
        // Where there is no system logger, passt says so with each word.
        let is_noise = line.is_empty() || line.starts_with("Failed to send ") && line.ends_with(" to syslog");
        if !is_noise {
            info!("passt: {line}");
            self.last = line;
        }
    }

    /// Its last words.
    fn last(&mut self) -> String {
        self.read();
        std::mem::take(&mut self.last)
    }
}
