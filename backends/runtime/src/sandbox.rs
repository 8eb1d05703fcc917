//! What a daemon can do to its host once a frontend speaks to it: next to nothing.
//!
//! ```text
//!   starting: opens its files, listens --Sandbox::enter--> confined (files, network, capabilities)
//!                                        starts its threads --run--> confined to the system calls of serving
//! ```
//!
//! In two steps, because Landlock and capabilities are a thread's own and its children's, so that they come before the
//! first thread; the filter of system calls takes all threads at once, and leaves out what only starting needs. One
//! capability goes in the second step too, by each thread itself: that of locking memory, which sets up I/O rings.
//! `run` asks for a [`Confined`], which only [`Sandbox::enter`] gives: no daemon serves without having decided.
//!
//! What a kernel lacks is said once and done without: an administrator who wants more has newer kernels.

mod capabilities;
mod landlock;
mod lost_memory;
mod seccomp;

use std::path::Path;

use clap::ValueEnum;
use cleave_common::exit::Failure;
use cleave_common::sandbox::{drop_memory_lock, report_violations};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{debug, warn};

use crate::control::ControlSocket;
use crate::footprint::Text;
use crate::socket::Endpoint;
pub(crate) use lost_memory::report_lost_memory;

/// Whether a daemon confines itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum SandboxMode {
    #[default]
    On,
    /// To debug
    Off,
}

/// Why a daemon could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("cannot drop privileges (--sandbox=off does without)")]
    Capabilities(#[source] std::io::Error),
    #[error("cannot restrict file access with Landlock (--sandbox=off does without)")]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot filter system calls with seccomp (--sandbox=off does without)")]
    Seccomp(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<SandboxError> for Failure {
    fn from(error: SandboxError) -> Self {
        Self::host(error)
    }
}

/// What a device needs beyond what every daemon does to serve.
#[derive(Debug, Default)]
pub struct Sandbox<'a> {
    /// Whose last words a violation's are: "cleave-block".
    pub program: &'static str,
    pub mode: SandboxMode,
    /// System calls, by their numbers, with any arguments.
    pub syscalls: &'static [i64],
    /// Requests of ioctl.
    pub ioctls: &'static [u64],
    /// A control socket, whose file is to be removed in the end.
    pub control: Option<&'a ControlSocket>,
}

#[derive(Debug)]
struct Allowed {
    syscalls: Vec<i64>,
    ioctls: &'static [u64],
}

/// The process is confined, but for system calls that only starting needs.
#[derive(Debug)]
pub struct Confined {
    pub(crate) program: &'static str,
    /// What the device needs to serve; `None` when there is no sandbox.
    allowed: Option<Allowed>,
    pub(crate) text: Option<Text>,
}

impl Sandbox<'_> {
    /// Call it when all is open that is ever to be, and before the first thread.
    ///
    /// # Errors
    /// The kernel has what is asked for, and refuses.
    pub fn enter(self, endpoint: &Endpoint) -> Result<Confined, SandboxError> {
        // It says where the program is in a file, so: now.
        let text = Text::of_this_program();
        if self.mode == SandboxMode::Off {
            warn!("no sandbox: this process may do what its user may");
            return Ok(Confined { program: self.program, allowed: None, text });
        }
        raise_memlock_limit();
        capabilities::drop_most().map_err(SandboxError::Capabilities)?;
        let control = self.control.map(ControlSocket::file);
        let files: Vec<&Path> = endpoint.socket_file().into_iter().chain(control).collect();
        if !landlock::restrict(&files).map_err(SandboxError::Landlock)? {
            warn!("this kernel has no Landlock: files are not out of reach");
        }
        let mut syscalls = self.syscalls.to_vec();
        // To remove its sockets at the end.
        syscalls.extend(files.first().map(|_| libc::SYS_unlink));
        let allowed = Some(Allowed { syscalls, ioctls: self.ioctls });
        Ok(Confined { program: self.program, allowed, text })
    }
}

/// The kernel charges I/O rings to their user unless that one may lock any memory: a few dozen daemons would fill the usual
/// 8 MiB. Where there is no capability to do without the limit (see `capabilities`), it may be raised as far as it goes.
fn raise_memlock_limit() {
    let unlimited = Rlimit { current: None, maximum: None };
    if setrlimit(Resource::Memlock, unlimited).is_ok() {
        return;
    }
    let limit = getrlimit(Resource::Memlock);
    if let Err(errno) = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit }) {
        debug!("the limit of locked memory stays as it is: {errno}");
    }
}

impl Confined {
    /// The second step, when all threads are there.
    pub(crate) fn filter_syscalls(&self) -> Result<(), SandboxError> {
        let Some(allowed) = &self.allowed else { return Ok(()) };
        drop_memory_lock().map_err(SandboxError::Capabilities)?;
        report_violations(self.program, || {}).map_err(|error| SandboxError::Seccomp(error.into()))?;
        if seccomp::apply(&allowed.syscalls, allowed.ioctls).map_err(SandboxError::Seccomp)? {
            debug!("the sandbox is closed");
        } else {
            warn!("this kernel has no seccomp filters: system calls are not restricted");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
