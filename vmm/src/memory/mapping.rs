//! Ranges of the file in this process's address space.
//!
//! A mapping begins at an address that is congruent to its offset in the file modulo the size of a huge page; only then
//! can a huge page of the file be one of the mapping, and with it one of the guest's.
#![expect(unsafe_code, reason = "mmap and madvise")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::{RamRegion, Thp};

/// Bytes of a transparent huge page on x86-64.
pub(super) const HUGE_PAGE: u64 = 2 << 20;
const SMALL_PAGE: u64 = 4 << 10;

/// How a region is mapped.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    /// Bytes of the file's pages.
    pub page_size: u64,
    pub flags: MapFlags,
    pub thp: Option<Thp>,
    /// Whether it is in core dumps.
    pub dump: bool,
}

/// Maps `region` of `file` for the life of the process.
pub(super) fn map(file: &Arc<File>, region: &RamRegion, manner: Manner) -> io::Result<MmapRegion<()>> {
    let Manner { page_size, flags, thp, dump } = manner;
    let alignment = page_size.max(HUGE_PAGE);
    let size = region.size as usize;
    let address = reserve_aligned(region.size, region.file_offset, alignment)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the range was just reserved by us and nobody else knows of it, so nothing is replaced under anyone.
    let address =
        unsafe { mmap(address, size, protection, flags | MapFlags::FIXED, file, region.file_offset) }?;

    let huge = if thp == Some(Thp::Never) { Advice::LinuxNoHugepage } else { Advice::LinuxHugepage };
    // A host that leaves huge pages of shared memory to such advice (shmem_enabled=advise) needs no other. An error
    // means that it has none.
    // SAFETY: the range is the mapping just made; the advice changes nothing that it reads as.
    let _ = unsafe { madvise(address, size, huge) };
    if !dump {
        // SAFETY: as above.
        unsafe { madvise(address, size, Advice::LinuxDontDump) }?;
    }

    let offset = FileOffset::from_arc(Arc::clone(file), region.file_offset);
    // SAFETY: the mapping is `size` bytes long, readable and writable, and is never unmapped.
    let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(address.cast()) };
    builder
        .with_mmap_prot(protection.bits() as i32)
        .with_mmap_flags(flags.bits() as i32)
        .with_file_offset(offset)
        .build()
        .map_err(io::Error::other)
}

/// Address space for `size` bytes, beginning congruent to `offset` modulo `alignment`.
fn reserve_aligned(size: u64, offset: u64, alignment: u64) -> io::Result<*mut std::ffi::c_void> {
    let room = size.checked_add(alignment).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: the kernel chooses the address, so nothing is replaced.
    let base = unsafe { mmap_anonymous(ptr::null_mut(), room as usize, ProtFlags::empty(), flags) }?;
    let lead = offset.wrapping_sub(base as u64) % alignment;
    let end = lead + size;
    // SAFETY: both ranges are parts of the reservation just made, and outside of the part that is returned. An empty
    // range is an error and changes nothing.
    unsafe {
        let _ = munmap(base, lead as usize);
        let _ = munmap(base.byte_add(end as usize), (room - end) as usize);
        Ok(base.byte_add(lead as usize))
    }
}

/// Takes every page of `len` bytes from `address`, in one of our mappings.
pub(super) fn populate(address: u64, len: u64) -> io::Result<()> {
    loop {
        // SAFETY: the range is part of one of our mappings, which is never unmapped; populating it changes no byte of it.
        match unsafe { madvise(address as *mut _, len as usize, Advice::LinuxPopulateWrite) } {
            Err(Errno::INTR) => {}
            // What a touch would die of.
            Err(Errno::FAULT) => return Err(Errno::NOMEM.into()),
            result => return Ok(result?),
        }
    }
}

/// Makes one transparent huge page at `address`, which is aligned and in one of our mappings.
pub(super) fn collapse_page(address: u64) -> io::Result<()> {
    // The kernel makes no huge page where nothing is yet: one small page must be there.
    for (length, advice) in [(SMALL_PAGE, libc::MADV_POPULATE_READ), (HUGE_PAGE, libc::MADV_COLLAPSE)] {
        // SAFETY: the range is part of one of our mappings, which is never unmapped; neither advice changes what it
        // reads as.
        if unsafe { libc::madvise(address as *mut libc::c_void, length as usize, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Has the pages of a mapping come from the nodes in `mask`, whoever touches them first.
///
/// The kernel keeps this with the file for a memfd; for hugetlbfs it is the mapping's alone.
pub(super) fn bind(address: u64, len: u64, mask: &[u64]) -> io::Result<()> {
    // The kernel takes one bit less than it is told of (mbind(2), BUGS).
    let bits = mask.len() * 64 + 1;
    let (mode, flags) = (libc::MPOL_BIND, 0);
    // SAFETY: the mask is as many bits long as said, and the call changes nothing that the mapping reads as.
    let result = unsafe { libc::syscall(libc::SYS_mbind, address, len, mode, mask.as_ptr(), bits, flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// This process and those it starts from now on get no transparent huge pages, in whatever memory they touch.
pub(super) fn forbid_huge_pages() -> io::Result<()> {
    // SAFETY: the call takes numbers only, and changes nothing that memory reads as.
    let result = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1_u64, 0_u64, 0_u64, 0_u64) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reserves, in the pool of huge pages, what the first `size` bytes of `file` do not have yet. The reservation stays
/// with the file.
pub(super) fn reserve(file: impl AsFd, size: u64) -> io::Result<()> {
    // SAFETY: the kernel chooses the address, so nothing is replaced; and nobody learns it before it is unmapped.
    unsafe {
        let address = mmap(ptr::null_mut(), size as usize, ProtFlags::empty(), MapFlags::SHARED, file, 0)?;
        munmap(address, size as usize)?;
    }
    Ok(())
}
