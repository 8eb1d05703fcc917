//! Mode pages, read and chosen.

use super::*;
use crate::Action;

fn sense_6(page: u8) -> [u8; 6] {
    [0x1a, 0, page, 0, 255, 0]
}

/// MODE SELECT (6) with these pages.
fn select(unit: &mut Unit, pages: &[u8]) -> Answer {
    let list = [&[0, 0, 0, 0], pages].concat();
    run(unit, &[0x15, 0x10, 0, 0, list.len() as u8, 0], &list)
}

fn caching(wce: bool) -> [u8; 20] {
    let mut page = [0; 20];
    (page[0], page[1], page[2]) = (0x08, 18, u8::from(wce) << 2);
    page
}

fn control(descriptor_sense: bool, software_write_protect: bool) -> [u8; 12] {
    [
        0x0a,
        10,
        2 | u8::from(descriptor_sense) << 2,
        0x10,
        u8::from(software_write_protect) << 3,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]
}

#[test]
fn pages_have_their_headers() {
    let bytes = data(&mut disk(), &sense_6(0x08));
    assert_eq!(bytes[..4], [31, 0, 0x10, 8]);
    assert_eq!(bytes[4..12], [0, 0, 0x03, 0xe8, 0, 0, 2, 0]);
    assert_eq!(bytes[12..], caching(true));
    let bytes = data(&mut disk(), &[0x5a, 0x10, 0x0a, 0, 0, 0, 0, 0, 255, 0]);
    assert_eq!(bytes[..8], [0, 34, 0, 0x10, 1, 0, 0, 16]);
    assert_eq!(bytes[8..24], [0, 0, 0, 0, 0, 0, 0x03, 0xe8, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(bytes[24..], control(false, false));
    // Without a block descriptor; of a disk that is read-only; cut off.
    let bytes = data(&mut read_only_disk(), &[0x1a, 0x08, 0x1c, 0, 255, 0]);
    assert_eq!(bytes[..7], [15, 0, 0x90, 0, 0x1c, 10, 8]);
    assert_eq!(data(&mut disk(), &[0x1a, 0, 0x3f, 0, 10, 0]).len(), 10);
}

#[test]
fn all_pages_are_the_pages() {
    let codes = |bytes: &[u8]| {
        let mut codes = Vec::new();
        let mut at = 12;
        while at < bytes.len() {
            codes.push(bytes[at]);
            at += 2 + usize::from(bytes[at + 1]);
        }
        assert_eq!(at, bytes.len());
        codes
    };
    for subpage in [0, 0xff] {
        let bytes = data(&mut disk(), &[0x1a, 0, 0x3f, subpage, 255, 0]);
        assert_eq!(codes(&bytes), [0x01, 0x08, 0x0a, 0x1c]);
        assert_eq!(usize::from(bytes[0]), bytes.len() - 1);
    }
    let (mut unit, changeable) = (disk(), data(&mut disk(), &sense_6(0x7f)));
    assert_eq!(changeable[12 + 12 + 2], 0x04);
    assert_sense(&run(&mut unit, &sense_6(0xff), &[]), Sense::SAVING_NOT_SUPPORTED);
    assert_sense(&run(&mut unit, &sense_6(0x2a), &[]), Sense::cdb_bit(2, 5));
    assert_sense(&run(&mut unit, &sense_6(0x40), &[]), Sense::cdb_bit(2, 5));
    assert_eq!(data(&mut unit, &sense_6(0x00))[..4], [11, 0, 0x10, 8]);
    assert_sense(&run(&mut unit, &[0x1a, 0, 0x08, 1, 255, 0], &[]), Sense::cdb(3));
}

#[test]
fn the_write_cache_is_switched_and_flushed() {
    let mut unit = disk();
    let list = [&[0, 0, 0, 0][..], &caching(false)].concat();
    let cdb = [0x15, 0x10, 0, 0, list.len() as u8, 0];
    let Step::Control { actions, task } = step_of(&mut unit, US, &cdb, &list, 0) else { panic!() };
    assert!(matches!(&actions[..], [Action::Flush, Action::Save(_)]), "{actions:?}");
    assert_eq!(task.complete(Ok(())).residual, 0);
    assert!(!unit.write_cache());
    assert_eq!(data(&mut unit, &sense_6(0x08))[14], 0);
    assert_eq!(data(&mut unit, &sense_6(0x88))[14], 4, "the default is what it was");
    // Others hear of it; again it is no change.
    assert_good(&select(&mut unit, &caching(false)));
    let answer = run_of(&mut unit, THEM, &cdbs::TEST_UNIT_READY, &[]);
    assert_sense(&answer, Sense::unit_attention(0x2a, 1));
    assert_good(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]));
    assert_good(&run_of(&mut unit, THEM, &cdbs::TEST_UNIT_READY, &[]));
}

#[test]
fn a_cache_that_cannot_be_switched_is_not() {
    let fixed = Disk { write_cache: crate::WriteCache { enabled: true, switchable: false }, ..thin() };
    let mut unit = known(Unit::disk(identity(), fixed, medium(BLOCKS)).expect("a good disk"));
    assert_sense(&select(&mut unit, &caching(false)), Sense::list_bit(6, 2));
    assert_good(&select(&mut unit, &caching(true)));
    assert_eq!(data(&mut unit, &sense_6(0x48))[14], 0);
}

#[test]
fn the_control_page_is_obeyed() {
    let mut unit = disk();
    assert_good(&select(&mut unit, &control(true, true)));
    let answer = run(&mut unit, &cdbs::ten(0x2a, 0, 0, 1), &[0; 512]);
    assert_eq!(answer.sense, Some(Sense::SOFTWARE_WRITE_PROTECTED.encode(true)));
    assert_eq!(data(&mut unit, &sense_6(0x0a))[12..], control(true, true));
    assert_eq!(data(&mut unit, &sense_6(0x0a))[2], 0x90, "write protected");
    assert_good(&select(&mut unit, &control(false, false)));
    assert!(matches!(io(&mut unit, &cdbs::ten(0x2a, 0, 0, 1), &[0; 512]), Io::Write { .. }));
}

#[test]
fn wrong_parameters_are_pointed_at_and_change_nothing() {
    let mut wrong = control(true, false);
    wrong[3] = 0x11;
    let mut long = caching(false);
    long[1] = 19;
    let table: [(&[u8], Sense); 7] = [
        (&[&caching(false)[..], &wrong].concat(), Sense::list_bit(4 + 20 + 3, 0)),
        (&long, Sense::list(5)),
        (&caching(false)[..19], Sense::PARAMETER_LIST_LENGTH_ERROR),
        (&[0x08], Sense::PARAMETER_LIST_LENGTH_ERROR),
        (&[0x05, 2, 0, 0], Sense::list_bit(4, 5)),
        (&[0x48, 0, 0, 0], Sense::list_bit(4, 6)),
        (&[&caching(false)[..], &[0x3f, 0]].concat(), Sense::list_bit(24, 5)),
    ];
    for (pages, sense) in table {
        let mut unit = disk();
        assert_sense(&select(&mut unit, pages), sense);
        assert!(unit.write_cache());
    }
    let refused = |cdb: &[u8], list: &[u8], sense| assert_sense(&run(&mut disk(), cdb, list), sense);
    refused(&[0x15, 0x11, 0, 0, 4, 0], &[0; 4], Sense::cdb_bit(1, 0));
    refused(&[0x15, 0x00, 0, 0, 4, 0], &[0; 4], Sense::cdb_bit(1, 4));
    refused(&[0x15, 0x10, 0, 0, 3, 0], &[0; 4], Sense::PARAMETER_LIST_LENGTH_ERROR);
    assert_good(&run(&mut disk(), &[0x15, 0x10, 0, 0, 0, 0], &[]));
}

#[test]
fn block_descriptors_may_say_what_is_so() {
    let six = |descriptor: &[u8]| {
        let list = [&[0, 0, 0, descriptor.len() as u8], descriptor].concat();
        run(&mut disk(), &[0x15, 0x10, 0, 0, list.len() as u8, 0], &list)
    };
    for blocks in [[0, 0, 0x03, 0xe8], [0; 4], [255; 4]] {
        assert_good(&six(&[&blocks[..], &[0, 0, 2, 0]].concat()));
    }
    assert_sense(&six(&[0, 0, 0x03, 0xe7, 0, 0, 2, 0]), Sense::list(4));
    assert_sense(&six(&[0, 0, 0x03, 0xe8, 0, 0, 4, 0]), Sense::list(9));
    assert_sense(&six(&[0; 7]), Sense::list(3));
    let mut list = vec![0; 8 + 16];
    (list[4], list[7], list[8 + 14]) = (1, 16, 2);
    assert_good(&run(&mut disk(), &cdbs::ten(0x55, 0x10, 0, 24), &list));
    list[8 + 7] = 9;
    assert_sense(&run(&mut disk(), &cdbs::ten(0x55, 0x10, 0, 24), &list), Sense::list(8));
    assert_sense(&run(&mut disk(), &cdbs::ten(0x55, 0x10, 0, 20), &list), Sense::PARAMETER_LIST_LENGTH_ERROR);
}
