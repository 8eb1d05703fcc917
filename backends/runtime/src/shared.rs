//! Files that a frontend shares beside guest memory: the region of requests in flight, the dirty log.
//!
//! Invariant: a mapping made here never answers an access with SIGBUS. Its file is a memfd that is sealed against
//! shrinking, and was long enough when it was mapped.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, VolatileMemoryError};

/// The smallest unit that can be mapped.
const PAGE: u64 = 4096;

/// Why a file is not mapped.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    #[error(
        "{len:#x} bytes from {offset:#x} are nothing to map: both are to be above 0, the offset whole pages"
    )]
    Shape { offset: u64, len: u64 },
    #[error("{len:#x} bytes from {offset:#x} do not lie inside the file of {file_len:#x} bytes")]
    PastEnd { offset: u64, len: u64, file_len: u64 },
    #[error(
        "the file is no memfd sealed against shrinking (F_SEAL_SHRINK): cut off, it would end this backend"
    )]
    NotSealed,
    #[error("it cannot be made or mapped: {0}")]
    Map(String),
    #[error("shared memory is used past its end, or misaligned")]
    Access(#[from] VolatileMemoryError),
}

fn failed(reason: impl std::fmt::Display) -> SharedError {
    SharedError::Map(reason.to_string())
}

/// A new memfd of `len` zeros, which can neither grow nor shrink.
pub(crate) fn sealed_memfd(name: &str, len: u64) -> Result<OwnedFd, SharedError> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(failed)?;
    rustix::fs::ftruncate(&fd, len).map_err(failed)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed)?;
    Ok(fd)
}

/// Whether the file is one in memory that stays at least as long as it is.
pub(crate) fn cannot_shrink(fd: &OwnedFd) -> bool {
    let is_file = fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    // Only files in memory can be sealed; others have no seals to ask for.
    is_file && fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

/// Maps `len` bytes from `offset` on for reading and writing.
pub(crate) fn map_sealed(fd: OwnedFd, offset: u64, len: u64) -> Result<MmapRegion, SharedError> {
    let shape = SharedError::Shape { offset, len };
    let Some(end) = offset.checked_add(len).filter(|_| len != 0 && offset.is_multiple_of(PAGE)) else {
        return Err(shape);
    };
    if !cannot_shrink(&fd) {
        return Err(SharedError::NotSealed);
    }
    // After the seals: from here on it does not get shorter.
    let file_len = fstat(&fd).map_err(failed)?.st_size as u64;
    if end > file_len {
        return Err(SharedError::PastEnd { offset, len, file_len });
    }
    MmapRegionBuilder::new(usize::try_from(len).map_err(failed)?)
        .with_file_offset(FileOffset::new(File::from(fd), offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(failed)
}
