//! What a sandbox says when it stops something: one line with the kind of thread and the system call, then the end of
//! the process with [`ExitCode::Internal`].
//!
//! A seccomp filter that answers `SECCOMP_RET_TRAP` raises SIGSYS in the thread that made the call (seccomp(2)).
//! [`report_violations`] is its handler, so every filter that is used with it must allow what a report takes: `poll`,
//! `write` and `exit_group`, and what the program's own `before_end` does. Where one does not, the kernel ends the
//! process all the same, without a word.
#![expect(
    unsafe_code,
    reason = "a signal handler, and its siginfo_t of which libc does not hand out the fields"
)]

use std::cell::Cell;
use std::fmt::{self, Write};
use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use syscalls::Sysno;

use crate::exit::ExitCode;

thread_local! {
    /// Const-initialised and without a destructor, so a signal handler may read it at any time.
    static KIND: Cell<&'static str> = const { Cell::new("main") };
}

static REPORTER: OnceLock<Reporter> = OnceLock::new();

struct Reporter {
    program: &'static str,
    before_end: fn(),
}

/// Says what kind of thread this is ("vCPU", "queue"), for the report; a thread that says nothing is "main". Call it
/// just before the thread's filter is applied.
pub fn name_thread(kind: &'static str) {
    KIND.set(kind);
}

/// Gives up the calling thread's capability to lock memory past its user's limit, if it has it. It is of use while I/O
/// rings are set up, and nothing that serves a guest should have it.
///
/// # Errors
/// When the system refuses.
pub fn drop_memory_lock() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    for set in [&mut sets.effective, &mut sets.permitted, &mut sets.inheritable] {
        set.remove(CapabilitySet::IPC_LOCK);
    }
    Ok(set_capabilities(None, sets)?)
}

/// Reports violations of all filters of this process from now on. `before_end` runs in a signal handler, in the thread
/// that violated its filter: it may put a terminal back, and neither allocate nor lock. The first call counts.
///
/// # Errors
/// When the system refuses the signal handler.
pub fn report_violations(program: &'static str, before_end: fn()) -> io::Result<()> {
    if REPORTER.set(Reporter { program, before_end }).is_err() {
        return Ok(());
    }
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigsys;
    // SAFETY: all zeroes is a valid sigaction, with an empty mask; the fields that matter are set below.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and does only what a signal handler may.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The name of a system call of this architecture.
pub fn syscall_name(number: i32) -> Option<&'static str> {
    usize::try_from(number).ok().and_then(Sysno::new).map(|call| call.name())
}

/// The start of a siginfo_t for SIGSYS (sigaction(2): si_call_addr, si_syscall, si_arch).
#[repr(C)]
struct SigsysInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    call_addr: *mut c_void,
    syscall: c_int,
    arch: u32,
}

/// si_code of a signal that a seccomp filter raised (asm-generic/siginfo.h).
const SYS_SECCOMP: c_int = 1;

extern "C" fn on_sigsys(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t, which is larger than this, and for SIGSYS starts like this.
    let (code, number) = unsafe { ((*info.cast::<SigsysInfo>()).code, (*info.cast::<SigsysInfo>()).syscall) };
    if code != SYS_SECCOMP {
        // Somebody sent it: it ends us as it would without a handler.
        // SAFETY: both may be called in a signal handler; the signal is delivered when this returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    if let Some(reporter) = REPORTER.get() {
        (reporter.before_end)();
        report(&violation(reporter.program, KIND.get(), number));
    }
    // SAFETY: it ends the process and runs nothing of it.
    unsafe { libc::_exit(ExitCode::Internal as c_int) }
}

fn violation(program: &str, kind: &str, number: c_int) -> Line {
    let mut line = Line { bytes: [0; 256], length: 0 };
    let name = syscall_name(number).unwrap_or("unknown");
    // A line that is too long is cut.
    let _ = writeln!(
        line,
        "{program}: the sandbox stopped a thread of kind '{kind}': system call {name} ({number}) is not allowed to it; \
         please report this; --sandbox=off does without"
    );
    line
}

/// On standard error, unless it would have to wait for its reader.
fn report(line: &Line) {
    let stderr = rustix::stdio::stderr();
    if let Ok(1) = poll(&mut [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)], Some(&Timespec::default())) {
        let _ = rustix::io::write(stderr, &line.bytes[..line.length]);
    }
}

/// Text that needs no allocation.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.length..];
        let taken = text.len().min(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        if taken == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_calls_have_names() {
        assert_eq!(syscall_name(libc::SYS_ptrace as i32), Some("ptrace"));
        assert_eq!(syscall_name(-1), None);
        assert_eq!(syscall_name(100_000), None);
    }

    #[test]
    fn a_violation_is_one_line() {
        let said = |line: &Line| String::from_utf8(line.bytes[..line.length].to_vec()).unwrap();
        let line = said(&violation("cleave", "vCPU", libc::SYS_ptrace as i32));
        assert_eq!(
            line,
            "cleave: the sandbox stopped a thread of kind 'vCPU': system call ptrace (101) is not allowed to it; \
             please report this; --sandbox=off does without\n"
        );
        let long = said(&violation("cleave", &"x".repeat(300), 0));
        assert_eq!(long.len(), 256, "cut, not lost");
    }
}
