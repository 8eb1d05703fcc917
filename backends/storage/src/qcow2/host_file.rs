//! One file of a chain, as imago's storage: metadata, and the data that imago itself moves.
//!
//! Invariants: only the image's worker writes; a table is never referred to by the file before its refcount is in the
//! file, whenever the process dies (see [`HostFile::before_pointer`]).
#![expect(unsafe_code, reason = "imago's storage trait has unsafe methods")]

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, seek};

use super::header::Header;

/// A file, through the page cache.
#[derive(Debug)]
pub(crate) struct HostFile {
    file: File,
    /// It has the size it has.
    is_device: bool,
    /// Its place among the files of the chain: 0 is the image itself.
    index: u32,
    /// Reads past the end are zeros up to here, and an error from here on: bytes of a cluster, or 1.
    granularity: u64,
    /// Of a qcow2 file that is written.
    tables: Option<Mutex<Tables>>,
    helper: CommonStorageHelper,
}

/// Where the tables are that refer to other tables, as the file says.
#[derive(Debug, Clone)]
struct Tables {
    cluster_bits: u32,
    refcount_order: u32,
    l1: Range<u64>,
    reftable: Range<u64>,
}

impl HostFile {
    pub(super) fn raw(file: File, index: u32) -> Self {
        Self {
            file,
            is_device: false,
            index,
            granularity: 1,
            tables: None,
            helper: CommonStorageHelper::default(),
        }
    }

    pub(super) fn qcow2(file: File, index: u32, header: &Header, writable: bool) -> io::Result<Self> {
        let is_device = !file.metadata()?.is_file();
        let tables = writable.then(|| {
            Mutex::new(Tables {
                cluster_bits: header.cluster_bits,
                refcount_order: header.refcount_order,
                l1: header.l1_range(),
                reftable: header.reftable_range(),
            })
        });
        let granularity = header.cluster_size();
        let helper = CommonStorageHelper::default();
        Ok(Self { file, is_device, index, granularity, tables, helper })
    }

    /// Its place among the files of the chain.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    fn len(&self) -> io::Result<u64> {
        // Not the metadata: a device has none.
        Ok(seek(&self.file, SeekFrom::End(0))?)
    }

    /// The file ends before `at`. Its last cluster need not be there as a whole; others have to.
    fn past_end(&self, at: u64) -> io::Result<()> {
        if at < self.len()?.next_multiple_of(self.granularity) {
            return Ok(());
        }
        let message = format!("the image refers to {at:#x}, which is past the end of its file");
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, message))
    }

    fn read_filled(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.file.read_at(buffer, offset) {
                Ok(0) => {
                    self.past_end(offset)?;
                    buffer.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buffer = &mut buffer[n..];
                    offset += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// imago keeps changed refcounts in memory until a flush, and writes them before the L2 entries that depend on
    /// them. But what refers to a new table (an L1 entry to an L2 table, an entry of the refcount table to a refcount
    /// block) it writes at once. Died we between the two, the table would seem free and be given away again. So the
    /// table's own refcount is put into the file first; imago will write the same once more.
    fn before_pointer(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let Some(tables) = &self.tables else { return Ok(()) };
        let mut tables = tables.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.l1.contains(&offset) || tables.reftable.contains(&offset) {
            let bytes = slices.iter().flat_map(|slice| slice.iter().copied()).collect::<Vec<u8>>();
            for entry in bytes.as_chunks::<8>().0 {
                let table = u64::from_be_bytes(*entry) & 0x00ff_ffff_ffff_fe00;
                if table != 0 {
                    self.write_refcount(&tables, table)?;
                }
            }
        } else if offset == 0 {
            // The header: it may put the tables elsewhere.
            let bytes = slices.iter().flat_map(|slice| slice.iter().copied()).take(72).collect::<Vec<u8>>();
            tables.relocate(&bytes);
        }
        Ok(())
    }

    /// Makes the refcount of the cluster at `cluster` 1, unless it is something already.
    fn write_refcount(&self, tables: &Tables, cluster: u64) -> io::Result<()> {
        let bits = 1u64 << tables.refcount_order;
        let index = cluster >> tables.cluster_bits;
        let per_block = (8 << tables.cluster_bits) / bits;
        let entry = tables.reftable.start + index / per_block * 8;
        if !tables.reftable.contains(&entry) {
            return Ok(());
        }
        let mut block = [0; 8];
        self.file.read_exact_at(&mut block, entry)?;
        let block = u64::from_be_bytes(block) & 0xffff_ffff_ffff_fe00;
        if block == 0 {
            // A block that counts itself, and has done so before anything refers to it.
            return Ok(());
        }
        let bit = index % per_block * bits;
        let mut word = [0u8; 8];
        let word = &mut word[..bits.div_ceil(8) as usize];
        let at = block + bit / 8;
        self.file.read_exact_at(word, at)?;
        let shift = bit % 8;
        let mask = if bits < 8 { ((1u16 << bits) - 1) as u8 } else { 0xff };
        let counted =
            if bits < 8 { (word[0] >> shift) & mask != 0 } else { word.iter().any(|byte| *byte != 0) };
        if !counted {
            if let Some(last) = word.last_mut() {
                *last |= 1 << shift;
            }
            self.file.write_all_at(word, at)?;
        }
        Ok(())
    }
}

impl Tables {
    /// Takes note of a header that is about to be written.
    fn relocate(&mut self, header: &[u8]) {
        let word = |at: usize| header.get(at..).and_then(|rest| rest.first_chunk().copied());
        let long = |at: usize| header.get(at..).and_then(|rest| rest.first_chunk().copied());
        if let (Some(entries), Some(l1), Some(reftable), Some(clusters)) =
            (word(36), long(40), long(48), word(56))
        {
            let (l1, reftable) = (u64::from_be_bytes(l1), u64::from_be_bytes(reftable));
            self.l1 = l1..l1 + u64::from(u32::from_be_bytes(entries)) * 8;
            self.reftable =
                reftable..reftable + (u64::from(u32::from_be_bytes(clusters)) << self.cluster_bits);
        }
    }
}

impl Storage for HostFile {
    fn size(&self) -> io::Result<u64> {
        self.len()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut slice in bufv.into_inner() {
            let slice: &mut IoSliceMut<'_> = &mut slice;
            self.read_filled(slice, offset)?;
            offset += slice.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        let slices = bufv.into_inner();
        self.before_pointer(&slices, offset)?;
        for slice in slices {
            self.file.write_all_at(&slice, offset)?;
            offset += slice.len() as u64;
        }
        #[cfg(test)]
        super::tests::after_write(&self.file);
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        if !self.is_device && offset >= self.len()? {
            return self.file.set_len(end);
        }
        match fallocate(&self.file, FallocateFlags::ZERO_RANGE, offset, length) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {
                // imago writes zeros instead.
                Err(io::ErrorKind::Unsupported.into())
            }
            other => Ok(other?),
        }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promises are passed on.
        unsafe { self.pure_write_zeroes(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new_size: u64, _prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.file.set_len(new_size)
    }
}

impl Display for HostFile {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "file {}", self.index)
    }
}
