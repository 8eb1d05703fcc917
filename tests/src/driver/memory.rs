//! The guest's RAM: two regions of one memfd with a hole between, as around a PCI hole.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use cleave_common::vhost_user::MemoryRegion;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::{DriverError, Result, USER_BASE};

/// Where the upper half starts: anywhere, as long as it is not where the lower half ends.
const HIGH: u64 = 1 << 32;

/// Memory that both sides map. The lower half is at 0, the upper half at 4 GiB.
pub struct GuestRam {
    file: File,
    map: GuestMemoryMmap<()>,
    regions: Vec<MemoryRegion>,
    next_free: u64,
}

impl GuestRam {
    /// `half` bytes below the hole and as many above.
    pub fn new(half: u64) -> Result<Self> {
        Self::of(half, MemfdFlags::empty())
    }

    /// The same in huge pages of 2 MiB.
    pub fn in_huge_pages(half: u64) -> Result<Self> {
        Self::of(half, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
    }

    fn of(half: u64, kind: MemfdFlags) -> Result<Self> {
        let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind)
            .map_err(|errno| DriverError::io("memfd")(errno.into()))?;
        let file = File::from(fd);
        file.set_len(2 * half).map_err(DriverError::io("memfd"))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(|errno| DriverError::io("memfd seals")(errno.into()))?;
        let region = |guest_addr: u64, mmap_offset: u64| MemoryRegion {
            guest_addr,
            size: half,
            user_addr: USER_BASE + guest_addr,
            mmap_offset,
        };
        let regions = vec![region(0, 0), region(HIGH, half)];
        let mut ranges = Vec::new();
        for region in &regions {
            let file = file.try_clone().map_err(DriverError::io("memfd"))?;
            let offset = FileOffset::new(file, region.mmap_offset);
            ranges.push((GuestAddress(region.guest_addr), half as usize, Some(offset)));
        }
        let map = GuestMemoryMmap::from_ranges_with_files(ranges)
            .map_err(|error| DriverError::io("map guest memory")(std::io::Error::other(error)))?;
        // Address 0 stays free, so that a forgotten address shows.
        Ok(Self { file, map, regions, next_free: 0x1000 })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Memory by guest-physical address.
    pub fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    /// The first guest-physical address above the hole.
    pub fn high(&self) -> u64 {
        HIGH
    }

    /// The address right behind the lower half: no memory.
    pub fn hole(&self) -> u64 {
        self.regions[0].size
    }

    /// `len` bytes in the lower half that nobody has yet.
    ///
    /// # Panics
    /// When the lower half is used up: the test asked for too little memory.
    pub fn allocate(&mut self, len: u64, align: u64) -> u64 {
        let at = self.next_free.next_multiple_of(align);
        assert!(at + len <= self.regions[0].size, "the guest has too little memory for its test");
        self.next_free = at + len;
        at
    }

    /// Where the next allocation starts, for [`GuestRam::release`].
    pub fn mark(&self) -> u64 {
        self.next_free
    }

    /// Takes back what was allocated since `mark`. The device must be done with it.
    pub fn release(&mut self, mark: u64) {
        self.next_free = self.next_free.min(mark);
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.map.write_slice(bytes, GuestAddress(addr))?)
    }

    pub fn read(&self, addr: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_into(addr, &mut bytes)?;
        Ok(bytes)
    }

    pub fn read_into(&self, addr: u64, bytes: &mut [u8]) -> Result<()> {
        Ok(self.map.read_slice(bytes, GuestAddress(addr))?)
    }

    pub fn read_byte(&self, addr: u64) -> Result<u8> {
        Ok(self.map.read_obj(GuestAddress(addr))?)
    }

    pub fn put<T: ByteValued>(&self, addr: u64, value: T) -> Result<()> {
        Ok(self.map.write_obj(value, GuestAddress(addr))?)
    }

    pub(super) fn load(&self, addr: u64) -> Result<u16> {
        Ok(u16::from_le(self.map.load(GuestAddress(addr), Ordering::Acquire)?))
    }

    pub(super) fn store(&self, addr: u64, value: u16) -> Result<()> {
        Ok(self.map.store(value.to_le(), GuestAddress(addr), Ordering::Release)?)
    }
}
