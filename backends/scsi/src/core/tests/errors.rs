//! What is wrong with a command is told by its sense, and where by the field pointer.

use super::*;

const DATA: [u8; 4096] = [1; 4096];

#[test]
fn wrong_fields_are_pointed_at() {
    let unmap_anchor = cdbs::ten(0x42, 1, 0, 24);
    let table: [(&[u8], Sense); 26] = [
        (&[0xff, 0, 0, 0, 0, 0], Sense::INVALID_OPERATION_CODE),
        (&[0x7f, 0, 0, 0, 0, 0], Sense::INVALID_OPERATION_CODE),
        // Those of CD-ROM drives.
        (&[0x43, 0, 0, 0, 0, 0, 0, 0, 12, 0], Sense::INVALID_OPERATION_CODE),
        // A TEST UNIT READY that is cut off, and a READ (10).
        (&[], Sense::INVALID_FIELD_IN_CDB),
        (&[0x28, 0, 0, 0, 0, 0, 0, 0, 1], Sense::INVALID_FIELD_IN_CDB),
        // Service actions.
        (&cdbs::sixteen(0x9e, 0x12, 0, 0), Sense::cdb_bit(1, 4)),
        (&cdbs::twelve(0xa3, 0x05, 0, 0), Sense::cdb_bit(1, 4)),
        (&cdbs::ten(0x5e, 0x04, 0, 8), Sense::cdb_bit(1, 4)),
        (&cdbs::ten(0x5f, 0x08, 0, 0), Sense::cdb_bit(1, 4)),
        // NACA.
        (&[0x00, 0, 0, 0, 0, 0x04], Sense::cdb_bit(5, 2)),
        // Protection information.
        (&cdbs::ten(0x28, 0x20, 0, 1), Sense::cdb_bit(1, 7)),
        (&cdbs::sixteen(0x8a, 0x80, 0, 1), Sense::cdb_bit(1, 7)),
        (&cdbs::twelve(0xaf, 0x40, 0, 1), Sense::cdb_bit(1, 7)),
        (&cdbs::ten(0x41, 0x20, 0, 1), Sense::cdb_bit(1, 7)),
        (&cdbs::sixteen(0x89, 0x20, 0, 1), Sense::cdb_bit(1, 7)),
        // More than BLOCK LIMITS allows.
        (&cdbs::ten(0x28, 0, 0, 257), Sense::cdb(7)),
        (&cdbs::twelve(0xaa, 0, 0, 257), Sense::cdb(6)),
        (&cdbs::sixteen(0x88, 0, 0, 257), Sense::cdb(10)),
        (&cdbs::ten(0x28, 0, 1000, 1), out_of_range(1000)),
        (&cdbs::ten(0x2a, 0, 998, 3), out_of_range(1000)),
        (&cdbs::six(0x08, 0x1f_ffff, 1), out_of_range(0x1f_ffff)),
        (&cdbs::ten(0x25, 0, 1, 0), Sense::cdb(2)),
        (&cdbs::sixteen(0x9e, 0x10, 1, 32), Sense::cdb(2)),
        (&unmap_anchor, Sense::cdb_bit(1, 0)),
        (&cdbs::sixteen(0x93, 0x10, 0, 1), Sense::cdb_bit(1, 4)),
        (&[0x1e, 0, 0, 0, 2, 0], Sense::cdb_bit(4, 1)),
    ];
    for (cdb, sense) in table {
        println!("{cdb:02x?}");
        assert_sense(&run(&mut disk(), cdb, &DATA), sense);
    }
}

#[test]
fn write_protection_is_told() {
    let writes: [&[u8]; 7] = [
        &cdbs::six(0x0a, 0, 1),
        &cdbs::ten(0x2a, 0, 0, 1),
        &cdbs::twelve(0xaa, 0, 0, 1),
        &cdbs::sixteen(0x8a, 0, 0, 1),
        &cdbs::ten(0x41, 0, 0, 1),
        &cdbs::sixteen(0x93, 0, 0, 1),
        &cdbs::ten(0x42, 0, 0, 24),
    ];
    for cdb in writes {
        assert_sense(&run(&mut read_only_disk(), cdb, &DATA), Sense::WRITE_PROTECTED);
        let mut unit = disk();
        unit.modes.software_write_protect = true;
        assert_sense(&run(&mut unit, cdb, &DATA), Sense::SOFTWARE_WRITE_PROTECTED);
    }
}

#[test]
fn sense_has_the_format_that_the_initiator_chose() {
    let mut unit = disk();
    unit.modes.descriptor_sense = true;
    let answer = run(&mut unit, &[0xff, 0, 0, 0, 0, 0], &[]);
    assert_eq!(answer.sense, Some(Sense::INVALID_OPERATION_CODE.encode(true)));
    let answer =
        task(&mut unit, &cdbs::ten(0x28, 0, 0, 1), &[]).complete(Err(Failure::Medium { at: Some(0) }));
    assert_eq!(answer.sense, Some(Sense::UNRECOVERED_READ_ERROR.with_information(Some(0)).encode(true)));
}

#[test]
fn without_aca_there_is_no_task_with_its_attribute() {
    let cdb = &cdbs::TEST_UNIT_READY;
    let request = Request { nexus: US, cdb, attribute: Attribute::Aca, data_out: 0, data_in: 0 };
    let Step::Done(answer) = disk().execute(&request) else { panic!() };
    assert_sense(&answer, Sense::INVALID_MESSAGE);
}

#[test]
fn parameters_that_did_not_come_are_an_overrun() {
    let cdb = cdbs::ten(0x5f, 0x00, 0, 24);
    let Step::Overrun { needed } = step_of(&mut disk(), US, &cdb, &[0; 23], 0) else { panic!() };
    assert_eq!(needed, 24);
}
