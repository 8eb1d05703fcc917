//! What is kept outside comes back as it was, or not at all.

use super::*;
use crate::{Restart, State, StateError};

const REGISTER: [u8; 10] = [0x5f, 0x00, 0, 0, 0, 0, 0, 0, 24, 0];
const RESERVE: [u8; 10] = [0x5f, 0x01, 0x01, 0, 0, 0, 0, 0, 24, 0];

fn list(key: u64, service_key: u64, aptpl: bool) -> Vec<u8> {
    [&key.to_be_bytes()[..], &service_key.to_be_bytes(), &[0; 4], &[u8::from(aptpl), 0, 0, 0]].concat()
}

/// A disk that has been used, by an initiator that has reserved it.
fn used(aptpl: bool) -> Unit {
    let mut unit = disk();
    assert_good(&run(&mut unit, &REGISTER, &list(0, 7, aptpl)));
    assert_good(&run(&mut unit, &RESERVE, &list(7, 0, false)));
    unit.modes.write_cache = false;
    unit.modes.descriptor_sense = true;
    assert_good(&run(&mut unit, &cdbs::PREVENT, &[]));
    unit.resize(900).expect("it has a medium");
    unit
}

fn fresh() -> Unit {
    Unit::disk(identity(), thin(), medium(900)).expect("a good disk")
}

fn through_json(state: &State) -> State {
    serde_json::from_str(&serde_json::to_string(state).expect("it serializes")).expect("and back")
}

#[test]
fn a_successor_goes_on() {
    let before = used(false);
    let mut unit = fresh();
    unit.restore(through_json(&before.state()), Restart::Successor).expect("a good state");
    assert_eq!(unit.state(), before.state());
    assert!(!unit.write_cache() && unit.is_locked());
    // Nobody hears of a power on; what they had not heard yet they do.
    let answer = run(&mut unit, &cdbs::TEST_UNIT_READY, &[]);
    assert_eq!(answer.sense, Some(Sense::unit_attention(0x2a, 9).encode(true)));
    run_of(&mut unit, THEM, &cdbs::TEST_UNIT_READY, &[]);
    let answer = run_of(&mut unit, THEM, &cdbs::ten(0x2a, 0, 0, 1), &[0; 512]);
    assert_eq!(answer.status, Status::ReservationConflict);
}

#[test]
fn power_takes_all_but_what_was_to_survive() {
    for aptpl in [true, false] {
        let mut unit = fresh();
        unit.restore(used(aptpl).state(), Restart::PowerOn).expect("a good state");
        assert!(unit.write_cache() && !unit.is_locked());
        assert_sense(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]), Sense::unit_attention(0x29, 0));
        run_of(&mut unit, THEM, &cdbs::TEST_UNIT_READY, &[]);
        let answer = run_of(&mut unit, THEM, &cdbs::ten(0x2a, 0, 0, 0), &[]);
        assert_eq!(answer.status == Status::ReservationConflict, aptpl);
        // READ KEYS: the generation begins again.
        let keys = data(&mut unit, &[0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0]);
        assert_eq!((keys.len(), &keys[..4]), (if aptpl { 16 } else { 8 }, &[0; 4][..]));
    }
}

#[test]
fn a_tray_that_was_open_stays_so() {
    let mut before = cd(Some(5));
    before.eject(false).expect("it is not locked");
    let mut unit = Unit::cd(identity(), medium(5)).expect("a good drive");
    unit.restore(before.state(), Restart::Successor).expect("a good state");
    assert!(unit.is_tray_open() && !unit.has_medium());
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let good = serde_json::to_value(used(true).state()).expect("it serializes");
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut bad = good.clone();
        change(&mut bad);
        let state: State = serde_json::from_value(bad).expect("still a state");
        let mut unit = fresh();
        let before = unit.state();
        let error = unit.restore(state, Restart::Successor).expect_err("it cannot be");
        assert_eq!(unit.state(), before, "the unit is as before");
        error
    };
    assert_eq!(refused(&|bad| bad["version"] = 2.into()), StateError::Version(2));
    let reservations = |bad: &mut serde_json::Value, change: &dyn Fn(&mut serde_json::Value)| {
        change(&mut bad["reservations"]);
    };
    let zero = |one: &mut serde_json::Value| one["registrants"][0]["key"] = 0.into();
    assert_eq!(refused(&|bad| reservations(bad, &zero)), StateError::ZeroKey);
    let stray = |one: &mut serde_json::Value| one["held"]["holder"] = 99.into();
    assert_eq!(refused(&|bad| reservations(bad, &stray)), StateError::HolderNotRegistered);
    let twice = |one: &mut serde_json::Value| {
        let first = one["registrants"][0].clone();
        one["registrants"].as_array_mut().expect("a list").push(first);
    };
    assert_eq!(refused(&|bad| reservations(bad, &twice)), StateError::RegisteredTwice);
    let many = |one: &mut serde_json::Value| {
        let list = (1..=65).map(|n| serde_json::json!({"nexus": n, "key": 1})).collect();
        one["registrants"] = serde_json::Value::Array(list);
    };
    assert_eq!(refused(&|bad| reservations(bad, &many)), StateError::TooManyRegistrants(65));
    let nexus =
        |n| serde_json::json!({"nexus": n, "attentions": 65535, "prevents": true, "media_event": null});
    let crowd = |bad: &mut serde_json::Value| bad["nexuses"] = (0..257).map(nexus).collect::<Vec<_>>().into();
    assert_eq!(refused(&crowd), StateError::TooManyNexuses(257));
    let same = |bad: &mut serde_json::Value| bad["nexuses"] = vec![nexus(1), nexus(1)].into();
    assert_eq!(refused(&same), StateError::RegisteredTwice);
    let mut unknown = good.clone();
    unknown["reservations"]["held"]["kind"] = "read-shared".into();
    assert!(serde_json::from_value::<State>(unknown).is_err());
}

#[test]
fn descriptions_that_cannot_be_are_refused() {
    use crate::ConfigError;
    let refused = |disk: Disk, medium| Unit::disk(identity(), disk, medium).expect_err("it cannot be");
    assert_eq!(refused(Disk::new(520), medium(1)), ConfigError::BlockSize(520));
    assert_eq!(refused(Disk::new(512), None), ConfigError::NoMedium);
    assert_eq!(refused(Disk::new(512), medium(0)), ConfigError::Empty(512));
    assert_eq!(refused(Disk::new(512), medium(1 << 60)), ConfigError::TooLarge(1 << 60));
    let deep = Disk { physical_exponent: 16, ..Disk::new(512) };
    assert_eq!(refused(deep, medium(1)), ConfigError::PhysicalBlock(16));
    assert_eq!(disk().load(Medium { blocks: 1, read_only: false }), Err(ConfigError::Fixed));
    assert_eq!(cd(None).resize(5), Err(ConfigError::NoMedium));
    assert_eq!(disk().resize(0), Err(ConfigError::Empty(512)));
}
