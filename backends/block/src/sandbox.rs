//! What serving a disk needs of the kernel, beyond what every daemon does.

/// I/O goes by io_uring; formats with metadata of their own use the others, on files that are open already.
pub(crate) const SYSCALLS: &[i64] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// `<linux/fs.h>`, of which libc has not all.
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const BLKGETSIZE64: u64 = 0x8008_1272;

/// Requests to a block device: its size, and giving up what is on it.
pub(crate) const IOCTLS: &[u64] = &[BLKDISCARD, BLKZEROOUT, BLKGETSIZE64];
