//! What initiators are told of what has happened, and when.

use super::*;
use crate::Reset;

fn new_disk() -> Unit {
    Unit::disk(identity(), thin(), medium(BLOCKS)).expect("a good disk")
}

fn told(unit: &mut Unit, nexus: Nexus) -> Vec<(u8, u8)> {
    let mut told = Vec::new();
    loop {
        let answer = run_of(unit, nexus, &cdbs::TEST_UNIT_READY, &[]);
        let Some(sense) = answer.sense else { return told };
        let bytes = sense.as_bytes();
        assert_eq!(bytes[2], 6, "unit attention");
        told.push((bytes[12], bytes[13]));
    }
}

#[test]
fn each_nexus_hears_of_power_on_once() {
    let mut unit = new_disk();
    assert_eq!(told(&mut unit, US), [(0x29, 0)]);
    assert_eq!(told(&mut unit, US), []);
    assert_eq!(told(&mut unit, THEM), [(0x29, 0)]);
}

#[test]
fn an_attention_comes_before_everything_but_a_few_commands() {
    let mut unit = new_disk();
    assert_good(&run(&mut unit, &cdbs::INQUIRY, &[]));
    assert_good(&run(&mut unit, &cdbs::twelve(0xa0, 0, 0, 64), &[]));
    // Even before a command that does not exist, and a write is not executed.
    assert_sense(&run(&mut unit, &[0xff; 6], &[]), Sense::unit_attention(0x29, 0));
    let mut unit = new_disk();
    assert_sense(&run(&mut unit, &cdbs::ten(0x2a, 0, 0, 1), &[0; 512]), Sense::unit_attention(0x29, 0));
    assert!(matches!(io(&mut unit, &cdbs::ten(0x2a, 0, 0, 1), &[0; 512]), Io::Write { .. }));
}

#[test]
fn request_sense_takes_the_attention_as_data() {
    let mut unit = new_disk();
    let sense = data(&mut unit, &cdbs::REQUEST_SENSE);
    assert_eq!(sense, Sense::unit_attention(0x29, 0).encode(false).as_bytes());
    let mut descriptor = cdbs::REQUEST_SENSE;
    descriptor[1] = 1;
    assert_eq!(data(&mut unit, &descriptor), Sense::NONE.encode(true).as_bytes());
    descriptor[4] = 3;
    assert_eq!(data(&mut unit, &descriptor).len(), 3);
}

#[test]
fn what_happens_is_told_in_order() {
    let mut unit = disk();
    unit.resize(BLOCKS * 2).expect("it has a medium");
    unit.reset(Reset::LogicalUnit);
    unit.reset(Reset::NexusLoss(THEM));
    assert_eq!(told(&mut unit, US), [(0x29, 3), (0x2a, 9)]);
    assert_eq!(told(&mut unit, THEM), [(0x29, 3), (0x2a, 9)]);
    unit.reset(Reset::NexusLoss(THEM));
    assert_eq!((told(&mut unit, US), told(&mut unit, THEM)), (vec![], vec![(0x29, 7)]));
    unit.commands_cleared(THEM);
    unit.reset(Reset::Hard);
    assert_eq!(told(&mut unit, THEM), [(0x29, 0), (0x2f, 0)]);
    assert_eq!(told(&mut unit, US), [(0x29, 0)]);
    // The same size is no change.
    unit.resize(BLOCKS * 2).expect("it has a medium");
    assert_eq!((told(&mut unit, US), told(&mut unit, THEM)), (vec![], vec![]));
    assert!(matches!(io(&mut unit, &cdbs::ten(0x28, 0, 1999, 1), &[]), Io::Read { .. }));
}

#[test]
fn a_nexus_that_is_forgotten_comes_back_as_a_new_one() {
    let mut unit = removable_disk(medium(BLOCKS));
    assert_good(&run(&mut unit, &cdbs::PREVENT, &[]));
    unit.forget(US);
    assert!(!unit.is_locked());
    assert_eq!((told(&mut unit, US), told(&mut unit, THEM)), (vec![(0x29, 0)], vec![]));
}

#[test]
fn a_reset_takes_back_what_was_chosen() {
    let mut unit = removable_disk(medium(BLOCKS));
    assert_good(&run(&mut unit, &cdbs::PREVENT, &[]));
    assert_good(&run(&mut unit, &cdbs::STOP, &[]));
    unit.modes.write_cache = false;
    unit.modes.descriptor_sense = true;
    unit.reset(Reset::LogicalUnit);
    assert!(!unit.is_locked() && !unit.write_cache(), "it does not begin to cache under its user");
    assert_eq!(told(&mut unit, US), [(0x29, 3)]);
    unit.reset(Reset::Hard);
    assert!(unit.write_cache());
}
