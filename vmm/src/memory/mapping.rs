//! Ranges of the file in this process's address space.
//!
//! A mapping begins at an address that is congruent to its offset in the file modulo the size of a huge page; only then
//! can a huge page of the file be one of the mapping, and with it one of the guest's.
#![expect(unsafe_code, reason = "mmap and madvise")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, available_parallelism, scope};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::{MappedRegion, RamRegion};

/// Bytes of a transparent huge page on x86-64.
const HUGE_PAGE: u64 = 2 << 20;
const SMALL_PAGE: u64 = 4 << 10;

/// Maps `region` of `file` for the life of the process.
pub(super) fn map(
    file: &Arc<File>,
    region: &RamRegion,
    page_size: u64,
    flags: MapFlags,
) -> io::Result<MmapRegion<()>> {
    let alignment = page_size.max(HUGE_PAGE);
    let size = region.size as usize;
    let address = reserve_aligned(region.size, region.file_offset, alignment)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the range was just reserved by us and nobody else knows of it, so nothing is replaced under anyone.
    let address =
        unsafe { mmap(address, size, protection, flags | MapFlags::FIXED, file, region.file_offset) }?;

    // A host that leaves huge pages of shared memory to such advice (shmem_enabled=advise) needs no other. An error
    // means that it has none.
    // SAFETY: the range is the mapping just made; the advice changes nothing that it reads as.
    let _ = unsafe { madvise(address, size, Advice::LinuxHugepage) };

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

/// Takes every page of `region` now.
pub(super) fn populate(region: &MappedRegion) -> io::Result<()> {
    // SAFETY: the range is exactly one of our mappings, which is never unmapped; populating it changes no byte of it.
    let result =
        unsafe { madvise(region.host_address as *mut _, region.size as usize, Advice::LinuxPopulateWrite) };
    Ok(result?)
}

/// Makes whole huge pages of what lies in `range`, an offset into `region`, as far as the host can.
///
/// Nearly all of it is the kernel clearing pages, so every host CPU takes part, and a machine starts that much sooner.
pub(super) fn collapse(region: &MappedRegion, range: Range<u64>) {
    const MOST_THREADS: usize = 8;
    let start = range.start - range.start % HUGE_PAGE;
    let end = range.end.next_multiple_of(HUGE_PAGE).min(region.size - region.size % HUGE_PAGE);
    let pages = end.saturating_sub(start) / HUGE_PAGE;
    let next = AtomicU64::new(0);
    let work = || {
        loop {
            let page = next.fetch_add(1, Ordering::Relaxed);
            if page >= pages {
                return;
            }
            if let Err(error) = collapse_page(region.host_address + start + page * HUGE_PAGE) {
                tracing::debug!("guest memory stays in small pages from {start:#x} of a region on: {error}");
                // What one page cannot have, the next will not get either.
                next.store(pages, Ordering::Relaxed);
            }
        }
    };
    let threads = available_parallelism().map_or(1, usize::from).min(MOST_THREADS).min(pages as usize);
    scope(|scope| {
        for _ in 1..threads {
            // A host that gives no thread leaves the work to this one.
            let _ = Builder::new().name("huge-pages".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
}

/// Makes one huge page at `address`, which is aligned and in one of our mappings.
fn collapse_page(address: u64) -> io::Result<()> {
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

/// Reserves, in the pool of huge pages, what the first `size` bytes of `file` do not have yet. The reservation stays
/// with the file.
pub(super) fn reserve(file: &File, size: u64) -> io::Result<()> {
    // SAFETY: the kernel chooses the address, so nothing is replaced; and nobody learns it before it is unmapped.
    unsafe {
        let address = mmap(ptr::null_mut(), size as usize, ProtFlags::empty(), MapFlags::SHARED, file, 0)?;
        munmap(address, size as usize)?;
    }
    Ok(())
}
