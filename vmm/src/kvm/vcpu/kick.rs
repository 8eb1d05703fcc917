//! Getting a thread out of KVM_RUN without a lost wake-up.
//!
//! KVM_RUN ends with EINTR when a signal comes while the guest runs, or at once if `kvm_run.immediate_exit` is set.
//! A signal that comes just before KVM_RUN would be lost, so its handler, which runs on the vCPU's own thread, sets
//! `immediate_exit`. The runner then does, in this order: clear `immediate_exit`, look for commands, KVM_RUN. Whoever
//! commands does: queue the command, set `pending`, signal. If the signal comes
//! - before the clear, the look that follows finds the command;
//! - after the clear, `immediate_exit` is set, so the next KVM_RUN returns and the look after it finds the command;
//! - in KVM_RUN, it returns.
#![expect(unsafe_code, reason = "kvm_run is shared between a thread and its signal handler")]

use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::kvm::KvmError;

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU this thread runs. Const-initialised and without a destructor, so a signal
    /// handler may read it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: not null means that this thread's ExitRequest lives, and with it the vCPU whose kvm_run this is in;
        // the handler runs on the same thread, so it cannot be dropped meanwhile.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Release);
    }
}

/// Installs the handler, once a process.
pub(super) fn install_handler() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), on_signal).map_err(|error| error.errno()))
        .map_err(|errno| KvmError::Ioctl {
            what: "be interrupted: the signal handler cannot be installed",
            source: std::io::Error::from_raw_os_error(errno),
        })
}

/// Makes the KVM_RUN that `thread` is in, or enters next, return.
pub(super) fn signal<T>(thread: &JoinHandle<T>) {
    // ESRCH: it has ended, and is out of KVM_RUN for good.
    let _ = thread.kill(SIGRTMIN());
}

/// This thread's `immediate_exit`, set by the handler for as long as this lives.
pub(super) struct ExitRequest {
    flag: *mut u8,
    /// Not Send: it belongs to this thread's handler.
    _thread: PhantomData<*mut ()>,
}

impl ExitRequest {
    /// `vcpu` must outlive this; the runner owns both.
    pub(super) fn of(vcpu: &mut VcpuFd) -> Self {
        let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(flag);
        Self { flag, _thread: PhantomData }
    }

    /// Makes the next KVM_RUN return without running the guest.
    pub(super) fn set(&self) {
        // SAFETY: as in `clear`.
        unsafe { AtomicU8::from_ptr(self.flag) }.store(1, Ordering::Release);
    }

    pub(super) fn clear(&self) {
        // SAFETY: kvm_run is mapped as long as the vCPU lives, which outlives self; a byte is always aligned.
        unsafe { AtomicU8::from_ptr(self.flag) }.store(0, Ordering::Release);
    }
}

impl Drop for ExitRequest {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
