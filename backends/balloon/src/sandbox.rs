//! What serving a balloon needs of the kernel, beyond what every daemon does.

/// Holes in guest memory, what kind of memory it is, waiting, and the state that outlives this process.
pub(crate) const SYSCALLS: &[i64] =
    &[libc::SYS_fallocate, libc::SYS_fstatfs, libc::SYS_epoll_pwait, libc::SYS_pread64, libc::SYS_pwrite64];
