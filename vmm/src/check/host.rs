//! What can be read off the host without a guest.
#![expect(unsafe_code, reason = "io_uring_setup has no wrapper that makes no ring")]

use std::arch::x86_64::__cpuid;
use std::fs::{self, OpenOptions};
use std::io;

use cleave_common::size::ByteSize;

use super::Check;
use crate::memory::{HugePages, SHMEM_ENABLED, SharedHugePages, memory_available, memory_total};

/// Bytes that a small guest takes, with its daemons.
const COMFORTABLE: u64 = 512 << 20;

/// The processor's virtualisation extension.
pub(super) fn cpu() -> Check {
    const NAME: &str = "cpu";
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    const HYPERVISOR: u32 = 1 << 31;
    let basic = __cpuid(1).ecx;
    let extended = if __cpuid(0x8000_0000).eax > 0x8000_0000 { __cpuid(0x8000_0001).ecx } else { 0 };
    let where_it_runs = if basic & HYPERVISOR != 0 { ", in a virtual machine" } else { "" };
    if basic & VMX != 0 {
        Check::ok(NAME, format!("Intel VT-x{where_it_runs}"))
    } else if extended & SVM != 0 {
        Check::ok(NAME, format!("AMD-V{where_it_runs}"))
    } else if basic & HYPERVISOR != 0 {
        Check::warn(
            NAME,
            "no virtualisation extension: this is a virtual machine that does not have it",
            "switch nested virtualisation on for this machine at its own host, or use a bare-metal machine",
        )
    } else {
        Check::warn(
            NAME,
            "no virtualisation extension",
            "switch VT-x or AMD-V (SVM) on in the firmware's settings",
        )
    }
}

/// Whether guests may run guests.
pub(super) fn nested() -> Check {
    const NAME: &str = "nested";
    let read = |module: &str| fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).ok();
    for module in ["kvm_intel", "kvm_amd"] {
        if let Some(value) = read(module) {
            return match value.trim() {
                "Y" | "1" => Check::ok(NAME, format!("on ({module})")),
                _ => Check::warn(
                    NAME,
                    format!("off ({module}): guests cannot run guests of their own"),
                    format!(
                        "only if you need it: echo 'options {module} nested=1' > /etc/modprobe.d/{module}.conf, and load the module anew"
                    ),
                ),
            };
        }
    }
    Check::warn(
        NAME,
        "neither kvm_intel nor kvm_amd is loaded: guests cannot run guests of their own",
        "only if you need it: see the lines cpu and kvm",
    )
}

pub(super) fn memory() -> Check {
    const NAME: &str = "memory";
    let figures = memory_total().and_then(|total| memory_available().map(|available| (total, available)));
    match figures {
        Err(error) => Check::warn(NAME, error.to_string(), "mount /proc"),
        Ok((total, available)) => {
            let detail = format!("{} MiB, {} MiB of it available", total >> 20, available >> 20);
            if available < COMFORTABLE {
                Check::warn(NAME, detail, "end something that uses memory; a small guest takes 512 MiB")
            } else {
                Check::ok(NAME, detail)
            }
        }
    }
}

/// For `--memory backing=hugetlbfs`.
pub(super) fn huge_pages() -> Check {
    const NAME: &str = "huge pages";
    let pools = HugePages::all();
    let detail =
        |pool: &HugePages| format!("{} of {} free of {}", pool.free, pool.total, ByteSize(pool.size));
    let details: Vec<_> = pools.iter().map(detail).collect();
    match pools.iter().find(|pool| pool.free > 0).or(pools.first()) {
        None => Check::warn(
            NAME,
            "none: this kernel has no hugetlbfs",
            "only for --memory backing=hugetlbfs: use a kernel with CONFIG_HUGETLBFS=y",
        ),
        Some(pool) if pool.free == 0 => Check::warn(
            NAME,
            details.join(", "),
            format!(
                "only for --memory backing=hugetlbfs: echo N > {}, where N is the guest's memory in pages of {}",
                pool.control().display(),
                ByteSize(pool.size)
            ),
        ),
        Some(_) => Check::ok(NAME, details.join(", ")),
    }
}

/// Whether the memory that guests share with their daemons gets huge pages as they touch it.
pub(super) fn shared_huge_pages() -> Check {
    const NAME: &str = "shared memory";
    let pages = SharedHugePages::of_host();
    let chosen = &pages.setting;
    if pages.on_touch() {
        return Check::ok(NAME, format!("in huge pages ({chosen})"));
    }
    Check::warn(
        NAME,
        format!("in small pages, except what a kernel needs to start (shmem_enabled: {chosen})"),
        format!("for faster guests: echo advise > {SHMEM_ENABLED}"),
    )
}

/// What network daemons need to reach the host's network.
pub(super) fn tun() -> Check {
    const NAME: &str = "tun";
    const DEVICE: &str = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => Check::ok(NAME, format!("{DEVICE} opens")),
        Err(error) => {
            let advice = match error.kind() {
                io::ErrorKind::NotFound => "only for networks on tap devices: modprobe tun",
                io::ErrorKind::PermissionDenied => {
                    "only for networks on tap devices: run the network daemon as root, or chmod 666 /dev/net/tun"
                }
                _ => "only for networks on tap devices: modprobe tun, and look at the kernel's log",
            };
            Check::warn(NAME, format!("{DEVICE}: {error}"), advice)
        }
    }
}

/// What the block daemon does its I/O with.
pub(super) fn io_uring() -> Check {
    const NAME: &str = "io_uring";
    // SAFETY: with no parameters to read, the call ends before it makes anything.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null_mut::<u8>()) };
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Permission is asked first, so a complaint about the parameters is a yes.
        _ if result >= 0 => Check::ok(NAME, "available"),
        Some(libc::EFAULT | libc::EINVAL) => Check::ok(NAME, "available"),
        Some(libc::EPERM | libc::EACCES) => Check::warn(
            NAME,
            "switched off for this user",
            "cleave-block needs it: sysctl kernel.io_uring_disabled=0, and in a container allow its system calls in the seccomp profile",
        ),
        Some(libc::ENOSYS) => Check::warn(
            NAME,
            "this kernel has none, or a seccomp profile hides it",
            "cleave-block needs it: use a kernel with CONFIG_IO_URING=y, and in a container allow its system calls in the seccomp profile",
        ),
        _ => Check::warn(NAME, error.to_string(), "cleave-block needs it: look at the kernel's log"),
    }
}
