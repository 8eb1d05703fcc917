//! What can be wrong with a machine's memory, and what to do about it.

use std::io;
use std::path::PathBuf;

use cleave_common::size::ByteSize;

use super::RamRegion;

/// How administrators let the users of KVM have a mounted hugetlbfs.
const MOUNT: &str = "mount -t hugetlbfs -o pagesize=2M,mode=1770,gid=kvm hugetlbfs";

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("a machine needs memory: the size is 0")]
    Empty,
    #[error(
        "{size} of guest memory is more than the {host} this host has; give the guest less (--memory)",
        size = readable(*.0), host = readable(*.1)
    )]
    MoreThanHost(u64, u64),
    #[error(
        "{size} of guest memory is not a whole number of {page} huge pages; use a multiple of {page}",
        size = readable(*.0), page = readable(*.1)
    )]
    NotWholePages(u64, u64),
    #[error(
        "this host has no huge pages of {size}; it has: {has}",
        size = readable(*.0), has = if .1.is_empty() { "none" } else { .1 }
    )]
    NoSuchPageSize(u64, String),
    #[error(
        "too few huge pages of {size}{place}: {needed} are needed, {free} are free; get them with: echo {total} > {path}",
        size = readable(*page_size)
    )]
    TooFewHugePages {
        page_size: u64,
        /// Where they have to be, after a space; empty for anywhere.
        place: String,
        needed: u64,
        free: u64,
        total: u64,
        path: String,
    },
    #[error(
        "{free} huge pages of {size} are free, {needed} are needed, and yet the host gives none: a limit is in the way; look at hugetlb.{size}B.rsvd.max of this process's cgroup",
        size = readable(*page_size)
    )]
    HugePageLimit { page_size: u64, needed: u64, free: u64 },
    #[error("mem-path={path}: cannot be used; a hugetlbfs is mounted there with: {MOUNT} {path}", path = .0.display())]
    NoMemPath(PathBuf, #[source] io::Error),
    #[error(
        "mem-path={path}: this is no hugetlbfs; mount one there ({MOUNT} {path}), or leave mem-path= out: daemons share guest memory without it",
        path = .0.display()
    )]
    NotHugetlbfs(PathBuf),
    #[error(
        "mem-path={path}: user {uid} may not make files there (mode {mode:04o}, owner {owner}, group {group}); give it to the group that has /dev/kvm: chgrp kvm {path} && chmod 1770 {path}, and make the user a member of kvm",
        path = path.display()
    )]
    MemPathDenied { path: PathBuf, uid: u32, mode: u32, owner: u32, group: u32 },
    #[error(
        "mem-path={path}: page-size={asked} is asked for, and that mount has pages of {has}; leave page-size= out or name a mount with pagesize={asked}",
        path = path.display(), asked = readable(*asked), has = readable(*has)
    )]
    MemPathPageSize { path: PathBuf, asked: u64, has: u64 },
    #[error(
        "mem-path={path}: {needed} huge pages of {size} are needed, and the mount's own limit leaves {free}; raise it with: mount -o remount,size=BYTES {path}",
        path = path.display(), size = readable(*page_size)
    )]
    MemPathLimit { path: PathBuf, page_size: u64, needed: u64, free: u64 },
    #[error("thp=always: this host gives shared memory no huge pages ({SHMEM_ENABLED}: {0}); {advice}", advice = always(.0))]
    NoHugePages(String),
    #[error(
        "host-node={0}: this process may use memory of {1} only; name one of them, or look at cpuset.mems of its cgroup"
    )]
    NoSuchNode(usize, String),
    #[error("host-node=: this kernel knows no NUMA nodes (CONFIG_NUMA); leave it out")]
    NoNuma,
    #[error(
        "host-node={nodes}: {size} of guest memory is more than the {has} there; give the guest less or name more nodes",
        size = readable(*size), has = readable(*has)
    )]
    MoreThanNodes { nodes: String, size: u64, has: u64 },
    #[error("host-node={0}: guest memory cannot be bound there")]
    Bind(String, #[source] io::Error),
    #[error("cannot create the file of guest memory ({size})", size = readable(*.0))]
    Create(u64, #[source] io::Error),
    #[error("cannot map {size} of guest memory at guest address {gpa:#x}", size = readable(.0.size), gpa = .0.gpa)]
    Map(RamRegion, #[source] io::Error),
    #[error("guest memory regions overlap or wrap around at guest address {0:#x}")]
    BadLayout(u64),
    #[error(
        "cannot take all of {size} of guest memory from the host (prefault=on): give the guest less, or look at the limits of this process's cgroup",
        size = readable(*.0)
    )]
    Prefault(u64, #[source] io::Error),
    #[error("cannot clear guest memory")]
    Clear(#[source] io::Error),
    #[error("cannot read {0}")]
    HostFigures(String, #[source] io::Error),
}

impl MemoryError {
    /// Whether other words on the command line help, on this host as it is.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::NoMemPath(..)
                | Self::NotHugetlbfs(_)
                | Self::MemPathPageSize { .. }
                | Self::NotWholePages(..)
                | Self::NoSuchNode(..)
                | Self::NoNuma
        )
    }
}

/// Where the host says whether shared memory gets huge pages.
pub(crate) const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

fn always(setting: &str) -> String {
    match setting {
        "none" => "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y, or leave thp= out".to_owned(),
        "deny" => format!("echo advise > {SHMEM_ENABLED}"),
        _ => format!("echo advise > {SHMEM_ENABLED}, or add prefault=on, which makes them at the start"),
    }
}

/// A size for a person: exact in the largest unit that leaves no more than a few digits.
pub(super) fn readable(bytes: u64) -> String {
    if bytes.trailing_zeros() >= 20 || bytes < (10 << 20) {
        ByteSize(bytes).to_string()
    } else {
        format!("{}M", bytes >> 20)
    }
}
