//! What serving a network needs of the kernel, beyond what every daemon does.

pub(crate) use crate::tap::ioctl::{SERVING as IOCTLS, SERVING_OURS as IOCTLS_OF_OURS};

/// Without a tap device: waiting.
pub(crate) const SWITCHING: &[i64] = &[libc::SYS_epoll_pwait];

/// Frames, waiting, and the link's state; the end of a passt that is of no use.
pub(crate) const SYSCALLS: &[i64] =
    &[libc::SYS_readv, libc::SYS_epoll_pwait, libc::SYS_recvfrom, libc::SYS_shutdown];
