//! The tables of SPC-4, 5.13, by commands.

use super::*;
use crate::tests::{BLOCKS, THEM, US, assert_good, assert_sense, cdbs, disk, medium, run_of, step_of};
use crate::{Action, Answer, Status, Step, Unit};

/// One who is never registered, unless a test does it.
const STRANGER: Nexus = Nexus(3);

/// One who only asks, and has been told everything.
const READER: Nexus = Nexus(4);

fn read(unit: &mut Unit, action: u8) -> Vec<u8> {
    unit.introduce(READER);
    while unit.nexus_mut(READER).attentions.take().is_some() {}
    run_of(unit, READER, &[0x5e, action, 0, 0, 0, 0, 0, 1, 0, 0], &[]).data_in
}

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;

fn cdb(action: u8, kind: u8, len: u8) -> [u8; 10] {
    [0x5f, action, kind, 0, 0, 0, 0, 0, len, 0]
}

fn list(key: u64, service_key: u64, flags: u8) -> Vec<u8> {
    [&key.to_be_bytes()[..], &service_key.to_be_bytes(), &[0; 4], &[flags, 0, 0, 0]].concat()
}

fn out(unit: &mut Unit, nexus: Nexus, action: u8, kind: u8, key: u64, service_key: u64) -> Answer {
    run_of(unit, nexus, &cdb(action, kind, 24), &list(key, service_key, 0))
}

/// Two who are registered with keys 1 and 2, and a stranger.
fn registered() -> Unit {
    let mut unit = disk();
    unit.introduce(STRANGER);
    assert_good(&out(&mut unit, US, REGISTER, 0, 0, 1));
    assert_good(&out(&mut unit, THEM, REGISTER, 0, 0, 2));
    unit
}

/// Reserved by us, with this type.
fn reserved(kind: u8) -> Unit {
    let mut unit = registered();
    assert_good(&out(&mut unit, US, RESERVE, kind, 1, 0));
    unit
}

/// Generation, keys.
fn keys(unit: &mut Unit) -> (u32, Vec<u64>) {
    let bytes = read(unit, 0);
    let keys = bytes[8..].chunks_exact(8).map(|key| crate::cdb::be64(key, 0)).collect();
    (crate::cdb::be32(&bytes, 0), keys)
}

/// Key and type of the reservation.
fn reservation(unit: &mut Unit) -> Option<(u64, u8)> {
    let bytes = read(unit, 1);
    assert_eq!(bytes.len() - 8, crate::cdb::be32(&bytes, 4) as usize);
    (bytes.len() == 24).then(|| (crate::cdb::be64(&bytes, 8), bytes[21]))
}

fn told(unit: &mut Unit, nexus: Nexus) -> Option<(u8, u8)> {
    let answer = run_of(unit, nexus, &cdbs::TEST_UNIT_READY, &[]);
    answer.sense.map(|sense| (sense.as_bytes()[12], sense.as_bytes()[13]))
}

fn is_conflict(answer: &Answer) -> bool {
    assert_eq!(answer.sense, None);
    answer.status == Status::ReservationConflict
}

const PREEMPTED: Option<(u8, u8)> = Some((0x2a, 0x05));
const RELEASED: Option<(u8, u8)> = Some((0x2a, 0x04));
const CLEARED: Option<(u8, u8)> = Some((0x2a, 0x03));

/// SPC-4, table 65, and SBC-4, table 13: what those may do who do not hold the reservation.
#[test]
fn commands_conflict_as_the_tables_say() {
    let zeroes = vec![0; 2 * 512];
    let inquiries: Vec<Vec<u8>> = vec![
        cdbs::INQUIRY.into(),
        cdbs::TEST_UNIT_READY.into(),
        cdbs::REQUEST_SENSE.into(),
        cdbs::twelve(0xa0, 0, 0, 64).into(),
        cdbs::ten(0x25, 0, 0, 0).into(),
        cdbs::sixteen(0x9e, 0x10, 0, 32).into(),
        cdbs::ten(0x5e, 0, 0, 64).into(),
        cdbs::START.into(),
        cdbs::ALLOW.into(),
    ];
    let reads: Vec<Vec<u8>> = vec![
        cdbs::six(0x08, 0, 1).into(),
        cdbs::ten(0x28, 0, 0, 1).into(),
        cdbs::twelve(0xa8, 0, 0, 1).into(),
        cdbs::sixteen(0x88, 0, 0, 1).into(),
        cdbs::ten(0x2f, 0, 0, 1).into(),
        vec![0x1a, 0, 0x3f, 0, 255, 0],
        cdbs::ten(0x5a, 0, 0x3f00_0000, 255).into(),
        cdbs::twelve(0xa3, 0x0c, 0, 255).into(),
        cdbs::twelve(0xa3, 0x0d, 0, 4).into(),
    ];
    let writes: Vec<Vec<u8>> = vec![
        cdbs::six(0x0a, 0, 1).into(),
        cdbs::ten(0x2a, 0, 0, 1).into(),
        cdbs::twelve(0xaa, 0, 0, 1).into(),
        cdbs::sixteen(0x8a, 0, 0, 1).into(),
        cdbs::ten(0x35, 0, 0, 0).into(),
        cdbs::sixteen(0x91, 0, 0, 0).into(),
        cdbs::ten(0x42, 0, 0, 8).into(),
        cdbs::ten(0x41, 0, 0, 1).into(),
        cdbs::sixteen(0x93, 0, 0, 1).into(),
        [&cdbs::sixteen(0x89, 0, 0, 0)[..13], &[1, 0, 0]].concat(),
        vec![0x15, 0x10, 0, 0, 0, 0],
        cdbs::ten(0x55, 0x10, 0, 0).into(),
        cdbs::STOP.into(),
        cdbs::PREVENT.into(),
    ];
    for kind in [1, 3, 5, 6, 7, 8] {
        let exclusive = matches!(kind, 3 | 6 | 8);
        let registrants = kind >= 5;
        let check = |cdb: &[u8], nexus: Nexus, conflicts: bool| {
            let answer = run_of(&mut reserved(kind), nexus, cdb, &zeroes);
            assert_eq!(is_conflict(&answer), conflicts, "type {kind}, {nexus:?}: {cdb:02x?}");
        };
        for cdb in inquiries.iter().chain(&reads).chain(&writes) {
            check(cdb, US, false);
        }
        for cdb in &inquiries {
            check(cdb, THEM, false);
            check(cdb, STRANGER, false);
        }
        for cdb in &reads {
            check(cdb, THEM, exclusive && !registrants);
            check(cdb, STRANGER, exclusive);
        }
        for cdb in &writes {
            check(cdb, THEM, !registrants);
            check(cdb, STRANGER, true);
        }
    }
}

/// SPC-4, tables 67 and 68.
#[test]
fn registering_needs_the_key_that_is_there() {
    let mut unit = registered();
    assert_eq!(keys(&mut unit), (2, vec![1, 2]));
    assert!(is_conflict(&out(&mut unit, STRANGER, REGISTER, 0, 9, 3)));
    assert!(is_conflict(&out(&mut unit, US, REGISTER, 0, 0, 5)));
    assert!(is_conflict(&out(&mut unit, US, REGISTER, 0, 2, 0)));
    assert_eq!(keys(&mut unit), (2, vec![1, 2]));
    assert_good(&out(&mut unit, US, REGISTER, 0, 1, 5));
    assert_good(&out(&mut unit, STRANGER, REGISTER, 0, 0, 0));
    assert_good(&out(&mut unit, STRANGER, REGISTER_AND_IGNORE, 0, 9, 0));
    assert_eq!(keys(&mut unit), (3, vec![5, 2]), "doing nothing is not counted");
    assert_good(&out(&mut unit, US, REGISTER_AND_IGNORE, 0, 77, 6));
    assert_good(&out(&mut unit, THEM, REGISTER, 0, 2, 0));
    assert_eq!(keys(&mut unit), (5, vec![6]));
    for nexus in 10..10 + MAX_REGISTRANTS as u64 - 1 {
        unit.introduce(Nexus(nexus));
        assert_good(&out(&mut unit, Nexus(nexus), REGISTER, 0, 0, 8));
    }
    let answer = out(&mut unit, THEM, REGISTER, 0, 0, 2);
    assert_sense(&answer, Sense::INSUFFICIENT_REGISTRATION_RESOURCES);
}

#[test]
fn reserving_is_for_the_registered_and_first() {
    for kind in [1, 3, 5, 6, 7, 8] {
        let mut unit = reserved(kind);
        let key = if kind >= 7 { 0 } else { 1 };
        assert_eq!(reservation(&mut unit), Some((key, kind)));
        assert!(is_conflict(&out(&mut unit, STRANGER, RESERVE, kind, 0, 0)));
        assert!(is_conflict(&out(&mut unit, US, RESERVE, kind, 2, 0)), "another's key");
        assert_good(&out(&mut unit, US, RESERVE, kind, 1, 0));
        assert!(is_conflict(&out(&mut unit, US, RESERVE, if kind == 1 { 3 } else { 1 }, 1, 0)));
        // Of an all registrants type they are a holder as well.
        assert_eq!(is_conflict(&out(&mut unit, THEM, RESERVE, kind, 2, 0)), kind < 7);
        assert_eq!(keys(&mut unit).0, 2, "reserving is not counted");
    }
}

#[test]
fn releasing_is_for_the_holder() {
    for kind in [1, 3, 5, 6, 7, 8] {
        let mut unit = reserved(kind);
        assert!(is_conflict(&out(&mut unit, STRANGER, RELEASE, kind, 0, 0)));
        assert_sense(
            &out(&mut unit, US, RELEASE, if kind == 1 { 3 } else { 1 }, 1, 0),
            Sense::INVALID_RELEASE,
        );
        if kind < 7 {
            assert_good(&out(&mut unit, THEM, RELEASE, kind, 2, 0));
            assert_eq!(reservation(&mut unit), Some((1, kind)), "not theirs");
        }
        assert_good(&out(&mut unit, US, RELEASE, kind, 1, 0));
        assert_eq!(reservation(&mut unit), None);
        assert_eq!(told(&mut unit, THEM), if kind >= 5 { RELEASED } else { None });
        assert_eq!((told(&mut unit, US), told(&mut unit, STRANGER)), (None, None));
        assert_good(&out(&mut unit, US, RELEASE, kind, 1, 0));
    }
}

#[test]
fn a_holder_that_unregisters_releases() {
    for kind in [1, 3, 5, 6, 7, 8] {
        let mut unit = reserved(kind);
        assert_good(&out(&mut unit, US, REGISTER, 0, 1, 0));
        let left = if kind >= 7 { Some((0, kind)) } else { None };
        assert_eq!(reservation(&mut unit), left);
        assert_eq!(told(&mut unit, THEM), if matches!(kind, 5 | 6) { RELEASED } else { None });
        if kind >= 7 {
            let answer = run_of(&mut unit, US, &cdbs::ten(0x2a, 0, 0, 0), &[]);
            assert!(is_conflict(&answer), "who made it is not a holder any more");
        }
        assert_good(&out(&mut unit, THEM, REGISTER, 0, 2, 0));
        assert_eq!(reservation(&mut unit), None);
    }
}

#[test]
fn clearing_takes_all() {
    let mut unit = reserved(1);
    assert!(is_conflict(&out(&mut unit, THEM, CLEAR, 0, 1, 0)));
    assert_good(&out(&mut unit, THEM, CLEAR, 0, 2, 0));
    assert_eq!((keys(&mut unit), reservation(&mut unit)), ((3, vec![]), None));
    assert_eq!((told(&mut unit, US), told(&mut unit, THEM)), (CLEARED, None));
}

/// SPC-4, table 72.
#[test]
fn preempting_the_holder_takes_over() {
    for kind in [1, 3, 5, 6] {
        let mut unit = reserved(kind);
        unit.introduce(STRANGER);
        assert_good(&out(&mut unit, STRANGER, REGISTER, 0, 0, 3));
        assert!(is_conflict(&out(&mut unit, THEM, PREEMPT, 3, 1, 1)), "not their key");
        assert_good(&out(&mut unit, THEM, PREEMPT, 3, 2, 1));
        assert_eq!((keys(&mut unit), reservation(&mut unit)), ((4, vec![2, 3]), Some((2, 3))));
        assert_eq!((told(&mut unit, US), told(&mut unit, THEM)), (PREEMPTED, None));
        assert_eq!(
            told(&mut unit, STRANGER),
            if kind != 3 { RELEASED } else { None },
            "the type has changed"
        );
    }
    // Oneself: the type changes, the registration stays.
    let mut unit = reserved(1);
    assert_good(&out(&mut unit, US, PREEMPT, 6, 1, 1));
    assert_eq!((keys(&mut unit), reservation(&mut unit)), ((3, vec![1, 2]), Some((1, 6))));
}

#[test]
fn preempting_others_takes_their_registration() {
    let mut unit = reserved(1);
    assert_good(&out(&mut unit, US, PREEMPT, 1, 1, 2));
    assert_eq!((keys(&mut unit), reservation(&mut unit)), ((3, vec![1]), Some((1, 1))));
    assert_eq!(told(&mut unit, THEM), PREEMPTED);
    assert!(is_conflict(&out(&mut unit, US, PREEMPT, 1, 1, 2)), "nobody has that key");
    assert_sense(&out(&mut unit, US, PREEMPT, 1, 1, 0), Sense::list(8));
    // Scope and type do not matter, but where the reservation changes hands.
    let mut unit = registered();
    assert_good(&out(&mut unit, US, PREEMPT, 0xff, 1, 2));
    assert_eq!((keys(&mut unit), reservation(&mut unit)), ((3, vec![1]), None));
    assert_sense(&out(&mut reserved(1), THEM, PREEMPT, 2, 2, 1), Sense::cdb_bit(2, 3));
    // Oneself, who holds nothing: it goes.
    assert_good(&out(&mut unit, US, PREEMPT, 1, 1, 1));
    assert_eq!((keys(&mut unit), told(&mut unit, US)), ((4, vec![]), None));
}

#[test]
fn preempting_all_registrants_goes_by_key_or_takes_all() {
    for kind in [7, 8] {
        let mut unit = reserved(kind);
        assert_good(&out(&mut unit, THEM, PREEMPT, 1, 2, 1));
        assert_eq!((keys(&mut unit).1, reservation(&mut unit)), (vec![2], Some((0, kind))));
        assert_eq!(told(&mut unit, US), PREEMPTED);
        let mut unit = reserved(kind);
        assert_good(&out(&mut unit, THEM, PREEMPT, 1, 2, 0));
        assert_eq!((keys(&mut unit).1, reservation(&mut unit)), (vec![2], Some((2, 1))));
        assert_eq!(told(&mut unit, US), PREEMPTED);
    }
}

#[test]
fn preempt_and_abort_names_whose_tasks_end() {
    let mut unit = reserved(3);
    assert_good(&run_of(&mut unit, US, &cdbs::PREVENT, &[]));
    let step = step_of(&mut unit, THEM, &cdb(PREEMPT_AND_ABORT, 3, 24), &list(2, 1, 0), 0);
    let Step::Control { actions, task } = step else { panic!("{step:?}") };
    let [Action::Abort(nexuses), Action::Save(state)] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(nexuses, &[US]);
    assert_eq!(**state, unit.state());
    assert!(!unit.is_locked());
    assert_good(&task.complete(Ok(())));
    // Of an all registrants type all are holders.
    let mut unit = reserved(7);
    let step = step_of(&mut unit, THEM, &cdb(PREEMPT_AND_ABORT, 3, 24), &list(2, 0, 0), 0);
    let Step::Control { actions, .. } = step else { panic!("{step:?}") };
    assert!(matches!(&actions[0], Action::Abort(nexuses) if nexuses[..] == [US, THEM]), "{actions:?}");
    // What could not be kept is not good.
    let step = step_of(&mut unit, THEM, &cdb(REGISTER, 0, 24), &list(2, 4, 1), 0);
    let Step::Control { task, .. } = step else { panic!("{step:?}") };
    assert_sense(&task.complete(Err(crate::Failure::Internal)), Sense::INTERNAL_TARGET_FAILURE);
}

/// SPC-4, table 70.
#[test]
fn a_reservation_moves_to_whom_it_is_given() {
    let give = |unit: &mut Unit, from: Nexus, key: u64, new: u64, to: Nexus, unregister: bool| {
        let mut list = [&key.to_be_bytes()[..], &new.to_be_bytes(), &[0; 8]].concat();
        list[17] = u8::from(unregister) << 1;
        list[19] = 1;
        list[23] = 24;
        list.extend(input::transport_id(to));
        run_of(unit, from, &cdb(7, 0, 48), &list)
    };
    let mut unit = reserved(3);
    assert!(is_conflict(&give(&mut unit, THEM, 2, 4, STRANGER, false)), "not theirs to give");
    assert_sense(&give(&mut unit, US, 1, 0, STRANGER, false), Sense::list(8));
    assert_sense(&give(&mut unit, US, 1, 4, US, false), Sense::list(24));
    assert_good(&give(&mut unit, US, 1, 4, STRANGER, false));
    assert_eq!((keys(&mut unit), reservation(&mut unit)), ((3, vec![1, 2, 4]), Some((4, 3))));
    assert_good(&give(&mut unit, STRANGER, 4, 9, THEM, true));
    assert_eq!((keys(&mut unit), reservation(&mut unit)), ((4, vec![1, 9]), Some((9, 3))));
    assert!(is_conflict(&give(&mut reserved(7), US, 1, 4, THEM, false)), "it is everybody's");
    assert_sense(&give(&mut registered(), US, 1, 4, THEM, false), Sense::cdb_bit(1, 4));
    assert!(is_conflict(&give(&mut registered(), STRANGER, 0, 4, THEM, false)));
    let short = run_of(&mut reserved(1), US, &cdb(7, 0, 24), &list(1, 2, 0));
    assert_sense(&short, Sense::PARAMETER_LIST_LENGTH_ERROR);
}

#[test]
fn what_is_wrong_is_pointed_at() {
    let mut unit = registered();
    let mut refused = |cdb: &[u8], flags: u8, sense| {
        assert_sense(&run_of(&mut unit, US, cdb, &list(1, 5, flags)), sense);
    };
    refused(&cdb(RESERVE, 0x11, 24), 0, Sense::cdb_bit(2, 7));
    for kind in [0, 2, 4, 9, 15] {
        refused(&cdb(RESERVE, kind, 24), 0, Sense::cdb_bit(2, 3));
    }
    refused(&cdb(REGISTER, 0, 23), 0, Sense::PARAMETER_LIST_LENGTH_ERROR);
    refused(&cdb(REGISTER, 0, 25), 0, Sense::PARAMETER_LIST_LENGTH_ERROR);
    refused(&cdb(REGISTER, 0, 24), 0x08, Sense::list_bit(20, 3));
    assert_eq!(keys(&mut unit), (2, vec![1, 2]));
}

#[test]
fn capabilities_and_full_status_are_told() {
    let mut unit = disk();
    let capabilities = [0x5e, 2, 0, 0, 0, 0, 0, 0, 8, 0];
    assert_eq!(run_of(&mut unit, US, &capabilities, &[]).data_in, [0, 8, 0x05, 0xb0, 0xea, 0x01, 0, 0]);
    assert_good(&run_of(&mut unit, US, &cdb(REGISTER, 0, 24), &list(0, 1, 1)));
    assert_eq!(run_of(&mut unit, US, &capabilities, &[]).data_in[3], 0xb1, "PTPL_A");
    assert_good(&out(&mut unit, THEM, REGISTER, 0, 0, 2));
    assert_good(&out(&mut unit, THEM, RESERVE, 5, 2, 0));
    let status = read(&mut unit, 3);
    assert_eq!((status.len(), &status[..8]), (8 + 2 * 48, &[0, 0, 0, 2, 0, 0, 0, 96][..]));
    let (ours, theirs) = status[8..].split_at(48);
    assert_eq!((ours[7], &ours[12..14], &ours[18..24]), (1, &[0, 0][..], &[0, 1, 0, 0, 0, 24][..]));
    assert_eq!((theirs[7], &theirs[12..14]), (2, &[1, 5][..]));
    assert_eq!(ours[24..], input::transport_id(US));
}

#[test]
fn a_reset_leaves_reservations_alone() {
    let mut unit = reserved(1);
    unit.reset(crate::Reset::Hard);
    for nexus in [US, THEM, STRANGER] {
        assert_eq!(told(&mut unit, nexus), Some((0x29, 0)));
    }
    assert_eq!(reservation(&mut unit), Some((1, 1)));
    // Nor does another size.
    unit.resize(BLOCKS + 1).expect("it has a medium");
    assert_eq!(reservation(&mut unit), Some((1, 1)));
    assert_eq!(unit.medium, medium(BLOCKS + 1));
}
