//! Guest-physical addresses below 1 MiB that the start of a guest is built from, and those that x86 fixes.
//!
//! ```text
//!   0x00500  GDT
//!   0x06000  PVH start info, module list, memory map
//!   0x07000  boot_params ("zero page")
//!   0x09000  page tables, identity map of 4 GiB   (to 0x0f000)
//!   0x20000  kernel command line                  (to 0x30000)
//!   0x9fc00  end of conventional memory
//!   0xe0000  ACPI tables, RSDP first              (to 0xffff0)
//!   0xffff0  reset vector: what a guest in real mode jumps to
//! ```

pub(super) const GDT: u64 = 0x500;
pub(super) const PVH_START_INFO: u64 = 0x6000;
pub(super) const PVH_MODULES: u64 = 0x6040;
pub(super) const PVH_MEMORY_MAP: u64 = 0x6080;
pub(super) const ZERO_PAGE: u64 = 0x7000;
pub(super) const PML4: u64 = 0x9000;
pub(super) const PDPT: u64 = 0xa000;
/// Four page directories, one a GiB.
pub(super) const PAGE_DIRECTORIES: u64 = 0xb000;
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
pub(super) const COMMAND_LINE_ROOM: u64 = 0x1_0000;
/// Where RAM ends for a kernel below the first MiB.
pub(super) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where a kernel's memory starts.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;

/// The RSDP, and the other ACPI tables after it.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Bytes for all ACPI tables.
pub const ACPI_ROOM: u64 = RESET_VECTOR - ACPI_TABLES;
/// Where a PC's firmware starts, in real mode as f000:fff0.
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;

/// Fixed by the in-kernel interrupt controllers.
pub(super) const IOAPIC: u32 = 0xfec0_0000;
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
