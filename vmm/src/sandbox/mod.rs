//! The VMM confines itself: a seccomp filter for each kind of thread.
//!
//! ```text
//!   start of the process ──confine_process──> main: all but what no VMM needs
//!                                               │ inherited by every thread and every daemon
//!                     confine_thread            ├────────> vCPU, session, control: only what they use
//!                                               └────────> daemons: they add their own
//! ```
//!
//! Invariants: filters only ever take away; a vCPU's, a session's and the control thread is confined before it sees a byte from the
//! guest, a daemon or a client; a violation is told in one line and ends the process ([`cleave_common::sandbox`]), and so does a
//! thread that cannot be confined.

mod filters;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::OnceLock;

use cleave_common::exit::{ExitCode, one_line};
use cleave_common::sandbox::{name_thread, report_violations};
use seccompiler::{BpfProgram, apply_filter};

/// The kinds of threads that have a filter of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    Vcpu,
    Session,
    Control,
}

impl Thread {
    fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vCPU",
            Self::Session => "session",
            Self::Control => "control",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("a system call filter cannot be built: this is a bug")]
    Build(#[from] seccompiler::BackendError),
    #[error("this kernel takes no system call filter (seccomp): --sandbox off does without")]
    Apply(#[source] seccompiler::Error),
    #[error("the handler for filtered system calls cannot be installed")]
    Handler(#[source] io::Error),
}

struct Confinement {
    vcpu: BpfProgram,
    session: BpfProgram,
    control: BpfProgram,
    before_end: fn(),
}

impl Confinement {
    fn new(before_end: fn()) -> Result<Self, SandboxError> {
        Ok(Self {
            vcpu: filters::vcpu()?,
            session: filters::session()?,
            control: filters::control()?,
            before_end,
        })
    }
}

/// Set once the process is confined.
static CONFINEMENT: OnceLock<Confinement> = OnceLock::new();

/// Confines this thread, the threads that it starts later, and their daemons; call it first. From then on
/// [`confine_thread`] has an effect. `namespaces`: one of the daemons shuts itself up in namespaces of its own, as passt
/// does, and is left what that takes. `before_end` is called when a violation ends the process: it may put the terminal
/// back, in a signal handler.
pub fn confine_process(before_end: fn(), namespaces: bool) -> Result<(), SandboxError> {
    report_violations("cleave", before_end).map_err(SandboxError::Handler)?;
    let confinement = Confinement::new(before_end)?;
    apply_filter(&filters::process(namespaces)?).map_err(SandboxError::Apply)?;
    // A second call finds the same filters.
    let _ = CONFINEMENT.set(confinement);
    Ok(())
}

/// Confines the calling thread, if the process is confined.
pub fn confine_thread(kind: Thread) {
    // Unit tests have no main; their vCPUs and sessions are confined all the same.
    #[cfg(test)]
    tests::confine_threads();
    let Some(confinement) = CONFINEMENT.get() else { return };
    let filter = match kind {
        Thread::Vcpu => &confinement.vcpu,
        Thread::Session => &confinement.session,
        Thread::Control => &confinement.control,
    };
    name_thread(kind.name());
    if let Err(error) = apply_filter(filter) {
        (confinement.before_end)();
        eprintln!("cleave: a {} thread cannot be confined: {}", kind.name(), one_line(&error));
        std::process::exit(ExitCode::Host as i32);
    }
}
