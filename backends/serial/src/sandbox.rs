//! What serving ports needs of the kernel, beyond what every daemon does.

/// Bytes, clients, and who connects again.
pub(crate) const SYSCALLS: &[i64] = &[
    libc::SYS_readv,
    libc::SYS_epoll_pwait,
    libc::SYS_recvfrom,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_getsockopt,
];

/// Sizes of terminals, the terminal that is given back in the end, and descriptors that do not block.
pub(crate) const IOCTLS: &[u64] = &[libc::TIOCGWINSZ, libc::TCGETS, libc::TCSETS, libc::FIONBIO];
