//! Daemons that we start: one process a device, at the other end of a socketpair.
//!
//! ```text
//!   spawn() ──> Daemon (running) ──exit()──> DaemonExit
//!                  │ └─ drop: killed and reaped
//!                  └─ stop_all(): SIGTERM, time to end, SIGKILL
//! ```
//!
//! Invariants: no daemon outlives us: it ends when its socket closes, is killed when the thread that spawned it dies,
//! and is killed and reaped when its [`Daemon`] is dropped, unless it is in a system call that cannot be interrupted: that
//! is waited for only [`KILL_LIMIT`], and the kernel kills it later. A key typed at our terminal does not reach it: it is in a
//! process group of its own.
#![expect(unsafe_code, reason = "a closure that runs between fork and exec")]

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cleave_common::exit::{ExitCode, Failure};
use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};

use crate::config::ConsoleDevice;
use crate::plan::{DaemonSpec, Need, Terminal};

mod policy;
mod spawner;

pub use policy::{Decision, Restarts};
pub use spawner::Spawner;

/// The descriptor that a daemon finds its end of the socketpair at.
const SOCKET_FD: i32 = 3;

/// The descriptor of the file that outlives it, for one that keeps state.
const STATE_FD: i32 = 4;

/// How long a daemon that closed its socket may take to end, so that we know why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a killed daemon is waited for.
pub const KILL_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("{program} is neither beside cleave in {} nor in PATH: build or install it", beside.display())]
    NotFound { program: String, beside: PathBuf },
    #[error("cannot start {} for {device}", path.display())]
    Start { path: PathBuf, device: String, source: io::Error },
    #[error("{device}: {lack}")]
    Lacks { device: String, lack: String },
    #[error("cannot prepare descriptors for {program} ({device})")]
    Prepare { program: String, device: String, source: io::Error },
}

/// The file for a daemon that keeps state: it is in memory, and empty.
///
/// # Errors
/// When the system has no memory or descriptor left.
pub fn state_file(spec: &DaemonSpec) -> Result<Option<OwnedFd>, DaemonError> {
    let DaemonSpec { program, device, .. } = spec;
    let prepare = |source| DaemonError::Prepare { program: program.clone(), device: device.clone(), source };
    let file = spec.keeps_state.then(|| memfd_create("state", MemfdFlags::CLOEXEC)).transpose();
    file.map_err(|errno| prepare(errno.into()))
}

/// A running daemon. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    program: String,
    device: String,
    child: Child,
    /// Readable once the process has ended.
    pidfd: OwnedFd,
    /// Set once it is reaped.
    status: Option<ExitStatus>,
    /// It has been waited for in vain, and is not again.
    abandoned: bool,
}

/// How a daemon ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonExit {
    pub program: String,
    pub device: String,
    pub status: ExitStatus,
}

impl DaemonExit {
    pub fn success(&self) -> bool {
        self.status.success()
    }
}

impl fmt::Display for DaemonExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { program, device, status } = self;
        match (status.code(), status.signal()) {
            (Some(code), _) => write!(f, "{program} ({device}) ended with exit code {code}"),
            (None, Some(signal)) => write!(f, "{program} ({device}) was killed by signal {signal}"),
            (None, None) => write!(f, "{program} ({device}) ended"),
        }
    }
}

/// The daemon's end, as a reason for our own.
impl std::error::Error for DaemonExit {}

/// Starts a daemon and gives our end of its socket. It dies with the thread that calls this, so call it on one that
/// lives as long as the machine; and one that may wait for the file system that has the program ([`Spawner`]).
///
/// `state` is the file of one that keeps state.
///
/// # Errors
/// When the program is not found or the system refuses to start it.
pub fn spawn(spec: &DaemonSpec, state: Option<&OwnedFd>) -> Result<(Daemon, UnixStream), DaemonError> {
    let DaemonSpec { program, device, args, .. } = spec;
    let prepare = |source| DaemonError::Prepare { program: program.clone(), device: device.clone(), source };
    let path = find(program)?;
    let (ours, theirs) = UnixStream::pair().map_err(prepare)?;

    let mut command = Command::new(&path);
    command.args(args).arg(format!("--fd={SOCKET_FD}"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let mut mappings = vec![FdMapping { parent_fd: theirs.into(), child_fd: SOCKET_FD }];
    if let Terminal::Given(terminal) = &spec.terminal {
        let parent_fd = terminal.try_clone().map_err(prepare)?;
        mappings.push(FdMapping { parent_fd, child_fd: ConsoleDevice::TERMINAL_FD });
    }
    if let Some(state) = state {
        command.arg(format!("--state-fd={STATE_FD}"));
        let parent_fd = state.try_clone().map_err(prepare)?;
        mappings.push(FdMapping { parent_fd, child_fd: STATE_FD });
    }
    command.fd_mappings(mappings).map_err(|error| prepare(io::Error::other(error)))?;
    die_with_us(&mut command);

    let start = |source| DaemonError::Start { path: path.clone(), device: device.clone(), source };
    let mut child = command.spawn().map_err(start)?;
    let pidfd = match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(errno) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(start(errno.into()));
        }
    };
    tracing::debug!("started {} ({device}) as process {}", path.display(), child.id());
    let daemon = Daemon {
        program: program.clone(),
        device: device.clone(),
        child,
        pidfd,
        status: None,
        abandoned: false,
    };
    Ok((daemon, ours))
}

/// Refuses a program that cannot do what it is to be started for, by its own word.
///
/// # Errors
/// When it is not found, or does not list what it has to know.
pub fn check(spec: &DaemonSpec) -> Result<(), DaemonError> {
    let Some(needs) = spec.needs else { return Ok(()) };
    let path = find(&spec.program)?;
    let words = ask(&path, "--help");
    if words.split([' ', '\t', '\n', ',', '=']).any(|word| word == needs.option) {
        return Ok(());
    }
    let version = ask(&path, "--version");
    let version = version.lines().next().unwrap_or("nobody knows which").trim();
    let Need { option, advice } = needs;
    let lack = format!("{} does not know {option} (it is '{version}'): {advice}", path.display());
    Err(DaemonError::Lacks { device: spec.device.clone(), lack })
}

/// What a program answers to `option`, wherever it writes that.
fn ask(path: &Path, option: &str) -> String {
    let answer = Command::new(path).arg(option).stdin(Stdio::null()).output();
    let answer = answer.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    String::from_utf8_lossy(&answer).into_owned()
}

fn die_with_us(command: &mut Command) {
    let us = rustix::process::getpid();
    let arrange = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // We may have died before the line above.
        if getppid() == Some(us) { Ok(()) } else { Err(Errno::SRCH.into()) }
    };
    // SAFETY: the closure makes two system calls and neither allocates nor locks.
    unsafe { command.pre_exec(arrange) };
}

fn find(program: &str) -> Result<PathBuf, DaemonError> {
    let beside =
        std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned())).unwrap_or_default();
    let path = std::env::var_os("PATH").unwrap_or_default();
    search(program, std::iter::once(beside.clone()).chain(std::env::split_paths(&path)))
        .ok_or_else(|| DaemonError::NotFound { program: program.to_owned(), beside })
}

fn search(program: &str, directories: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    directories
        .into_iter()
        .filter(|directory| directory.as_os_str() != OsStr::new(""))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

impl Daemon {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has; never waits. Ask when the pidfd is readable.
    pub fn exit(&mut self) -> Option<DaemonExit> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status.map(|status| self.exit_with(status))
    }

    /// SIGKILL: for a daemon that hangs, or that must not touch guest memory any more. Returns once it is gone; `None` if
    /// it is not by `deadline`.
    pub fn kill(&mut self, deadline: Instant) -> Option<DaemonExit> {
        self.force();
        self.abandoned = !self.wait_until(deadline);
        self.exit()
    }

    /// SIGKILL, without waiting for the end: the pidfd tells.
    pub fn force(&self) {
        if self.status.is_none() {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }

    /// SIGTERM: the daemon ends when it has finished what it is doing.
    pub fn terminate(&self) {
        if self.status.is_none() {
            let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        }
    }

    /// What to tell of a device whose session failed with `error`: if the daemon ended by itself, its exit code and
    /// its own message on standard error say more than a closed socket does.
    pub fn failure(mut self, error: impl std::error::Error + Send + Sync + 'static) -> Failure {
        self.wait_until(Instant::now() + LAST_WORDS);
        let Some(exit) = self.exit() else { return Failure::device(error) };
        match exit.status.code() {
            // Daemons end with these only after a line on standard error, which is also ours.
            Some(2) => Failure::new(ExitCode::Usage, exit).explained(),
            Some(3) => Failure::new(ExitCode::Host, exit).explained(),
            _ => Failure::device(exit),
        }
    }

    /// Whether it has ended by then.
    fn wait_until(&self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or_default();
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Err(Errno::INTR) => {}
                Ok(ready) => return ready > 0,
                Err(_) => return false,
            }
        }
    }

    fn exit_with(&self, status: ExitStatus) -> DaemonExit {
        DaemonExit { program: self.program.clone(), device: self.device.clone(), status }
    }
}

impl AsFd for Daemon {
    /// The pidfd: readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.status.is_none() && !self.abandoned {
            self.kill(Instant::now() + KILL_LIMIT);
        }
    }
}

/// Ends all of them: SIGTERM, then SIGKILL for those that are still there after `grace`. How each ended, in order;
/// one that even SIGKILL does not end soon is left to the kernel, and said.
pub fn stop_all(mut daemons: Vec<Daemon>, grace: Duration) -> Vec<DaemonExit> {
    daemons.iter().for_each(Daemon::terminate);
    let deadline = Instant::now() + grace;
    daemons.iter().for_each(|daemon| {
        daemon.wait_until(deadline);
    });
    daemons.iter().for_each(Daemon::force);
    let deadline = Instant::now() + KILL_LIMIT;
    let mut exits = Vec::new();
    for daemon in &mut daemons {
        match daemon.kill(deadline) {
            Some(exit) => exits.push(exit),
            None => tracing::warn!(
                "{} ({}) does not end, even by SIGKILL: it is in a system call that waits",
                daemon.program,
                daemon.device
            ),
        }
    }
    exits
}

#[cfg(test)]
mod tests;
