//! What serving ports needs of the kernel, beyond what every daemon does.

/// Bytes and clients.
pub(crate) const SYSCALLS: &[i64] = &[
    libc::SYS_readv,
    libc::SYS_epoll_pwait,
    libc::SYS_recvfrom,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_getsockopt,
];

/// The same for a daemon with a port that connects, or may get one.
pub(crate) const SYSCALLS_TO_CONNECT: &[i64] = &[
    libc::SYS_readv,
    libc::SYS_epoll_pwait,
    libc::SYS_recvfrom,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_getsockopt,
    libc::SYS_socket,
    libc::SYS_connect,
];

/// Sizes of terminals, the terminal that is given back in the end, and descriptors that do not block.
pub(crate) const IOCTLS: &[u64] = &[libc::TIOCGWINSZ, libc::TCGETS, libc::TCSETS, libc::FIONBIO];
