//! ELF vmlinux, entered by PVH (Xen, docs/misc/pvh.pandoc; Linux takes it with CONFIG_PVH).
//!
//! The entry point is in a note of the owner "Xen"; the kernel starts in 32-bit protected mode with the start info's
//! address in ebx.

use std::fs::File;
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use super::{Boot, BootError, KernelError, Loaded, check_kernel, copy, memory_map, read_header};
use crate::arch::x86_64::layout::{ACPI_TABLES, COMMAND_LINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use crate::arch::x86_64::regs;
use crate::kvm::vcpu::EntryState;
use crate::memory::{GuestMemory, GuestRam};

const EHDR: usize = 64;
const PHDR: usize = 56;
const CLASS_64: u8 = 2;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Kernels have a handful.
const MOST_HEADERS: u16 = 128;
/// Bytes of a note segment worth reading.
const MOST_NOTES: u64 = 64 << 10;

/// Bytes after the kernel that Linux 6.1 uses before its first process.
const FIRST_ALLOCATIONS: u64 = 28 << 20;

const NOTE_OWNER: &[u8] = b"Xen\0";
/// XEN_ELFNOTE_PHYS32_ENTRY
const NOTE_PHYS32_ENTRY: u32 = 18;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
/// What an x86 Linux takes (COMMAND_LINE_SIZE) without the final NUL. PVH has no field for it.
const MOST_COMMAND_LINE: u64 = 2047;
/// The address of an initrd that Linux takes with PVH: it copies what lies higher.
const HIGHEST_INITRD: u64 = 0xffff_ffff;

/// A program header, of the fields used here.
#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_size: u64,
    memory_size: u64,
}

/// A kernel that fits.
pub(super) struct Elf {
    /// Those that are loaded.
    segments: Vec<Segment>,
    /// Where they lie.
    range: Range<u64>,
    entry: u32,
    initrd: Option<Loaded>,
}

impl Elf {
    pub(super) fn read(boot: &Boot, ram_end: u64) -> Result<Self, BootError> {
        let refuse = |error| boot.kernel(error);
        let kernel = &boot.kernel.file;
        let mut segments = read_segments(kernel).map_err(refuse)?;
        let entry = pvh_entry(kernel, &segments).map_err(refuse)?;
        segments.retain(|segment| segment.kind == PT_LOAD && segment.memory_size > 0);
        let range = place_segments(kernel, &segments, ram_end).map_err(refuse)?;
        boot.check_command_line(MOST_COMMAND_LINE)?;
        let initrd = boot.place_initrd(range.end, HIGHEST_INITRD, ram_end)?;
        Ok(Self { segments, range, entry, initrd })
    }

    /// Memory reads as zeroes, so only what is in the file is written.
    pub(super) fn load(self, ram: &GuestRam, boot: &Boot) -> Result<EntryState, BootError> {
        let memory = ram.memory();
        // An ELF kernel is where it stays, and what follows is what its allocator hands out first.
        ram.take_huge_pages(self.range.start..self.range.end.saturating_add(FIRST_ALLOCATIONS));
        for segment in &self.segments {
            let target = Loaded { gpa: segment.paddr, size: segment.file_size };
            copy(memory, &boot.kernel.file, segment.offset, target)
                .map_err(|error| boot.kernel(KernelError::Read(error)))?;
        }
        boot.write_command_line(memory)?;
        boot.copy_initrd(memory, self.initrd)?;
        write_start_info(memory, boot, self.initrd)?;
        Ok(regs::protected_mode(memory, self.entry.into(), PVH_START_INFO)?)
    }
}

fn read_segments(kernel: &File) -> Result<Vec<Segment>, KernelError> {
    let mut header = [0; EHDR];
    read_header(kernel, &mut header, 0, "its ELF header is not complete")?;
    let (class, machine) = (header[4], u16_at(&header, 18));
    if class != CLASS_64 || machine != MACHINE_X86_64 {
        return Err(KernelError::NotX86_64 { machine, class });
    }
    let (table, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PHDR || count > MOST_HEADERS {
        return Err(KernelError::Truncated("its program headers are not those of a kernel"));
    }
    let mut bytes = vec![0; PHDR * usize::from(count)];
    read_header(kernel, &mut bytes, table, "its program headers are not complete")?;
    let segments = bytes.chunks_exact(PHDR).map(|header| Segment {
        kind: u32_at(header, 0),
        offset: u64_at(header, 8),
        paddr: u64_at(header, 24),
        file_size: u64_at(header, 32),
        memory_size: u64_at(header, 40),
    });
    Ok(segments.collect())
}

/// The range of memory that the segments lie in.
fn place_segments(kernel: &File, segments: &[Segment], ram_end: u64) -> Result<Range<u64>, KernelError> {
    let length = kernel.metadata().map_err(KernelError::Read)?.len();
    let in_file =
        |segment: &Segment| segment.offset.checked_add(segment.file_size).is_some_and(|end| end <= length);
    if !segments.iter().all(in_file) {
        return Err(KernelError::Truncated("a segment is not complete"));
    }
    let size = |segment: &Segment| segment.memory_size.max(segment.file_size);
    let start = segments.iter().map(|segment| segment.paddr).min();
    let end = segments.iter().map(|segment| segment.paddr.saturating_add(size(segment))).max();
    let Some((start, end)) = start.zip(end) else {
        return Err(KernelError::Truncated("it has nothing to load"));
    };
    check_kernel(start, end - start, ram_end)?;
    Ok(start..end)
}

fn pvh_entry(kernel: &File, segments: &[Segment]) -> Result<u32, KernelError> {
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        let mut notes = vec![0; segment.file_size.min(MOST_NOTES) as usize];
        read_header(kernel, &mut notes, segment.offset, "its notes are not complete")?;
        if let Some(entry) = find_entry(&notes) {
            return Ok(entry);
        }
    }
    Err(KernelError::NoPvhEntry)
}

/// Walks notes of the form: owner size, description size, type, owner, description; the latter two padded to 4.
fn find_entry(mut notes: &[u8]) -> Option<u32> {
    const HEADER: usize = 12;
    while notes.len() >= HEADER {
        let owner_size = u32_at(notes, 0) as usize;
        let size = u32_at(notes, 4) as usize;
        let kind = u32_at(notes, 8);
        let description_at = HEADER.checked_add(owner_size.checked_next_multiple_of(4)?)?;
        let next = description_at.checked_add(size.checked_next_multiple_of(4)?)?;
        let owner = notes.get(HEADER..HEADER.checked_add(owner_size)?)?;
        let description = notes.get(description_at..description_at.checked_add(size)?)?;
        if owner == NOTE_OWNER && kind == NOTE_PHYS32_ENTRY {
            // 4 or 8 bytes; the entry is below 4 GiB in both.
            return Some(u32::from_le_bytes(description.first_chunk().copied()?));
        }
        notes = notes.get(next..)?;
    }
    None
}

/// The start info (version 1), the list of its one module, and the memory map (xen/include/public/arch-x86/hvm/
/// start_info.h).
fn write_start_info(memory: &GuestMemory, boot: &Boot, initrd: Option<Loaded>) -> Result<(), BootError> {
    let map = memory_map(memory, &boot.reserved);
    let mut bytes = Vec::new();
    for (range, kind) in &map {
        bytes.extend(range.start.to_le_bytes());
        bytes.extend((range.end - range.start).to_le_bytes());
        bytes.extend(u64::from(*kind as u32).to_le_bytes());
    }
    memory.write_slice(&bytes, GuestAddress(PVH_MEMORY_MAP))?;

    let modules = match initrd {
        None => 0,
        Some(initrd) => {
            let module: Vec<u8> =
                [initrd.gpa, initrd.size, 0, 0].into_iter().flat_map(u64::to_le_bytes).collect();
            memory.write_slice(&module, GuestAddress(PVH_MODULES))?;
            1
        }
    };
    let flags = 0;
    let mut info = Vec::new();
    info.extend(
        [START_INFO_MAGIC, START_INFO_VERSION, flags, modules].into_iter().flat_map(u32::to_le_bytes),
    );
    let addresses = [PVH_MODULES, COMMAND_LINE, ACPI_TABLES, PVH_MEMORY_MAP];
    info.extend(addresses.into_iter().flat_map(u64::to_le_bytes));
    info.extend((map.len() as u64).to_le_bytes());
    Ok(memory.write_slice(&info, GuestAddress(PVH_START_INFO))?)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
