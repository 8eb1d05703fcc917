//! bzImage, entered in 64-bit mode (Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
//!
//! The file is a real-mode part of `setup_sects + 1` sectors, which is not run, and the kernel proper. The header at
//! 0x1f1 of the first is copied into the zero page and completed there.

use std::fs::File;

use vm_memory::{Bytes, GuestAddress};

use super::{Boot, BootError, KernelError, Loaded, check_kernel, copy, memory_map, read_header};
use crate::arch::x86_64::layout::{ACPI_TABLES, COMMAND_LINE, ZERO_PAGE};
use crate::arch::x86_64::regs;
use crate::kvm::vcpu::EntryState;
use crate::memory::{GuestMemory, GuestRam};

const SECTOR: u64 = 512;
/// The unit of the header's syssize.
const PARAGRAPH: u64 = 16;
/// The setup header starts here, in the file and in the zero page; its length is known only from the byte at 0x201.
const HEADER: usize = 0x1f1;
/// What of the header this loader reads, at least.
const HEADER_END: usize = 0x268;
/// As far as the header may reach in the zero page, where the next field begins.
const HEADER_LIMIT: usize = 0x290;
/// From the start of the kernel proper to its 64-bit entry.
const ENTRY_64: u64 = 0x200;
/// Protocol 2.12, Linux 3.8: the first with xloadflags.
const OLDEST_PROTOCOL: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
/// A loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;

/// Offsets in the zero page.
mod zero_page {
    pub(super) const ACPI_RSDP: usize = 0x070;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const SYSSIZE: usize = 0x1f4;
    pub(super) const HEADER_LENGTH: usize = 0x201;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    pub(super) const E820_TABLE: usize = 0x2d0;
    pub(super) const SIZE: usize = 0x1000;
}

/// The zero page while it is made.
struct ZeroPage(Box<[u8; zero_page::SIZE]>);

impl ZeroPage {
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.0[at..at + N]);
        field
    }

    fn put<const N: usize>(&mut self, at: usize, field: [u8; N]) {
        self.0[at..at + N].copy_from_slice(&field);
    }
}

/// A kernel that fits.
pub(super) struct BzImage {
    /// With the kernel's own header in it and nothing else.
    page: ZeroPage,
    /// Of the kernel proper in the file.
    offset: u64,
    kernel: Loaded,
    initrd: Option<Loaded>,
}

impl BzImage {
    pub(super) fn read(boot: &Boot, ram_end: u64) -> Result<Self, BootError> {
        let refuse = |error| boot.kernel(error);
        let page = read_setup_header(&boot.kernel.file).map_err(refuse)?;
        let (offset, size) = find_kernel(&boot.kernel.file, &page).map_err(refuse)?;
        let gpa = u64::from_le_bytes(page.get(zero_page::PREF_ADDRESS));
        // What it uses before it knows the memory map.
        let needed = u64::from(u32::from_le_bytes(page.get(zero_page::INIT_SIZE))).max(size);
        check_kernel(gpa, needed, ram_end).map_err(refuse)?;
        boot.check_command_line(u32::from_le_bytes(page.get(zero_page::CMDLINE_SIZE)).into())?;
        let highest = u32::from_le_bytes(page.get(zero_page::INITRD_ADDR_MAX)).into();
        let initrd = boot.place_initrd(gpa + needed, highest, ram_end)?;
        Ok(Self { page, offset, kernel: Loaded { gpa, size }, initrd })
    }

    pub(super) fn load(self, ram: &GuestRam, boot: &Boot) -> Result<EntryState, BootError> {
        let Self { mut page, offset, kernel, initrd } = self;
        let memory = ram.memory();
        // Only these: it unpacks itself to an address of its own choice.
        ram.take_huge_pages(kernel.gpa..kernel.gpa + kernel.size);
        copy(memory, &boot.kernel.file, offset, kernel)
            .map_err(|error| boot.kernel(KernelError::Read(error)))?;
        boot.write_command_line(memory)?;
        page.put(zero_page::CMD_LINE_PTR, (COMMAND_LINE as u32).to_le_bytes());
        boot.copy_initrd(memory, initrd)?;
        if let Some(initrd) = initrd {
            // Both are below 4 GiB, since the header's limit is.
            page.put(zero_page::RAMDISK_IMAGE, (initrd.gpa as u32).to_le_bytes());
            page.put(zero_page::RAMDISK_SIZE, (initrd.size as u32).to_le_bytes());
        }
        page.put(zero_page::TYPE_OF_LOADER, [UNDEFINED_LOADER]);
        page.put(zero_page::ACPI_RSDP, ACPI_TABLES.to_le_bytes());
        put_memory_map(&mut page, memory, boot);
        memory.write_slice(&page.0[..], GuestAddress(ZERO_PAGE))?;
        Ok(regs::long_mode(memory, kernel.gpa + ENTRY_64, ZERO_PAGE)?)
    }
}

fn read_setup_header(kernel: &File) -> Result<ZeroPage, KernelError> {
    let mut start = [0; HEADER_LIMIT];
    read_header(kernel, &mut start, 0, "its setup header is not complete")?;
    let end = 0x202 + usize::from(start[zero_page::HEADER_LENGTH]);
    let mut page = ZeroPage(Box::new([0; zero_page::SIZE]));
    let end = end.clamp(HEADER, HEADER_LIMIT);
    page.0[HEADER..end].copy_from_slice(&start[HEADER..end]);

    let version = u16::from_le_bytes(page.get(zero_page::VERSION));
    let flags = u16::from_le_bytes(page.get(zero_page::XLOADFLAGS));
    if version < OLDEST_PROTOCOL || flags & XLF_KERNEL_64 == 0 || end < HEADER_END - 4 {
        return Err(KernelError::Not64Bit(version));
    }
    Ok(page)
}

/// Offset and size of the kernel proper. It goes to the end of the file: a signature may follow what the header counts,
/// but a kernel of which a part is missing would fault where nobody can say why.
fn find_kernel(kernel: &File, page: &ZeroPage) -> Result<(u64, u64), KernelError> {
    let sectors = match page.get::<1>(zero_page::SETUP_SECTS)[0] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let offset = (sectors + 1) * SECTOR;
    let length = kernel.metadata().map_err(KernelError::Read)?.len();
    let size = length.checked_sub(offset).filter(|size| *size > 0);
    let size = size.ok_or(KernelError::Truncated("there is nothing after its real-mode part"))?;
    let promised = u64::from(u32::from_le_bytes(page.get(zero_page::SYSSIZE))) * PARAGRAPH;
    if size < promised {
        return Err(KernelError::TruncatedImage { promised, size });
    }
    Ok((offset, size))
}

fn put_memory_map(page: &mut ZeroPage, memory: &GuestMemory, boot: &Boot) {
    const ENTRY: usize = 20;
    const MOST: usize = 128;
    let map = memory_map(memory, &boot.reserved);
    let entries = map.len().min(MOST);
    page.put(zero_page::E820_ENTRIES, [entries as u8]);
    for (at, (range, kind)) in map.iter().take(entries).enumerate() {
        let at = zero_page::E820_TABLE + at * ENTRY;
        page.put(at, range.start.to_le_bytes());
        page.put(at + 8, (range.end - range.start).to_le_bytes());
        page.put(at + 16, (*kind as u32).to_le_bytes());
    }
}
