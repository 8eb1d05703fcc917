use proptest::prelude::*;

use super::*;
use crate::tests::{THEM, US, assert_good, assert_sense, cd, cdbs, disk};
use crate::{Answer, Status};

fn lun(number: u16) -> Lun {
    Lun::new(number).expect("it is small enough")
}

fn target() -> Target {
    let mut target = Target::new();
    target.add(lun(1), disk()).expect("it is free");
    target.add(lun(300), cd(Some(100))).expect("it is free");
    for number in [1, 300] {
        target
            .with(lun(number), |unit| while unit.nexus_mut(US).attentions.take().is_some() {})
            .expect("it is there");
        target
            .with(lun(number), |unit| while unit.nexus_mut(THEM).attentions.take().is_some() {})
            .expect("it is there");
    }
    target
}

fn run(target: &Target, lun: Lun, cdb: &[u8]) -> Answer {
    let request = Request { nexus: US, cdb, attribute: Attribute::Simple, data_out: 0, data_in: 4096 };
    match target.execute(lun, &request) {
        Step::Done(answer) => answer,
        Step::Io { task, .. } | Step::Control { task, .. } => task.complete(Ok(())),
        step => panic!("{step:?}"),
    }
}

const REPORT: [u8; 12] = [0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];

#[test]
fn luns_are_addressed_in_two_ways() {
    for (number, bytes) in [(0, [0, 0]), (255, [0, 255]), (256, [0x41, 0]), (0x3fff, [0x7f, 0xff])] {
        assert_eq!(lun(number).encode(), bytes);
        assert_eq!(Lun::decode(bytes), Some(lun(number)));
    }
    assert_eq!(Lun::decode([0x40, 7]), Some(lun(7)), "flat space, as virtio drivers have it");
    for bytes in [[0x01, 0], [0x80, 0], [0xc1, 0x01]] {
        assert_eq!(Lun::decode(bytes), None);
    }
    assert_eq!(Lun::new(0x4000), None);
}

#[test]
fn luns_are_reported_wherever_one_asks() {
    let target = target();
    let list = [0, 0, 0, 16, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x41, 0x2c, 0, 0, 0, 0, 0, 0];
    for number in [0, 1, 300, 77] {
        assert_eq!(run(&target, lun(number), &REPORT).data_in, list);
    }
    let mut short = REPORT;
    (short[8], short[9]) = (0, 9);
    assert_eq!(run(&target, Lun::ZERO, &short).data_in, list[..9]);
    let mut selected = REPORT;
    selected[2] = 1;
    assert_eq!(run(&target, Lun::ZERO, &selected).data_in, [0; 8]);
    selected[2] = 0x13;
    assert_sense(&run(&target, Lun::ZERO, &selected), Sense::cdb(2));
    assert_sense(&run(&target, Lun::ZERO, &REPORT[..11]), Sense::INVALID_FIELD_IN_CDB);
}

#[test]
fn a_lun_without_a_unit_says_so() {
    let target = target();
    assert_eq!(run(&target, Lun::ZERO, &cdbs::INQUIRY).data_in[0], 0x3f);
    assert_eq!(run(&target, lun(2), &cdbs::INQUIRY).data_in[0], 0x7f);
    assert_sense(&run(&target, lun(2), &[0x12, 1, 0, 0, 255, 0]), Sense::cdb(2));
    let sense = run(&target, lun(2), &cdbs::REQUEST_SENSE);
    assert_eq!(sense.status, Status::Good);
    assert_eq!(sense.data_in, Sense::LOGICAL_UNIT_NOT_SUPPORTED.encode(false).as_bytes());
    for cdb in [&cdbs::TEST_UNIT_READY[..], &cdbs::ten(0x28, 0, 0, 1), &[0xff; 16], &[]] {
        assert_sense(&run(&target, lun(2), cdb), Sense::LOGICAL_UNIT_NOT_SUPPORTED);
    }
    assert_good(&run(&target, lun(1), &cdbs::TEST_UNIT_READY));
    assert_good(&run(&target, lun(300), &cdbs::TEST_UNIT_READY));
}

#[test]
fn others_hear_of_units_that_come_and_go() {
    let mut target = target();
    target.add(lun(2), disk()).expect("it is free");
    assert!(target.add(lun(2), disk()).is_err());
    assert_sense(&run(&target, lun(1), &cdbs::TEST_UNIT_READY), Sense::unit_attention(0x3f, 0x0e));
    assert_good(&run(&target, lun(1), &cdbs::TEST_UNIT_READY));
    // Who asks for the list knows it then, everywhere.
    assert_good(&run(&target, Lun::ZERO, &REPORT));
    assert_good(&run(&target, lun(300), &cdbs::TEST_UNIT_READY));
    assert!(target.remove(lun(2)).is_some() && target.remove(lun(2)).is_none());
    assert_sense(&run(&target, lun(300), &cdbs::TEST_UNIT_READY), Sense::unit_attention(0x3f, 0x0e));
    assert_sense(&run(&target, lun(2), &cdbs::TEST_UNIT_READY), Sense::LOGICAL_UNIT_NOT_SUPPORTED);
}

#[test]
fn a_unit_may_go_while_its_command_gathers() {
    let mut target = target();
    let cdb = cdbs::ten(0x41, 0, 0, 1);
    let request = Request { nexus: US, cdb: &cdb, attribute: Attribute::Simple, data_out: 512, data_in: 0 };
    let Step::Gather { len: 512, command } = target.execute(lun(1), &request) else { panic!() };
    // With less than what was asked for it asks again.
    assert!(matches!(target.resume(lun(1), &command, &[0; 511]), Step::Gather { len: 512, .. }));
    target.remove(lun(1));
    let Step::Done(answer) = target.resume(lun(1), &command, &[0; 512]) else { panic!() };
    assert_sense(&answer, Sense::LOGICAL_UNIT_NOT_SUPPORTED);
}

#[test]
fn task_management_is_told_to_those_concerned() {
    let target = target();
    let gone = Err(NoSuchLun(lun(2)));
    assert_eq!(target.manage(US, lun(2), TaskManagement::AbortTaskSet, &[]), gone);
    assert_eq!(target.manage(THEM, lun(1), TaskManagement::AbortTask(5), &[THEM]), Ok(()));
    assert_good(&run(&target, lun(1), &cdbs::TEST_UNIT_READY));
    assert_eq!(target.manage(THEM, lun(1), TaskManagement::ClearTaskSet, &[THEM, US]), Ok(()));
    assert_sense(&run(&target, lun(1), &cdbs::TEST_UNIT_READY), Sense::unit_attention(0x2f, 0));
    assert_eq!(target.manage(THEM, lun(1), TaskManagement::LogicalUnitReset, &[]), Ok(()));
    assert_sense(&run(&target, lun(1), &cdbs::TEST_UNIT_READY), Sense::unit_attention(0x29, 3));
    assert_good(&run(&target, lun(300), &cdbs::TEST_UNIT_READY));
    assert_eq!(target.manage(US, lun(1), TaskManagement::NexusReset, &[]), Ok(()));
    for number in [1, 300] {
        assert_sense(&run(&target, lun(number), &cdbs::TEST_UNIT_READY), Sense::unit_attention(0x29, 7));
    }
}

proptest! {
    #[test]
    fn any_bytes_for_any_lun_are_answered(
        number in prop::sample::select(vec![0u16, 1, 2, 300]),
        opcode in prop::sample::select(vec![INQUIRY, REQUEST_SENSE, REPORT_LUNS, 0x00, 0x28, 0x43, 0xff]),
        rest in prop::collection::vec(any::<u8>(), 0..20),
        room in 0..100u64,
    ) {
        let cdb = [&[opcode][..], &rest].concat();
        let request = Request { nexus: US, cdb: &cdb, attribute: Attribute::Simple, data_out: 0, data_in: room };
        match target().execute(lun(number), &request) {
            Step::Done(answer) => {
                prop_assert_eq!(answer.sense.is_some(), answer.status == Status::CheckCondition);
                prop_assert!(answer.data_in.len() as u64 + answer.residual <= room);
            }
            Step::Io { task, .. } => prop_assert_eq!(task.complete(Ok(())).status, Status::Good),
            Step::Overrun { needed } => prop_assert!(needed > room),
            step => prop_assert!(false, "{step:?}"),
        }
    }
}
