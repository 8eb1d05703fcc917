//! What serving a disk needs of the kernel, beyond what every daemon does.

/// I/O goes by io_uring; formats with metadata of their own use the others, on files that are open already.
pub(crate) const SYSCALLS: &[i64] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
];
