//! Runs in a guest: replaces its kernel by another one, as kexec-tools' `kexec -f` does, without a C library.
//!
//!     guest-kexec KERNEL INITRD COMMAND-LINE
#![expect(unsafe_code, reason = "no library has these system calls")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

/// LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC (reboot(2)).
const REBOOT: [libc::c_long; 3] = [0xfee1_dead, 672_274_793, 0x4558_4543];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, line] = &words[..] else {
        eprintln!("guest-kexec KERNEL INITRD COMMAND-LINE");
        return ExitCode::from(2);
    };
    match replace(kernel, initrd, line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-kexec: {error}");
            ExitCode::FAILURE
        }
    }
}

fn replace(kernel: &str, initrd: &str, line: &str) -> io::Result<()> {
    let (kernel, initrd) = (File::open(kernel)?, File::open(initrd)?);
    let line = CString::new(line.trim_end())?;
    let bytes = line.as_bytes_with_nul().len();
    // SAFETY: the kernel reads two open files and `bytes` bytes at `line`.
    let loaded = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            bytes,
            line.as_ptr(),
            0usize,
        )
    };
    if loaded != 0 {
        return Err(io::Error::last_os_error());
    }
    let [magic, magic2, command] = REBOOT;
    // SAFETY: integers only; it does not return if it works.
    unsafe { libc::syscall(libc::SYS_reboot, magic, magic2, command, 0usize) };
    Err(io::Error::last_os_error())
}
