//! The system calls that serving needs, measured under the tests. Any other one ends the process, with its name.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter_all_threads,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What the runtime and the libraries below it call, whatever the device.
const SERVING: &[i64] = &[
    // Messages and their descriptors, kicks and calls.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_fcntl,
    // What the frontend shares.
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    // Memory and threads.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    // The end, orderly or not.
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What libraries try and do well without: the allocator looks at a setting of the kernel's once, a panic at its program
/// and, with RUST_BACKTRACE, at its directory.
const DENIED: &[i64] = &[libc::SYS_open, libc::SYS_openat, libc::SYS_readlink, libc::SYS_getcwd];

/// Confines all threads to [`SERVING`], `extra` and `ioctls`. `false`: this kernel has no such filters.
pub(super) fn apply(extra: &[i64], ioctls: &[u64]) -> Result<bool, Box<dyn Error + Send + Sync>> {
    if !has_seccomp()? {
        return Ok(false);
    }
    // The stricter of two filters counts. This one answers; it is first, for the other ends the process that adds more.
    let denied = DENIED.iter().filter(|number| !extra.contains(number));
    let quiet = denied.clone().map(|number| (*number, vec![])).collect();
    install(quiet, SeccompAction::Allow, SeccompAction::Errno(libc::EACCES as u32))?;
    let mut rules: Rules =
        SERVING.iter().chain(extra).chain(denied).map(|number| (*number, vec![])).collect();
    rules.extend(with_conditions(ioctls)?);
    install(rules, SeccompAction::Trap, SeccompAction::Allow)?;
    Ok(true)
}

/// No memory becomes a program, and signals go to this process only.
fn with_conditions(ioctls: &[u64]) -> Result<Rules, Box<dyn Error + Send + Sync>> {
    let not_executable = |argument| {
        let operation = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operation, 0)
    };
    let own = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, std::process::id().into())?;
    let mut rules = Rules::from([
        (libc::SYS_mmap, vec![SeccompRule::new(vec![not_executable(2)?])?]),
        (libc::SYS_mprotect, vec![SeccompRule::new(vec![not_executable(2)?])?]),
        (libc::SYS_tgkill, vec![SeccompRule::new(vec![own])?]),
    ]);
    for ioctl in ioctls {
        let this = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *ioctl)?;
        rules.entry(libc::SYS_ioctl).or_default().push(SeccompRule::new(vec![this])?);
    }
    Ok(rules)
}

fn install(
    rules: Rules,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let program: BpfProgram = SeccompFilter::new(rules, otherwise, matching, arch)?.try_into()?;
    Ok(apply_filter_all_threads(&program)?)
}

/// Whether there are filters that take all threads at once.
#[expect(unsafe_code, reason = "no library asks the kernel for that")]
fn has_seccomp() -> io::Result<bool> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the kernel reads the four bytes of `action`, and changes nothing.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    match (answer, io::Error::last_os_error()) {
        (0, _) => Ok(true),
        (_, error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) => Ok(false),
        (_, error) => Err(error),
    }
}
