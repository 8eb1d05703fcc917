//! The one file that guest memory is: a sealed memfd, of ordinary or of huge pages, or a file of a mounted hugetlbfs.
//!
//! A file of a mount cannot be sealed: it has no name that anyone could open, but a daemon it is shared with could cut it
//! short, and end the machine with that. Who asks for a mount (for its limit, or for its permissions) has to trust the
//! daemons so far; the pages are the same as those of a memfd.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, MemfdFlags, Mode, OFlags, SealFlags, Stat, StatFs, fcntl_add_seals, fstat, fstatfs, ftruncate,
    memfd_create, open, openat, unlinkat,
};
use rustix::io::Errno;

use super::host::HugePages;
use super::mapping;
use super::numa::Nodes;
use super::{Backing, MemoryError, PAGE, RamOptions};

/// What the file is called wherever its mappings are listed; `cleave memory` knows guest memory by it.
pub(crate) const NAME: &str = "cleave-ram";

/// statfs(2): HUGETLBFS_MAGIC.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A file of guest memory.
#[derive(Debug)]
pub(super) struct RamFile {
    pub fd: OwnedFd,
    /// Bytes of the pages it is made of.
    pub page_size: u64,
}

impl RamFile {
    /// Makes the file that `options` ask for, `size` bytes long. The pool's pages are asked for, and not taken yet.
    pub(super) fn create(
        options: &RamOptions,
        size: u64,
        nodes: Option<&Nodes>,
    ) -> Result<Self, MemoryError> {
        match (options.backing, &options.mem_path) {
            (Backing::Memfd, _) => memfd(size, MemfdFlags::empty()).map(|fd| Self { fd, page_size: PAGE }),
            (Backing::Hugetlbfs, None) => anonymous(size, options.page_size, nodes),
            (Backing::Hugetlbfs, Some(path)) => in_mount(path, size, options.page_size, nodes),
        }
    }
}

fn memfd(size: u64, flags: MemfdFlags) -> Result<OwnedFd, MemoryError> {
    let create = || -> rustix::io::Result<OwnedFd> {
        let fd = memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | flags)?;
        ftruncate(&fd, size)?;
        // Holes may still be punched: that is how pages are given back.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(fd)
    };
    create().map_err(|error| MemoryError::Create(size, error.into()))
}

/// From the pool itself.
fn anonymous(size: u64, page_size: Option<u64>, nodes: Option<&Nodes>) -> Result<RamFile, MemoryError> {
    let pool = HugePages::of(page_size)?;
    let needed = whole_pages(size, pool.size)?;
    pool.require(needed)?;
    nodes.map_or(Ok(()), |nodes| nodes.require_huge_pages(&pool, needed))?;
    // The page size goes into the flags as its binary logarithm (memfd_create(2), MFD_HUGE_SHIFT).
    let log2 = MemfdFlags::from_bits_retain(pool.size.trailing_zeros() << 26);
    let fd = memfd(size, MemfdFlags::HUGETLB | log2)?;
    reserve(&fd, size, &pool, needed)?;
    Ok(RamFile { fd, page_size: pool.size })
}

/// From a mounted hugetlbfs, whose owner has set its limits.
fn in_mount(
    path: &Path,
    size: u64,
    page_size: Option<u64>,
    nodes: Option<&Nodes>,
) -> Result<RamFile, MemoryError> {
    let (directory, page) = open_mount(path)?;
    if let Some(asked) = page_size.filter(|asked| *asked != page) {
        return Err(MemoryError::MemPathPageSize { path: path.to_owned(), asked, has: page });
    }
    let needed = whole_pages(size, page)?;
    let pool = HugePages::of(Some(page))?;
    nodes.map_or(Ok(()), |nodes| nodes.require_huge_pages(&pool, needed))?;
    if let Some(free) = left_in(&statfs(path, &directory)?).filter(|free| *free < needed) {
        return Err(MemoryError::MemPathLimit { path: path.to_owned(), page_size: page, needed, free });
    }
    let fd = create_unnamed(&directory).map_err(|errno| match (errno, fstat(&directory)) {
        (Errno::ACCESS | Errno::PERM, Ok(stat)) => denied(path, &stat),
        _ => MemoryError::NoMemPath(path.to_owned(), errno.into()),
    })?;
    ftruncate(&fd, size).map_err(|error| MemoryError::Create(size, error.into()))?;
    // Judged by the kernel alone: what the mount has set aside (min_size=) counts as taken in the pool's figures.
    reserve(&fd, size, &pool, needed)?;
    Ok(RamFile { fd, page_size: page })
}

/// The directory and the size of its pages.
fn open_mount(path: &Path) -> Result<(OwnedFd, u64), MemoryError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(path, flags, Mode::empty())
        .map_err(|errno| MemoryError::NoMemPath(path.to_owned(), errno.into()))?;
    let statfs = statfs(path, &directory)?;
    match statfs.f_type == HUGETLBFS_MAGIC {
        true => Ok((directory, statfs.f_bsize as u64)),
        false => Err(MemoryError::NotHugetlbfs(path.to_owned())),
    }
}

fn statfs(path: &Path, directory: &OwnedFd) -> Result<StatFs, MemoryError> {
    fstatfs(directory).map_err(|errno| MemoryError::NoMemPath(path.to_owned(), errno.into()))
}

/// Pages that a mount with a limit has left.
fn left_in(statfs: &StatFs) -> Option<u64> {
    (statfs.f_blocks > 0).then_some(statfs.f_bavail)
}

fn denied(path: &Path, stat: &Stat) -> MemoryError {
    MemoryError::MemPathDenied {
        path: path.to_owned(),
        uid: rustix::process::geteuid().as_raw(),
        mode: stat.st_mode & 0o7777,
        owner: stat.st_uid,
        group: stat.st_gid,
    }
}

/// A file that nobody can open by a name.
fn create_unnamed(directory: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let pid = std::process::id();
    let mut attempt = 0;
    loop {
        // A process of another PID namespace may have left one of this name.
        let name = format!("{NAME}.{pid}.{attempt}");
        match openat(directory, &name, flags, Mode::RUSR | Mode::WUSR) {
            Err(Errno::EXIST) if attempt < 1000 => attempt += 1,
            opened => {
                let fd = opened?;
                unlinkat(directory, &name, AtFlags::empty())?;
                return Ok(fd);
            }
        }
    }
}

/// Promises all pages to the file, so that none is missing in the middle of the guest's life.
fn reserve(fd: &OwnedFd, size: u64, pool: &HugePages, needed: u64) -> Result<(), MemoryError> {
    mapping::reserve(fd, size).map_err(|error| {
        if error.raw_os_error() != Some(Errno::NOMEM.raw_os_error()) {
            return MemoryError::Create(size, error);
        }
        let pool = HugePages::of(Some(pool.size)).unwrap_or_else(|_| pool.clone());
        match pool.require(needed) {
            Err(too_few) => too_few,
            Ok(()) => MemoryError::HugePageLimit { page_size: pool.size, needed, free: pool.free },
        }
    })
}

fn whole_pages(size: u64, page: u64) -> Result<u64, MemoryError> {
    match size.is_multiple_of(page) {
        true => Ok(size / page),
        false => Err(MemoryError::NotWholePages(size, page)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: &Path) -> String {
        let options = RamOptions {
            backing: Backing::Hugetlbfs,
            mem_path: Some(path.to_owned()),
            ..RamOptions::default()
        };
        cleave_common::exit::one_line(&RamFile::create(&options, 2 << 20, None).unwrap_err())
    }

    #[test]
    fn what_is_no_mount_of_huge_pages_is_refused_with_the_way_to_one() {
        let said = refused(Path::new("/nonexistent/huge"));
        assert!(said.ends_with("-o pagesize=2M,mode=1770,gid=kvm hugetlbfs /nonexistent/huge: No such file or directory (os error 2)"), "{said}");
        let directory = tempfile::tempdir().unwrap();
        let said = refused(directory.path());
        assert!(said.contains("this is no hugetlbfs; mount one there"), "{said}");
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(refused(file.path()).contains("Not a directory"));
    }

    #[test]
    fn a_mount_that_is_not_ours_says_whose_it_is() {
        let stat = fstat(open("/", OFlags::PATH, Mode::empty()).unwrap()).unwrap();
        let said = denied(Path::new("/dev/hugepages"), &stat).to_string();
        assert!(
            said.contains(&format!("mode {:04o}, owner {}", stat.st_mode & 0o7777, stat.st_uid)),
            "{said}"
        );
        assert!(said.contains("chgrp kvm /dev/hugepages && chmod 1770 /dev/hugepages"), "{said}");
    }

    #[test]
    fn a_file_without_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let opened = open(directory.path(), flags, Mode::empty()).unwrap();
        std::fs::write(directory.path().join(format!("{NAME}.{}.0", std::process::id())), "").unwrap();
        let fd = create_unnamed(&opened).unwrap();
        assert_eq!(fstat(&fd).unwrap().st_nlink, 0);
        assert_eq!(fstat(&fd).unwrap().st_mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
