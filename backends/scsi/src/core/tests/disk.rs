//! Reading, writing, flushing, verifying.

use super::*;
use crate::Range;
use crate::cdb::{be32, be64};

fn range(lba: u64, blocks: u64) -> Range {
    Range { offset: lba * BLOCK, len: blocks * BLOCK }
}

const DATA: [u8; 16 * BLOCK as usize] = [7; 16 * BLOCK as usize];

#[test]
fn reads_of_all_lengths_name_their_bytes() {
    let table: [(&[u8], Range); 5] = [
        (&cdbs::six(0x08, 100, 9), range(100, 9)),
        (&cdbs::six(0x08, 100, 0), range(100, 256)),
        (&cdbs::ten(0x28, 0, 999, 1), range(999, 1)),
        (&cdbs::twelve(0xa8, 0, 3, 200), range(3, 200)),
        (&cdbs::sixteen(0x88, 0, 0, 256), range(0, 256)),
    ];
    for (cdb, range) in table {
        assert_eq!(io(&mut disk(), cdb, &[]), Io::Read { range, fua: false });
    }
    assert_eq!(
        io(&mut disk(), &cdbs::ten(0x28, 0x08, 1, 1), &[]),
        Io::Read { range: range(1, 1), fua: true }
    );
}

#[test]
fn addresses_past_32_bits_are_reached() {
    let blocks = 1 << 40;
    let mut unit = known(Unit::disk(identity(), thin(), medium(blocks)).expect("a good disk"));
    let at = blocks - 2;
    assert_eq!(
        io(&mut unit, &cdbs::sixteen(0x88, 0, at, 2), &[]),
        Io::Read { range: range(at, 2), fua: false }
    );
    assert_sense(&run(&mut unit, &cdbs::sixteen(0x88, 0, at, 3), &[]), out_of_range(blocks));
    assert_sense(&run(&mut unit, &cdbs::sixteen(0x88, 0, u64::MAX, 2), &[]), out_of_range(u64::MAX));
    assert_eq!(data(&mut unit, &cdbs::ten(0x25, 0, 0, 0)), [255, 255, 255, 255, 0, 0, 2, 0]);
    let mut read_capacity = cdbs::sixteen(0x9e, 0x10, 0, 32);
    let capacity = data(&mut unit, &read_capacity);
    assert_eq!((be64(&capacity, 0), be32(&capacity, 8)), (blocks - 1, 512));
    // Physical blocks of 8 logical ones; LBPME and LBPRZ.
    assert_eq!(capacity[13..16], [3, 0xc0, 0]);
    assert_eq!(capacity.len(), 32);
    read_capacity[13] = 12;
    assert_eq!(data(&mut unit, &read_capacity), capacity[..12]);
}

#[test]
fn writes_are_durable_when_asked_or_without_a_cache() {
    let mut unit = disk();
    let write = |unit: &mut Unit, cdb: &[u8]| match io(unit, cdb, &DATA) {
        Io::Write { range, durable } => (range, durable),
        other => panic!("{other:?}"),
    };
    assert_eq!(write(&mut unit, &cdbs::six(0x0a, 5, 2)), (range(5, 2), false));
    assert_eq!(write(&mut unit, &cdbs::ten(0x2a, 0x08, 5, 2)), (range(5, 2), true));
    assert_eq!(write(&mut unit, &cdbs::twelve(0xaa, 0x10, 5, 2)), (range(5, 2), false));
    assert_eq!(write(&mut unit, &cdbs::sixteen(0x8a, 0x18, 5, 2)), (range(5, 2), true));
    unit.modes.write_cache = false;
    assert_eq!(write(&mut unit, &cdbs::ten(0x2a, 0, 5, 2)), (range(5, 2), true));
}

#[test]
fn residuals_are_what_was_not_used() {
    let mut unit = disk();
    let cdb = cdbs::ten(0x28, 0, 0, 2);
    let Step::Io { task, .. } = step_of(&mut unit, US, &cdb, &[], 3 * BLOCK) else { panic!() };
    assert_eq!(task.complete(Ok(())).residual, BLOCK);
    assert_eq!(task_of_write(&mut unit, 2).complete(Ok(())).residual, 14 * BLOCK + (1 << 20));
    let Step::Overrun { needed } = step_of(&mut unit, US, &cdb, &[], 2 * BLOCK - 1) else { panic!() };
    assert_eq!(needed, 2 * BLOCK);
    let cdb = cdbs::ten(0x2a, 0, 0, 2);
    let Step::Overrun { needed } = step_of(&mut unit, US, &cdb, &DATA[..1023], 0) else { panic!() };
    assert_eq!(needed, 2 * BLOCK);
    // No blocks, no data: but the address has to be there.
    assert_good(&run(&mut unit, &cdbs::ten(0x28, 0, 999, 0), &[]));
    assert_sense(&run(&mut unit, &cdbs::ten(0x28, 0, 1000, 0), &[]), out_of_range(1000));
}

fn task_of_write(unit: &mut Unit, blocks: u16) -> Task {
    task(unit, &cdbs::ten(0x2a, 0, 0, blocks), &DATA)
}

#[test]
fn caches_are_synchronized_whole() {
    for cdb in [&cdbs::ten(0x35, 0, 0, 0)[..], &cdbs::ten(0x35, 2, 990, 10), &cdbs::sixteen(0x91, 0, 5, 0)] {
        assert_eq!(io(&mut disk(), cdb, &[]), Io::Flush);
    }
    assert_sense(&run(&mut disk(), &cdbs::ten(0x35, 0, 990, 11), &[]), out_of_range(1000));
    assert_sense(&run(&mut disk(), &cdbs::sixteen(0x91, 0, 1000, 0), &[]), out_of_range(1000));
    assert_eq!(io(&mut read_only_disk(), &cdbs::ten(0x35, 0, 0, 0), &[]), Io::Flush);
}

#[test]
fn verifying_compares_as_told() {
    let mut unit = disk();
    let verify = |unit: &mut Unit, check: u8| io(unit, &cdbs::ten(0x2f, check << 1, 10, 4), &DATA);
    assert_eq!(verify(&mut unit, 0), Io::Verify { range: range(10, 4) });
    assert_eq!(verify(&mut unit, 1), Io::Compare { range: range(10, 4) });
    let pattern = DATA[..512].into();
    assert_eq!(verify(&mut unit, 3), Io::CompareSame { range: range(10, 4), pattern });
    assert_sense(&run(&mut unit, &cdbs::ten(0x2f, 4, 10, 4), &DATA), Sense::cdb_bit(1, 2));
    assert_eq!(
        io(&mut unit, &cdbs::twelve(0xaf, 0, 0, 1), &[]),
        io(&mut unit, &cdbs::sixteen(0x8f, 0, 0, 1), &[])
    );
    let Step::Overrun { needed } = step_of(&mut unit, US, &cdbs::ten(0x2f, 2, 0, 4), &DATA[..512], 0) else {
        panic!()
    };
    assert_eq!(needed, 4 * BLOCK);
    let answer =
        task(&mut unit, &cdbs::ten(0x2f, 2, 0, 4), &DATA).complete(Err(Failure::Miscompare { at: 9 }));
    assert_sense(&answer, Sense::MISCOMPARE.with_information(Some(9)));
}

#[test]
fn compare_and_write_takes_twice_its_blocks() {
    let mut unit = disk();
    let mut cdb = cdbs::sixteen(0x89, 0x08, 20, 2);
    assert_eq!(io(&mut unit, &cdb, &DATA), Io::CompareAndWrite { range: range(20, 2), durable: true });
    assert_eq!(task(&mut unit, &cdb, &DATA).complete(Ok(())).residual, 12 * BLOCK + (1 << 20));
    cdb[13] = 9;
    let Step::Overrun { needed } = step_of(&mut unit, US, &cdb, &DATA, 0) else { panic!() };
    assert_eq!(needed, 18 * BLOCK);
    cdb[13] = 0;
    assert_good(&run(&mut unit, &cdb, &[]));
    assert_sense(&run(&mut read_only_disk(), &cdb, &DATA), Sense::WRITE_PROTECTED);
}

#[test]
fn a_stopped_disk_waits_for_start() {
    let mut unit = disk();
    let Step::Control { actions, .. } = step_of(&mut unit, US, &cdbs::STOP, &[], 0) else { panic!() };
    assert!(matches!(&actions[..], [crate::Action::Flush, crate::Action::Save(_)]), "{actions:?}");
    assert_sense(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]), Sense::INITIALIZING_COMMAND_REQUIRED);
    assert_sense(&run(&mut unit, &cdbs::ten(0x28, 0, 0, 1), &[]), Sense::INITIALIZING_COMMAND_REQUIRED);
    assert_good(&run(&mut unit, &cdbs::START, &[]));
    assert_good(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]));
    // It cannot be ejected, and has one power condition.
    assert_sense(&run(&mut unit, &cdbs::EJECT, &[]), Sense::cdb_bit(4, 1));
    assert_sense(&run(&mut unit, &[0x1b, 0, 0, 0, 0x21, 0], &[]), Sense::cdb_bit(4, 7));
}

#[test]
fn a_removable_disk_comes_and_goes() {
    let mut unit = removable_disk(None);
    assert_sense(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]), Sense::MEDIUM_NOT_PRESENT);
    unit.load(Medium { blocks: 10, read_only: false }).expect("it is removable");
    assert_sense(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]), Sense::unit_attention(0x28, 0));
    assert_good(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]));
    let Step::Control { actions, .. } = step_of(&mut unit, US, &cdbs::EJECT, &[], 0) else { panic!() };
    assert!(
        matches!(&actions[..], [crate::Action::Flush, crate::Action::Save(_), crate::Action::Ejected]),
        "{actions:?}"
    );
    assert_sense(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]), Sense::MEDIUM_NOT_PRESENT);
}
