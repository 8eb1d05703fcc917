//! A guest that ends in a state it cannot leave: what happened is said, with registers, and the exit code is its own.

use crate::rig::{Rig, SOON, nothing_left_behind, says};
use cleave_tests::vm::{Outcome, Vm};

pub const CASES: &[crate::Case] = &[("faults::a_triple_fault_has_its_own_exit_code", triple_fault)];

const GUEST_FAULT: i32 = 6;

fn triple_fault(rig: &Rig) -> Outcome<()> {
    let kernel = rig.write("triple-fault", &kernel_that_triple_faults())?;
    let exit = Vm::start(&mut rig.shell().kernel(&kernel).command())?.wait(SOON)?;
    exit.demand(GUEST_FAULT)?;
    for words in ["triple fault", "rip", "cr3"] {
        says(&exit.errors.to_lowercase(), words)?;
    }
    nothing_left_behind()
}

/// An ELF file with a PVH entry whose first instructions load an empty IDT and raise an exception: the exception, the
/// double fault and with it the processor have nowhere to go.
fn kernel_that_triple_faults() -> Vec<u8> {
    const ENTRY: u32 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    /// XEN_ELFNOTE_PHYS32_ENTRY: where PVH starts.
    const PHYS32_ENTRY: u32 = 18;

    let idt = ENTRY + 9;
    let mut code = vec![0x0f, 0x01, 0x1d];
    code.extend(idt.to_le_bytes());
    code.extend([0x0f, 0x0b]);
    code.extend([0; 6]);

    let mut note = Vec::new();
    [4, 4, PHYS32_ENTRY].iter().for_each(|word: &u32| note.extend(word.to_le_bytes()));
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [u64::from(ENTRY), 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut program_header = |kind: u32, offset: u64, address: u64, size: u64| {
        [kind, 7].iter().for_each(|word| file.extend(word.to_le_bytes()));
        [offset, address, address, size, size, 4]
            .iter()
            .for_each(|word: &u64| file.extend(word.to_le_bytes()));
    };
    program_header(1, HEADERS + NOTE, ENTRY.into(), code.len() as u64);
    program_header(4, HEADERS, 0, NOTE);
    file.extend(note);
    file.extend(code);
    file
}
