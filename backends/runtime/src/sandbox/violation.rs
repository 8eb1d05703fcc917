//! Last words: of a process that its sandbox ends, and of one whose shared memory was cut off.
//!
//! Both are signals in the middle of anything, so that their handlers do nothing but format on the stack, write and exit.
#![expect(unsafe_code, reason = "signal handlers")]

use std::ffi::c_void;
use std::io::{self, Write};
use std::mem::MaybeUninit;

use syscalls::Sysno;

/// Exit codes, as shells show a death by these signals.
const BAD_SYSCALL: i32 = 128 + libc::SIGSYS;
const LOST_MEMORY: i32 = 128 + libc::SIGBUS;

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);

/// Names the system call that the filter stopped.
pub(super) fn report_syscalls() -> io::Result<()> {
    handle(libc::SIGSYS, on_bad_syscall)
}

/// Says why the process ends when memory that a frontend shares is no longer there.
pub(crate) fn report_lost_memory() -> io::Result<()> {
    handle(libc::SIGBUS, on_lost_memory)
}

fn handle(signal: i32, handler: Handler) -> io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all zeros is a valid sigaction; the handler has the signature that SA_SIGINFO asks for, and calls nothing
    // that is not safe in a signal handler.
    let result = unsafe {
        let action = action.assume_init_mut();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(signal, action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The part of a SIGSYS's `siginfo_t` that libc does not name: after three integers and padding, the address, then this.
const SYSCALL_AT: usize = 24;

extern "C" fn on_bad_syscall(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a whole siginfo_t, in which a SIGSYS has its number here.
    let number = unsafe { info.cast::<u8>().add(SYSCALL_AT).cast::<i32>().read_unaligned() };
    let name = usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |sysno| sysno.name());
    end(
        BAD_SYSCALL,
        format_args!(
            "the sandbox does not allow the system call {name} ({number}): please report it; --sandbox=off does without"
        ),
    );
}

extern "C" fn on_lost_memory(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a whole siginfo_t, in which a SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    end(
        LOST_MEMORY,
        format_args!(
            "memory at {address:#x} is gone: the frontend cut off the file that it shares, or a disk failed"
        ),
    );
}

fn end(code: i32, words: std::fmt::Arguments<'_>) -> ! {
    let mut line = [0; 256];
    let mut rest = &mut line[..];
    // What does not fit is cut off.
    let _ = writeln!(rest, "cleave: {words}");
    let len = 256 - rest.len();
    // SAFETY: both are system calls on a buffer of this function; _exit runs nothing of the process's.
    unsafe {
        libc::write(2, line.as_ptr().cast(), len);
        libc::_exit(code)
    }
}
