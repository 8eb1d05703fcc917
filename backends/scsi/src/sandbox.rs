//! What serving units needs of the kernel, beyond what every daemon does.

/// I/O goes by io_uring; formats with metadata of their own use the others, on files that are open already; images come
/// and go.
pub(crate) const SYSCALLS: &[i64] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_eventfd2,
    libc::SYS_fstatfs,
];

/// What an image that somebody hands over is asked, if it is a block device (linux/fs.h).
pub(crate) const IOCTLS: &[u64] = &[0x1268, 0x127b, 0x1278, 0x1279, 0x127a];
