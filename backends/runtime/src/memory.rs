//! Guest memory as the frontend shares it, and the two kinds of addresses that name it.
//!
//! A frontend names ring addresses by *user address*, the guest names buffers by *guest-physical address*. Only this
//! module knows both. A [`GuestMemory`] never changes: adding or removing a region makes another one that shares the
//! mappings, so that whoever still holds the old one keeps what it uses mapped.
//!
//! Whatever lies in one region is looked up here, in a few steps; what reaches from one into its neighbour is left to
//! [`GuestMemory::map`], which takes several times as long.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cleave_common::vhost_user::{MAX_MEM_SLOTS, MemoryRegion};
use rustix::fs::{FileType, fstat};
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion, VolatileSlice,
};

/// The smallest unit that can be mapped.
const PAGE: u64 = 4096;

/// Why a memory region is refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("memory region {0:x?} is empty, wraps around or is not aligned to pages")]
    Shape(MemoryRegion),
    #[error("memory region {region:x?} does not lie inside its file of {file_len:#x} bytes")]
    PastEnd { region: MemoryRegion, file_len: u64 },
    #[error("the file of memory region {0:x?} is neither a memfd nor a regular file")]
    NotAFile(MemoryRegion),
    #[error("memory region {0:x?} overlaps another")]
    Overlap(MemoryRegion),
    #[error("no memory region is {0:x?}")]
    Unknown(MemoryRegion),
    #[error("more than {MAX_MEM_SLOTS} memory regions")]
    TooMany,
    #[error("a memory table of {regions} regions came with {fds} file descriptors")]
    Fds { regions: usize, fds: usize },
    #[error(
        "guest memory has to be in memfds sealed against shrinking, for other guests are served by this process, too \
         (QEMU: -object memory-backend-memfd,share=on)"
    )]
    NotSealed,
    #[error("memory region {region:x?} cannot be mapped: {reason}")]
    Map { region: MemoryRegion, reason: String },
}

/// All regions a frontend shares at one moment.
#[derive(Debug, Clone, Default)]
pub struct GuestMemory {
    /// In order of their guest-physical addresses.
    regions: Vec<Region>,
    map: GuestMemoryMmap<()>,
}

#[derive(Debug, Clone)]
struct Region {
    said: MemoryRegion,
    mapped: Arc<GuestRegionMmap<()>>,
}

impl GuestMemory {
    /// SET_MEM_TABLE: region *n* is in file *n*.
    pub fn from_table(regions: &[MemoryRegion], fds: Vec<OwnedFd>) -> Result<Self, MemoryError> {
        if regions.len() != fds.len() {
            return Err(MemoryError::Fds { regions: regions.len(), fds: fds.len() });
        }
        regions
            .iter()
            .zip(fds)
            .try_fold(Self::default(), |memory, (region, fd)| memory.with_region(*region, fd))
    }

    /// ADD_MEM_REG.
    pub fn with_region(&self, region: MemoryRegion, fd: OwnedFd) -> Result<Self, MemoryError> {
        if self.regions.len() >= MAX_MEM_SLOTS {
            return Err(MemoryError::TooMany);
        }
        check_shape(&region)?;
        if self.regions.iter().any(|other| overlap(&other.said, &region)) {
            return Err(MemoryError::Overlap(region));
        }
        let mapped = Arc::new(map_region(&region, fd)?);
        let map = self.map.insert_region(mapped.clone()).map_err(|_| MemoryError::Overlap(region))?;
        let mut regions = self.regions.clone();
        regions.insert(self.regions_up_to(region.guest_addr), Region { said: region, mapped });
        Ok(Self { regions, map })
    }

    /// REM_MEM_REG: the region is named by its guest address, user address and size.
    pub fn without_region(&self, region: MemoryRegion) -> Result<Self, MemoryError> {
        let same = |other: &Region| {
            (other.said.guest_addr, other.said.user_addr, other.said.size)
                == (region.guest_addr, region.user_addr, region.size)
        };
        let Some(at) = self.regions.iter().position(same) else {
            return Err(MemoryError::Unknown(region));
        };
        let (map, _) = self
            .map
            .remove_region(GuestAddress(region.guest_addr), region.size)
            .map_err(|_| MemoryError::Unknown(region))?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self { regions, map })
    }

    /// The guest-physical address of `len` bytes that the frontend names by user address, if they lie in one region.
    pub fn translate(&self, user_addr: u64, len: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|Region { said, .. }| {
            let offset = user_addr.checked_sub(said.user_addr)?;
            (offset.checked_add(len)? <= said.size).then(|| GuestAddress(said.guest_addr + offset))
        })
    }

    /// How many regions start at `guest_addr` or before.
    fn regions_up_to(&self, guest_addr: u64) -> usize {
        self.regions.partition_point(|region| region.said.guest_addr <= guest_addr)
    }

    /// `len` bytes from `addr`, if they lie in one region.
    pub fn slice(&self, addr: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
        let Region { said, mapped } = self.regions.get(self.regions_up_to(addr.0).checked_sub(1)?)?;
        mapped.get_slice(MemoryRegionAddress(addr.0 - said.guest_addr), len).ok()
    }

    /// `len` bytes from `addr`, in as many parts as there are regions that hold them. One that is an error is the last one:
    /// memory ends there.
    pub fn slices(
        &self,
        addr: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Result<VolatileSlice<'_>, GuestMemoryError>> {
        let whole = self.slice(addr, len);
        let parts = whole.is_none().then(|| self.map.get_slices(addr, len));
        whole.map(Ok).into_iter().chain(parts.into_iter().flatten())
    }

    /// # Errors
    /// It does not lie in memory.
    pub fn read_obj<T: ByteValued>(&self, addr: GuestAddress) -> Result<T, GuestMemoryError> {
        match self.slice(addr, size_of::<T>()) {
            Some(slice) => Ok(slice.read_obj(0)?),
            None => self.map.read_obj(addr),
        }
    }

    /// # Errors
    /// As [`GuestMemory::read_obj`].
    pub fn write_obj<T: ByteValued>(&self, value: T, addr: GuestAddress) -> Result<(), GuestMemoryError> {
        match self.slice(addr, size_of::<T>()) {
            Some(slice) => Ok(slice.write_obj(value, 0)?),
            None => self.map.write_obj(value, addr),
        }
    }

    /// # Errors
    /// As [`GuestMemory::read_obj`]; some of the bytes may have been read.
    pub fn read(&self, bytes: &mut [u8], addr: GuestAddress) -> Result<(), GuestMemoryError> {
        match self.slice(addr, bytes.len()) {
            Some(slice) => Ok(slice.read_slice(bytes, 0)?),
            None => self.map.read_slice(bytes, addr),
        }
    }

    /// # Errors
    /// As [`GuestMemory::read_obj`]; some of the bytes may have been written.
    pub fn write(&self, bytes: &[u8], addr: GuestAddress) -> Result<(), GuestMemoryError> {
        match self.slice(addr, bytes.len()) {
            Some(slice) => Ok(slice.write_slice(bytes, 0)?),
            None => self.map.write_slice(bytes, addr),
        }
    }

    /// Memory by guest-physical address.
    pub fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    pub fn is_empty(&self) -> bool {
        self.map.num_regions() == 0
    }
}

fn check_shape(region: &MemoryRegion) -> Result<(), MemoryError> {
    let ends =
        [region.guest_addr, region.user_addr, region.mmap_offset].map(|start| start.checked_add(region.size));
    let aligned = (region.size | region.mmap_offset | region.guest_addr).is_multiple_of(PAGE);
    let fits = ends.iter().all(Option::is_some) && i64::try_from(region.size).is_ok();
    if region.size == 0 || !aligned || !fits { Err(MemoryError::Shape(*region)) } else { Ok(()) }
}

fn overlap(a: &MemoryRegion, b: &MemoryRegion) -> bool {
    let meets = |a_start: u64, b_start: u64| a_start < b_start + b.size && b_start < a_start + a.size;
    meets(a.guest_addr, b.guest_addr) || meets(a.user_addr, b.user_addr)
}

/// Maps only what the file really holds: a mapping past its end would answer an access with SIGBUS.
fn map_region(region: &MemoryRegion, fd: OwnedFd) -> Result<GuestRegionMmap<()>, MemoryError> {
    let failed =
        |reason: &dyn std::fmt::Display| MemoryError::Map { region: *region, reason: reason.to_string() };
    let stat = fstat(&fd).map_err(|errno| failed(&errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(MemoryError::NotAFile(*region));
    }
    let file_len = stat.st_size as u64;
    if region.mmap_offset + region.size > file_len {
        return Err(MemoryError::PastEnd { region: *region, file_len });
    }
    let size = usize::try_from(region.size).map_err(|error| failed(&error))?;
    let mapping = MmapRegionBuilder::<()>::new(size)
        .with_file_offset(FileOffset::new(File::from(fd), region.mmap_offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(|error| failed(&error))?;
    leave_out_of_dumps(&mapping);
    GuestRegionMmap::new(mapping, GuestAddress(region.guest_addr)).ok_or(MemoryError::Shape(*region))
}

/// A daemon's core dump has no use for the guest's memory: whoever wants it has it in the frontend's, unless that was told
/// to leave it out.
#[expect(unsafe_code, reason = "madvise")]
fn leave_out_of_dumps(mapping: &MmapRegion<()>) {
    // SAFETY: the range is one whole mapping of ours, and the advice changes nothing that it reads as.
    let _ = unsafe { madvise(mapping.as_ptr().cast(), mapping.size(), Advice::LinuxDontDump) };
}

#[cfg(test)]
mod tests;
