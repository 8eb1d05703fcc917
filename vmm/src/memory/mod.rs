//! Guest RAM: one file that the VMM and every daemon map shared.
//!
//! Invariants:
//! - One file holds all of RAM; a region is a range of it. The file never changes its size: it is sealed, but for one of
//!   a mounted hugetlbfs ([`file`]), so that no mapping of it can fault beyond its end.
//! - A page is in the file or nowhere: nothing is mapped private, so what a daemon writes is what the guest reads.
//! - Regions do not overlap. A mapping, once made, stays for the life of the process, so no address of it that KVM or
//!   anyone else still holds can become another's.

mod error;
mod file;
mod host;
mod mapping;
mod numa;
mod prefault;
#[cfg(test)]
mod tests;
mod thp;

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::MapFlags;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

pub use error::MemoryError;
pub(crate) use error::SHMEM_ENABLED;
pub(crate) use file::NAME as FILE_NAME;
pub(crate) use host::{HugePages, memory_available, memory_total};
pub use prefault::{Progress, Watch};
pub(crate) use thp::SharedHugePages;

use file::RamFile;
use mapping::Manner;
use numa::Nodes;
use prefault::Taking;

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

/// Whether a memfd is in transparent huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thp {
    /// An error where the host gives none.
    Always,
    /// Not even those that the kernel would give.
    Never,
    /// As far as the host gives them.
    Advise,
}

#[derive(Debug, Clone)]
pub struct RamOptions {
    pub backing: Backing,
    /// Bytes, for [`Backing::Hugetlbfs`]; the host's default size, or the mount's, if absent.
    pub page_size: Option<u64>,
    /// A mounted hugetlbfs to make the file in.
    pub mem_path: Option<PathBuf>,
    /// For [`Backing::Memfd`]; as [`Thp::Advise`] if absent, but nothing is said where the host gives none.
    pub thp: Option<Thp>,
    /// Take every page from the host at the start, in huge pages where it has them.
    pub prefault: bool,
    /// How many threads do that; as many as are of use if absent.
    pub prefault_threads: Option<usize>,
    /// NUMA nodes of the host that all pages come from; anywhere if empty.
    pub host_nodes: Vec<usize>,
    /// Whether it is in core dumps.
    pub dump: bool,
}

impl Default for RamOptions {
    fn default() -> Self {
        Self {
            backing: Backing::Memfd,
            page_size: None,
            mem_path: None,
            thp: None,
            prefault: false,
            prefault_threads: None,
            host_nodes: Vec::new(),
            dump: true,
        }
    }
}

/// All of a machine's RAM, mapped.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    file: Arc<File>,
    size: u64,
    page_size: u64,
    backing: Backing,
    thp: Option<Thp>,
    /// Whether no page may be missing once the machine runs.
    prefault: bool,
    prefault_threads: Option<usize>,
}

impl GuestRam {
    /// Creates the file and maps `regions` of it. Nothing is taken from the host yet, except that huge pages are reserved.
    pub fn new(options: &RamOptions, regions: &[RamRegion]) -> Result<Self, MemoryError> {
        let size = file_size(regions)?;
        let host = memory_total()?;
        if size > host {
            return Err(MemoryError::MoreThanHost(size, host));
        }
        let nodes = Nodes::new(&options.host_nodes)?;
        if options.backing == Backing::Memfd {
            SharedHugePages::of_host().check(options.thp, options.prefault)?;
            nodes.as_ref().map_or(Ok(()), |nodes| nodes.require_memory(size))?;
        }
        let RamFile { fd, page_size } = RamFile::create(options, size, nodes.as_ref())?;
        let file = Arc::new(File::from(fd));
        let flags = map_flags(options.backing);
        let manner = Manner { page_size, flags, thp: options.thp, dump: options.dump };
        let memory = map(&file, regions, manner)?;
        // The pool promises pages, but not which: a node without one would be a SIGBUS in the middle of the guest's life.
        let prefault = options.prefault || nodes.is_some() && options.backing == Backing::Hugetlbfs;
        let (backing, thp, prefault_threads) = (options.backing, options.thp, options.prefault_threads);
        let ram = Self { memory, file, size, page_size, backing, thp, prefault, prefault_threads };
        if let Some(nodes) = nodes {
            let bind = |region: MappedRegion| mapping::bind(region.host_address, region.size, &nodes.mask());
            let bound = ram.regions().try_for_each(bind);
            bound.map_err(|error| MemoryError::Bind(nodes.to_string(), error))?;
        }
        Ok(ram)
    }

    /// Takes every page from the host, if that was asked for. A break where `watch` broke it off.
    pub fn prefault(&self, watch: Watch<'_>) -> Result<ControlFlow<()>, MemoryError> {
        if !self.prefault {
            return Ok(ControlFlow::Continue(()));
        }
        let regions: Vec<_> = self.regions().collect();
        let collapse = self.backing == Backing::Memfd && self.thp != Some(Thp::Never);
        let taking = Taking { page_size: self.page_size, collapse, threads: self.prefault_threads };
        let taken = prefault::take(&regions, taking, watch)
            .map_err(|error| MemoryError::Prefault(self.size, error))?;
        if taken.stopped {
            return Ok(ControlFlow::Break(()));
        }
        if self.thp == Some(Thp::Always) && taken.small > 0 {
            tracing::warn!(
                "thp=always: {} of {} of guest memory are in small pages, for the host finds no huge ones; before the next start: echo 1 > /proc/sys/vm/compact_memory",
                error::readable(taken.small),
                error::readable(self.size)
            );
        }
        Ok(ControlFlow::Continue(()))
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
        self.prefault(&mut |_| ControlFlow::Continue(())).map(|_| ())
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
        if self.backing == Backing::Hugetlbfs || self.thp == Some(Thp::Never) {
            return;
        }
        for region in self.regions() {
            let start = range.start.max(region.gpa);
            let end = range.end.min(region.gpa + region.size);
            if start < end {
                prefault::collapse(&region, start - region.gpa..end - region.gpa);
            }
        }
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

fn map(file: &Arc<File>, regions: &[RamRegion], manner: Manner) -> Result<GuestMemory, MemoryError> {
    let mut mapped = Vec::with_capacity(regions.len());
    for region in regions {
        let mapping = mapping::map(file, region, manner).map_err(|error| MemoryError::Map(*region, error))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(region.gpa))
            .ok_or(MemoryError::BadLayout(region.gpa))?;
        mapped.push(region);
    }
    let first = regions.first().map_or(0, |region| region.gpa);
    GuestMemory::from_regions(mapped).map_err(|_| MemoryError::BadLayout(first))
}

/// Has this process and the daemons it starts later do without transparent huge pages: `thp=never` for whoever touches a
/// page first. Daemons that someone else runs are beyond it.
pub fn forbid_huge_pages() {
    if let Err(error) = mapping::forbid_huge_pages() {
        tracing::warn!("thp=never: daemons may still touch guest memory in huge pages: {error}");
    }
}

fn map_flags(backing: Backing) -> MapFlags {
    match backing {
        Backing::Memfd => MapFlags::SHARED | MapFlags::NORESERVE,
        // Without a reservation an empty pool shows as SIGBUS in the middle of the guest's life, not here.
        Backing::Hugetlbfs => MapFlags::SHARED,
    }
}
