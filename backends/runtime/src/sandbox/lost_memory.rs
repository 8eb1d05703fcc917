//! Last words of a process whose shared memory was cut off. A signal in the middle of anything: the handler does nothing
//! but format on the stack, write and exit.
#![expect(unsafe_code, reason = "a signal handler")]

use std::ffi::c_void;
use std::io::{self, Write};
use std::mem::MaybeUninit;

/// The exit code, as shells show a death by this signal.
const LOST_MEMORY: i32 = 128 + libc::SIGBUS;

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void);

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
