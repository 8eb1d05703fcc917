//! Guest RAM: one file that the VMM and every daemon map shared.
//!
//! Invariants:
//! - One file holds all of RAM; a region is a range of it. The file never changes its size (sealed, or a hugetlbfs
//!   file nobody else can open for writing its length), so that no mapping of it can fault beyond its end.
//! - A page is in the file or nowhere: nothing is mapped private, so what a daemon writes is what the guest reads.
//! - Regions do not overlap. A mapping, once made, stays for the life of the process, so no address of it that KVM or
//!   anyone else still holds can become another's.

mod host;
mod mapping;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cleave_common::size::ByteSize;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::mm::MapFlags;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

pub(crate) use host::{HugePages, memory_available, memory_total};

/// Bytes of an ordinary page.
const PAGE: u64 = 4096;

/// The mapped regions, as loaders and devices address them: by guest-physical address.
pub type GuestMemory = GuestMemoryMmap<()>;

/// A range of guest-physical memory and where it lies in the file. All in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    pub gpa: u64,
    pub size: u64,
    pub file_offset: u64,
}

/// A [`RamRegion`] with the address it has in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedRegion {
    pub gpa: u64,
    pub size: u64,
    pub file_offset: u64,
    pub host_address: u64,
}

/// The kind of file RAM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    Memfd,
    /// Huge pages of the host's hugetlb pool.
    Hugetlbfs,
}

#[derive(Debug, Clone, Copy)]
pub struct RamOptions {
    pub backing: Backing,
    /// Bytes, for [`Backing::Hugetlbfs`]; the host's default size if absent.
    pub page_size: Option<u64>,
    /// Take every page from the host now, in huge pages where it has them.
    pub prefault: bool,
}

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
        "too few huge pages of {size}: {needed} are needed, {free} are free; get them with: echo {total} > {path}",
        size = readable(*page_size)
    )]
    TooFewHugePages { page_size: u64, needed: u64, free: u64, total: u64, path: String },
    #[error("cannot create the file of guest memory ({size})", size = readable(*.0))]
    Create(u64, #[source] io::Error),
    #[error("cannot map {size} of guest memory at guest address {gpa:#x}", size = readable(.0.size), gpa = .0.gpa)]
    Map(RamRegion, #[source] io::Error),
    #[error("guest memory regions overlap or wrap around at guest address {0:#x}")]
    BadLayout(u64),
    #[error("cannot take all of {size} of guest memory from the host (prefault=on)", size = readable(*.0))]
    Prefault(u64, #[source] io::Error),
    #[error("cannot clear guest memory")]
    Clear(#[source] io::Error),
    #[error("cannot read {0}")]
    HostFigures(String, #[source] io::Error),
}

/// All of a machine's RAM, mapped.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    file: Arc<File>,
    size: u64,
    backing: Backing,
    prefault: bool,
}

impl GuestRam {
    /// Creates the file and maps `regions` of it. Nothing is taken from the host yet, except with `prefault` and that
    /// huge pages are reserved.
    pub fn new(options: &RamOptions, regions: &[RamRegion]) -> Result<Self, MemoryError> {
        let size = file_size(regions)?;
        let host = memory_total()?;
        if size > host {
            return Err(MemoryError::MoreThanHost(size, host));
        }
        let (file, page_size) = match options.backing {
            Backing::Memfd => (memfd(size)?, PAGE),
            Backing::Hugetlbfs => hugetlb(size, options.page_size)?,
        };
        let file = Arc::new(File::from(file));
        let memory = map(&file, regions, page_size, options.backing)?;
        let ram = Self { memory, file, size, backing: options.backing, prefault: options.prefault };
        if options.prefault {
            ram.prefault()?;
        }
        Ok(ram)
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file to hand to a daemon, whose `SET_MEM_TABLE` names offsets in it.
    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn regions(&self) -> impl Iterator<Item = MappedRegion> {
        self.memory.iter().map(|region| MappedRegion {
            gpa: region.start_addr().raw_value(),
            size: region.len(),
            file_offset: region.file_offset().map_or(0, FileOffset::start),
            host_address: region.as_ptr() as u64,
        })
    }

    /// Makes all of RAM read as zeroes and gives its pages back to the host: what a reset machine starts with.
    pub fn clear(&self) -> Result<(), MemoryError> {
        self.punch().map_err(|error| MemoryError::Clear(error.into()))?;
        if self.backing == Backing::Hugetlbfs {
            // A hole loses its reservation, and a fault without one kills the process when the pool is empty. Mapping
            // the file anew reserves what is missing; the reservation stays with the file.
            mapping::reserve(&self.file, self.size).map_err(MemoryError::Clear)?;
        }
        if self.prefault { self.prefault() } else { Ok(()) }
    }

    fn punch(&self) -> rustix::io::Result<()> {
        fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, self.size)
    }

    /// Takes the guest-physical `range` from the host in huge pages, as far as it is RAM. Best effort: where the host has
    /// no huge page left, or its kernel (before 6.1) no way to ask, the guest's touch takes small pages as ever.
    ///
    /// A small page costs an exit each when the guest first touches it. An anonymous mapping would get huge pages by
    /// itself; for a shared file most hosts have that off (transparent_hugepage/shmem_enabled), so it is asked for.
    pub fn take_huge_pages(&self, range: Range<u64>) {
        if self.backing == Backing::Hugetlbfs {
            return;
        }
        for region in self.regions() {
            let start = range.start.max(region.gpa);
            let end = range.end.min(region.gpa + region.size);
            if start < end {
                mapping::collapse(&region, start - region.gpa..end - region.gpa);
            }
        }
    }

    fn prefault(&self) -> Result<(), MemoryError> {
        self.take_huge_pages(0..u64::MAX);
        self.regions()
            .try_for_each(|region| mapping::populate(&region))
            .map_err(|error| MemoryError::Prefault(self.size, error))
    }
}

/// The mappings stay, but not what is in them.
impl Drop for GuestRam {
    fn drop(&mut self) {
        // The host gets its memory back at the latest when the process ends.
        let _ = self.punch();
    }
}

/// The least file that holds every region.
fn file_size(regions: &[RamRegion]) -> Result<u64, MemoryError> {
    let mut end = 0;
    for region in regions {
        region.gpa.checked_add(region.size).ok_or(MemoryError::BadLayout(region.gpa))?;
        let region_end =
            region.file_offset.checked_add(region.size).ok_or(MemoryError::BadLayout(region.gpa))?;
        end = end.max(region_end);
    }
    if end == 0 { Err(MemoryError::Empty) } else { Ok(end) }
}

fn memfd(size: u64) -> Result<OwnedFd, MemoryError> {
    let create = || -> rustix::io::Result<OwnedFd> {
        let fd = memfd_create("cleave-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, size)?;
        // Holes may still be punched: that is how pages are given back.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(fd)
    };
    create().map_err(|error| MemoryError::Create(size, error.into()))
}

/// The file and its page size.
fn hugetlb(size: u64, page_size: Option<u64>) -> Result<(OwnedFd, u64), MemoryError> {
    let pages = HugePages::of(page_size)?;
    if !size.is_multiple_of(pages.size) {
        return Err(MemoryError::NotWholePages(size, pages.size));
    }
    pages.require(size / pages.size)?;
    let create = || -> rustix::io::Result<OwnedFd> {
        // The page size goes into the flags as its binary logarithm (memfd_create(2), MFD_HUGE_SHIFT).
        let log2 = MemfdFlags::from_bits_retain(pages.size.trailing_zeros() << 26);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | log2;
        let fd = memfd_create("cleave-ram", flags)?;
        ftruncate(&fd, size)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(fd)
    };
    let fd = create().map_err(|error| MemoryError::Create(size, error.into()))?;
    Ok((fd, pages.size))
}

fn map(
    file: &Arc<File>,
    regions: &[RamRegion],
    page_size: u64,
    backing: Backing,
) -> Result<GuestMemory, MemoryError> {
    let mut mapped = Vec::with_capacity(regions.len());
    for region in regions {
        let mapping = mapping::map(file, region, page_size, map_flags(backing))
            .map_err(|error| MemoryError::Map(*region, error))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(region.gpa))
            .ok_or(MemoryError::BadLayout(region.gpa))?;
        mapped.push(region);
    }
    let first = regions.first().map_or(0, |region| region.gpa);
    GuestMemory::from_regions(mapped).map_err(|_| MemoryError::BadLayout(first))
}

fn map_flags(backing: Backing) -> MapFlags {
    match backing {
        Backing::Memfd => MapFlags::SHARED | MapFlags::NORESERVE,
        // Without a reservation an empty pool shows as SIGBUS in the middle of the guest's life, not here.
        Backing::Hugetlbfs => MapFlags::SHARED,
    }
}

/// A size for a person: exact in the largest unit that leaves no more than a few digits.
fn readable(bytes: u64) -> String {
    if bytes.trailing_zeros() >= 20 || bytes < (10 << 20) {
        ByteSize(bytes).to_string()
    } else {
        format!("{}M", bytes >> 20)
    }
}
