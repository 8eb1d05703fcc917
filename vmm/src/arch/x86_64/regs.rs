//! The state in which a vCPU enters a kernel, and the tables in memory that it needs.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{GDT, PAGE_DIRECTORIES, PDPT, PML4};
use crate::kvm::vcpu::EntryState;
use crate::memory::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_OSFXSR: u64 = 1 << 9;
pub(crate) const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 always reads 1; interrupts are off.
const RFLAGS_RESET: u64 = 2;

const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_HUGE: u64 = 1 << 7;
const HUGE_PAGE: u64 = 2 << 20;

/// The GDT of both entries. Linux's boot protocols fix the selectors of the 64-bit one: code 0x10, data 0x18.
const TABLE: [u64; 6] = [
    0,
    0x00cf_9b00_0000_ffff, // 0x08: 32-bit code, flat
    0x00af_9b00_0000_ffff, // 0x10: 64-bit code
    0x00cf_9300_0000_ffff, // 0x18: data, flat
    0x0000_8b00_0000_0067, // 0x20: task state, 64-bit: two entries
    0,
];

/// Long mode, identity-mapped up to 4 GiB (Linux 64-bit boot protocol): `rip`, and `rsi` for the zero page.
pub(crate) fn long_mode(memory: &GuestMemory, rip: u64, rsi: u64) -> Result<EntryState, GuestMemoryError> {
    write_gdt(memory)?;
    write_identity_map(memory)?;
    let code = segment(0x10, TABLE[2]);
    let mut sregs = flat(code);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    let regs = kvm_regs { rip, rsi, rflags: RFLAGS_RESET, ..Default::default() };
    Ok(EntryState { regs, sregs })
}

/// 32-bit protected mode without paging (PVH): `rip`, and `rbx` for the start info.
pub(super) fn protected_mode(
    memory: &GuestMemory,
    rip: u64,
    rbx: u64,
) -> Result<EntryState, GuestMemoryError> {
    write_gdt(memory)?;
    let mut sregs = flat(segment(0x08, TABLE[1]));
    sregs.cr0 = CR0_PE | CR0_ET;
    let regs = kvm_regs { rip, rbx, rflags: RFLAGS_RESET, ..Default::default() };
    Ok(EntryState { regs, sregs })
}

fn flat(code: kvm_segment) -> kvm_sregs {
    let data = segment(0x18, TABLE[3]);
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: segment(0x20, TABLE[4]),
        ldt: kvm_segment { unusable: 1, ..Default::default() },
        gdt: kvm_dtable { base: GDT, limit: (size_of_val(&TABLE) - 1) as u16, ..Default::default() },
        // No interrupt descriptor is valid: an exception before the kernel's own table is a triple fault.
        idt: kvm_dtable::default(),
        ..Default::default()
    }
}

/// A descriptor taken apart as KVM wants it (Intel SDM 3A, 3.4.5).
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |at: u32| (descriptor >> at & 1) as u8;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let base = descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000;
    kvm_segment {
        base,
        limit: if bit(55) == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: (descriptor >> 45 & 3) as u8,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        unusable: 0,
        padding: 0,
    }
}

fn write_gdt(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    write_words(memory, GDT, TABLE)
}

fn write_identity_map(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_obj((PDPT | PAGE_PRESENT_WRITABLE).to_le(), GuestAddress(PML4))?;
    write_words(memory, PDPT, (0..4).map(|gib| (PAGE_DIRECTORIES + gib * 0x1000) | PAGE_PRESENT_WRITABLE))?;
    let pages = (0..4 * 512).map(|page| (page * HUGE_PAGE) | PAGE_PRESENT_WRITABLE | PAGE_HUGE);
    write_words(memory, PAGE_DIRECTORIES, pages)
}

fn write_words(
    memory: &GuestMemory,
    at: u64,
    words: impl IntoIterator<Item = u64>,
) -> Result<(), GuestMemoryError> {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.write_slice(&bytes, GuestAddress(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_descriptor_covers_4_gib() {
        let code = segment(0x08, TABLE[1]);
        assert_eq!((code.base, code.limit, code.type_, code.l, code.db), (0, 0xffff_ffff, 0xb, 0, 1));
        let code = segment(0x10, TABLE[2]);
        assert_eq!((code.limit, code.l, code.db, code.present, code.s), (0xffff_ffff, 1, 0, 1, 1));
        let task = segment(0x20, TABLE[4]);
        assert_eq!((task.limit, task.type_, task.s, task.present), (0x67, 0xb, 0, 1));
    }
}
