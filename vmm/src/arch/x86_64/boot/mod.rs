//! Putting a kernel into memory and entering it: bzImage by Linux's 64-bit boot protocol, ELF by PVH.
//!
//! Kernel and initrd come from open files and are read anew at every [`Boot::load`], so that a reset needs no path. Both
//! files are hostile: every address and size in them is checked against the guest's RAM before a byte is copied. That
//! is also what [`Boot::check`] does, before there is any RAM: one judgement, made twice.

mod bzimage;
mod elf;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use cleave_common::size::ByteSize;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::layout::{
    ACPI_TABLES, COMMAND_LINE, COMMAND_LINE_ROOM, CONVENTIONAL_END, HIGH_MEMORY, RESET_VECTOR,
};
use crate::kvm::vcpu::EntryState;
use crate::memory::{GuestMemory, GuestRam};

/// All that a guest is started from, held open: a reset starts the same guest again.
#[derive(Debug)]
pub struct Boot {
    pub kernel: BootFile,
    pub initrd: Option<BootFile>,
    pub command_line: String,
    /// The image that [`super::acpi::build`] made for [`ACPI_TABLES`].
    pub acpi_tables: Vec<u8>,
    /// From [`reset_vector`].
    pub reset_vector: [u8; 16],
    /// Guest-physical ranges, outside RAM, that the guest must leave alone: ECAM.
    pub reserved: Vec<Range<u64>>,
}

/// An open file, and the path by which messages name it.
#[derive(Debug)]
pub struct BootFile {
    pub path: PathBuf,
    pub file: File,
}

/// What a guest finds where a PC's firmware starts: `out port, value`, then `hlt` for ever, in 16-bit code. On a
/// hardware-reduced platform Linux resets through EFI or else, in real mode, through here; not through the FADT.
pub fn reset_vector(port: u16, value: u8) -> [u8; 16] {
    let [low, high] = port.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
    let code = [0xba, low, high, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd];
    let mut bytes = [0; 16];
    bytes[..code.len()].copy_from_slice(&code);
    bytes
}

impl Boot {
    /// Refuses what cannot be started in a guest whose RAM from address 0 ends at `ram_end`, from the files alone.
    pub fn check(&self, ram_end: u64) -> Result<(), BootError> {
        self.read(ram_end).map(drop)
    }

    /// Loads kernel, initrd, command line and tables into memory that reads as zeroes, and says how the first vCPU
    /// starts.
    pub fn load(&self, ram: &GuestRam) -> Result<EntryState, BootError> {
        let memory = ram.memory();
        let image = self.read(low_ram_end(memory))?;
        take_early_memory(ram);
        memory.write_slice(&self.acpi_tables, GuestAddress(ACPI_TABLES))?;
        memory.write_slice(&self.reset_vector, GuestAddress(RESET_VECTOR))?;
        match image {
            Image::Elf(image) => image.load(ram, self),
            Image::BzImage(image) => image.load(ram, self),
        }
    }

    fn read(&self, ram_end: u64) -> Result<Image, BootError> {
        match Format::of(&self.kernel.file).map_err(|error| self.kernel(error))? {
            Format::Elf => elf::Elf::read(self, ram_end).map(Image::Elf),
            Format::BzImage => bzimage::BzImage::read(self, ram_end).map(Image::BzImage),
        }
    }

    fn kernel(&self, source: KernelError) -> BootError {
        BootError::Kernel { path: self.kernel.path.clone(), source }
    }

    /// Copies the command line with its final NUL.
    fn write_command_line(&self, memory: &GuestMemory) -> Result<(), BootError> {
        let mut bytes = self.command_line.as_bytes().to_vec();
        bytes.push(0);
        Ok(memory.write_slice(&bytes, GuestAddress(COMMAND_LINE))?)
    }

    /// `most` is what the kernel takes without the final NUL.
    fn check_command_line(&self, most: u64) -> Result<(), BootError> {
        let most = most.min(COMMAND_LINE_ROOM - 1);
        let length = self.command_line.len() as u64;
        if length > most {
            return Err(BootError::CommandLineTooLong { length, most });
        }
        if self.command_line.contains('\0') {
            return Err(BootError::CommandLineNul);
        }
        Ok(())
    }

    /// Where the initrd goes: as high as it may lie, not above `highest`, in the RAM that starts at 0.
    fn place_initrd(&self, kernel_end: u64, highest: u64, ram_end: u64) -> Result<Option<Loaded>, BootError> {
        let Some(BootFile { path, file }) = &self.initrd else { return Ok(None) };
        let refuse = |source| BootError::Initrd { path: path.clone(), source };
        let size = file.metadata().map_err(|error| refuse(InitrdError::Read(error)))?.len();
        let limit = ram_end.min(highest.saturating_add(1));
        let kernel_end = kernel_end.next_multiple_of(0x1000);
        let gpa = limit.checked_sub(size).map(|gpa| gpa & !0xfff).filter(|gpa| *gpa >= kernel_end);
        match gpa {
            Some(gpa) => Ok(Some(Loaded { gpa, size })),
            None => {
                let room = limit.saturating_sub(kernel_end);
                Err(refuse(InitrdError::TooLarge { size, room, kernel_end, limit }))
            }
        }
    }

    fn copy_initrd(&self, memory: &GuestMemory, place: Option<Loaded>) -> Result<(), BootError> {
        let Some((BootFile { path, file }, place)) = self.initrd.as_ref().zip(place) else { return Ok(()) };
        copy(memory, file, 0, place)
            .map_err(|error| BootError::Initrd { path: path.clone(), source: InitrdError::Read(error) })
    }
}

/// A kernel that has been judged, with all that loading it takes.
enum Image {
    Elf(elf::Elf),
    BzImage(bzimage::BzImage),
}

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("--kernel {path}: {source}", path = path.display())]
    Kernel { path: PathBuf, source: KernelError },
    #[error("--initrd {path}: {source}", path = path.display())]
    Initrd { path: PathBuf, source: InitrdError },
    #[error("--append: the command line is {length} bytes long, and this kernel takes {most}")]
    CommandLineTooLong { length: u64, most: u64 },
    #[error("--append: the command line has a NUL byte in it")]
    CommandLineNul,
    #[error("cannot write to guest memory")]
    Memory(#[from] GuestMemoryError),
}

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot read it")]
    Read(#[source] io::Error),
    #[error(
        "is neither a bzImage nor an ELF vmlinux: it starts with {0}, and an ELF file with 7f 45 4c 46, a bzImage has \"HdrS\" at 0x202"
    )]
    NotAKernel(String),
    #[error("the file ends early: {0}; copy it again")]
    Truncated(&'static str),
    #[error(
        "the file ends early: its header promises {promised} bytes after the real-mode part, and there are {size}; copy it again"
    )]
    TruncatedImage { promised: u64, size: u64 },
    #[error("cannot be started in 64-bit mode (boot protocol {major}.{minor:02}): use a 64-bit kernel, 3.8 or later",
        major = .0 >> 8, minor = .0 & 0xff)]
    Not64Bit(u16),
    #[error("is an ELF file, but not for x86-64 (machine {machine}, class {class})")]
    NotX86_64 { machine: u16, class: u8 },
    #[error("has no PVH entry point: use its bzImage, or build it with CONFIG_PVH=y")]
    NoPvhEntry,
    #[error(
        "does not fit in the guest's memory: it needs {start:#x} to {end:#x}, and RAM ends at {ram_end:#x} ({}); give it more (--memory)",
        ByteSize(*ram_end)
    )]
    TooLarge { start: u64, end: u64, ram_end: u64 },
    #[error("wants to be at {start:#x}, below 1 MiB, where the boot data are")]
    TooLow { start: u64 },
}

#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    #[error("cannot read it")]
    Read(#[source] io::Error),
    #[error(
        "its {size} bytes do not fit in the guest's memory: there are {room} bytes between the kernel's end at {kernel_end:#x} and {limit:#x}; give it more (--memory)"
    )]
    TooLarge { size: u64, room: u64, kernel_end: u64, limit: u64 },
}

/// A file's range that lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Loaded {
    gpa: u64,
    size: u64,
}

enum Format {
    Elf,
    BzImage,
}

impl Format {
    fn of(kernel: &File) -> Result<Self, KernelError> {
        let mut start = [0; 0x206];
        let length = read_up_to(kernel, &mut start, 0).map_err(KernelError::Read)?;
        match &start[..length] {
            [0x7f, b'E', b'L', b'F', ..] => Ok(Self::Elf),
            whole if whole.get(0x202..0x206) == Some(b"HdrS") => Ok(Self::BzImage),
            [] => Err(KernelError::NotAKernel("nothing: it is empty".to_owned())),
            other => {
                let bytes: Vec<_> = other.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
                Err(KernelError::NotAKernel(bytes.join(" ")))
            }
        }
    }
}

fn read_up_to(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<usize> {
    let wanted = buffer.len();
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => break,
            Ok(read) => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(wanted - buffer.len())
}

/// Reads a header of the kernel, whole.
fn read_header(kernel: &File, buffer: &mut [u8], offset: u64, what: &'static str) -> Result<(), KernelError> {
    let read = read_up_to(kernel, buffer, offset).map_err(KernelError::Read)?;
    if read < buffer.len() { Err(KernelError::Truncated(what)) } else { Ok(()) }
}

/// Copies the bytes of `file` at `offset` to `target`, straight into guest memory. The range has been checked.
fn copy(memory: &GuestMemory, file: &File, offset: u64, target: Loaded) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::Start(offset))?;
    memory
        .read_exact_volatile_from(GuestAddress(target.gpa), &mut file, target.size as usize)
        .map_err(io::Error::other)
}

/// End of the RAM that starts at 0.
fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory.find_region(GuestAddress(0)).map_or(0, |region| region.len())
}

/// Takes in huge pages the memory that Linux uses at either end of RAM before its first process: the first MiB; at the
/// top its page structures, a 64th of RAM, and early allocations. Seen of Linux 6.1 with 256 MiB to 2 GiB.
fn take_early_memory(ram: &GuestRam) {
    const EARLY_ALLOCATIONS: u64 = 6 << 20;
    let top = ram.regions().map(|region| region.gpa + region.size).max().unwrap_or(0);
    ram.take_huge_pages(0..HIGH_MEMORY);
    ram.take_huge_pages(top.saturating_sub(EARLY_ALLOCATIONS + ram.size() / 64)..top);
}

/// Refuses a kernel that would not lie in RAM above 1 MiB.
fn check_kernel(start: u64, size: u64, ram_end: u64) -> Result<(), KernelError> {
    if start < HIGH_MEMORY {
        return Err(KernelError::TooLow { start });
    }
    match start.checked_add(size) {
        Some(end) if end <= ram_end => Ok(()),
        end => Err(KernelError::TooLarge { start, end: end.unwrap_or(u64::MAX), ram_end }),
    }
}

/// The kinds of memory that both protocols tell a kernel of; the numbers are those of e820 (ACPI 6.5, 15.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Ram = 1,
    Reserved = 2,
    AcpiTables = 3,
}

/// The guest's memory map, lowest first.
fn memory_map(memory: &GuestMemory, reserved: &[Range<u64>]) -> Vec<(Range<u64>, Kind)> {
    let mut map = vec![
        (0..CONVENTIONAL_END, Kind::Ram),
        (ACPI_TABLES..HIGH_MEMORY, Kind::AcpiTables),
        (HIGH_MEMORY..low_ram_end(memory), Kind::Ram),
    ];
    let high = memory.iter().filter(|region| region.start_addr().0 != 0);
    map.extend(high.map(|region| (region.start_addr().0..region.start_addr().0 + region.len(), Kind::Ram)));
    map.extend(reserved.iter().map(|range| (range.clone(), Kind::Reserved)));
    map.sort_by_key(|(range, _)| range.start);
    map
}
