//! What each kind of thread may call.
//!
//! The lists of vCPU, session and control threads are those of the code, measured with strace under the tests, plus what the
//! allocator, the standard library and a panic may do. A list names no call for "later".

use std::collections::BTreeMap;

use kvm_bindings::{
    kvm_debugregs, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msrs,
    kvm_nested_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Allowed whatever the arguments.
type Calls = &'static [c_long];

/// What the allocator, the standard library, a report and a panic take in any thread.
const COMMON: Calls = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // glibc counts processors for its arenas.
    libc::SYS_sched_getaffinity,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    // eventfds, and lines on standard error.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_close,
    libc::SYS_eventfd2,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    // Whether the terminal that a dying process gives back is still its own.
    libc::SYS_getpgrp,
    libc::SYS_getpgid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What a session's thread does besides: messages with descriptors, a region in shared memory, a daemon to find again.
const SESSION: Calls = &[
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_connect,
    // The channel that a daemon reports changes on.
    libc::SYS_socketpair,
    libc::SYS_getsockopt,
    libc::SYS_shutdown,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
];

/// What the control thread does besides: connections, lines on them, descriptors that come along unasked.
const CONTROL: Calls = &[libc::SYS_accept4, libc::SYS_recvmsg, libc::SYS_sendto];

/// What neither a VMM nor a daemon has a use for: the way to other processes, to the kernel itself, to the host's mounts,
/// keys, clock and name.
const NEVER: Calls = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_perf_event_open,
    libc::SYS_bpf,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_nfsservctl,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_lookup_dcookie,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_vhangup,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
    libc::SYS__sysctl,
];

/// Of these, what a daemon takes that moves into namespaces of its own, with an empty root.
const NAMESPACES: Calls = &[libc::SYS_unshare, libc::SYS_mount, libc::SYS_umount2, libc::SYS_pivot_root];

/// The ioctls of a vCPU's thread, the one it makes all the time first: the guest runs, is reset, dies and is described,
/// and moves its interrupts and doorbells.
const VCPU_IOCTLS: &[u64] = &[
    kvm(0x80),
    kvm_in::<kvm_irq_routing>(0x6a),
    kvm_in::<kvm_irqfd>(0x76),
    kvm_in::<kvm_ioeventfd>(0x79),
    // KVM_KVMCLOCK_CTRL
    kvm(0xad),
    kvm_out::<kvm_regs>(0x81),
    kvm_in::<kvm_regs>(0x82),
    kvm_out::<kvm_sregs>(0x83),
    kvm_in::<kvm_sregs>(0x84),
    kvm_in::<kvm_msrs>(0x89),
    kvm_in::<kvm_lapic_state>(0x8f),
    kvm_in::<kvm_mp_state>(0x99),
    kvm_in::<kvm_vcpu_events>(0xa0),
    kvm_in::<kvm_debugregs>(0xa2),
    kvm_in::<kvm_xsave>(0xa5),
    kvm_in::<kvm_xcrs>(0xa7),
    kvm_in::<kvm_nested_state>(0xbf),
];

/// A device that goes away with its session takes its interrupts and doorbells off.
const SESSION_IOCTLS: &[u64] =
    &[kvm_in::<kvm_irq_routing>(0x6a), kvm_in::<kvm_irqfd>(0x76), kvm_in::<kvm_ioeventfd>(0x79), FIONBIO];

/// To put the terminal back before the process ends.
const TERMINAL_IOCTLS: &[u64] = &[libc::TCSETS, TCSETS2, libc::TIOCGPGRP];

const FIONBIO: u64 = libc::FIONBIO;
/// asm-generic/ioctls.h: _IOW('T', 0x2b, struct termios2).
const TCSETS2: u64 = 0x402c_542b;

/// `_IO(KVMIO, number)` (asm-generic/ioctl.h).
const fn kvm(number: u64) -> u64 {
    const KVMIO: u64 = 0xae;
    KVMIO << 8 | number
}

/// `_IOW(KVMIO, number, T)`: the caller gives a `T`.
const fn kvm_in<T>(number: u64) -> u64 {
    1 << 30 | (size_of::<T>() as u64) << 16 | kvm(number)
}

/// `_IOR(KVMIO, number, T)`.
const fn kvm_out<T>(number: u64) -> u64 {
    2 << 30 | (size_of::<T>() as u64) << 16 | kvm(number)
}

/// For the main thread and all that it starts.
pub(super) fn process(namespaces: bool) -> Result<BpfProgram, BackendError> {
    let allowed = |call: &&c_long| namespaces && NAMESPACES.contains(call);
    let rules = NEVER.iter().filter(|call| !allowed(call)).map(|call| (*call, Vec::new())).collect();
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Trap, TargetArch::x86_64)?.try_into()
}

pub(super) fn vcpu() -> Result<BpfProgram, BackendError> {
    let mut rules = common()?;
    rules.insert(libc::SYS_ioctl, one_of(1, VCPU_IOCTLS.iter().chain(TERMINAL_IOCTLS))?);
    allow(rules)
}

pub(super) fn session() -> Result<BpfProgram, BackendError> {
    let mut rules = common()?;
    rules.extend(SESSION.iter().map(|call| (*call, Vec::new())));
    rules.insert(libc::SYS_ioctl, one_of(1, SESSION_IOCTLS.iter().chain(TERMINAL_IOCTLS))?);
    rules.insert(libc::SYS_socket, one_of(0, &[libc::AF_UNIX as u64])?);
    allow(rules)
}

pub(super) fn control() -> Result<BpfProgram, BackendError> {
    let mut rules = common()?;
    rules.extend(CONTROL.iter().map(|call| (*call, Vec::new())));
    rules.insert(libc::SYS_ioctl, one_of(1, TERMINAL_IOCTLS)?);
    allow(rules)
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn common() -> Result<Rules, BackendError> {
    let mut rules: Rules = COMMON.iter().map(|call| (*call, Vec::new())).collect();
    // Memory, but none that can be executed.
    let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, executable.clone(), 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![condition])?]);
    }
    // In debug builds the standard library asks whether a descriptor is open before it closes it.
    rules.insert(libc::SYS_fcntl, one_of(1, &[libc::F_GETFD as u64])?);
    Ok(rules)
}

/// Rules that let a call through if argument `index` is one of `values`.
fn one_of<'a>(
    index: u8,
    values: impl IntoIterator<Item = &'a u64>,
) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value: &u64| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
        SeccompRule::new(vec![condition])
    };
    values.into_iter().map(rule).collect()
}

fn allow(rules: Rules) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}
