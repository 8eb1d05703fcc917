//! Any bytes may come as a command, of any length, with any buffers and any parameters.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::commands::commands;
use crate::{Action, Range, Restart};

fn units() -> impl Strategy<Value = u8> {
    0..6u8
}

fn unit(which: u8) -> Unit {
    match which {
        0 => disk(),
        1 => read_only_disk(),
        2 => removable_disk(None),
        3 => cd(Some(500)),
        4 => cd(None),
        _ => {
            let disk = Disk { max_transfer: 0, ..Disk::new(4096) };
            known(Unit::disk(identity(), disk, medium(1 << 51)).expect("a good disk"))
        }
    }
}

/// Mostly commands, with fields near their limits and a few that are cut off.
fn cdb() -> impl Strategy<Value = Vec<u8>> {
    let opcodes: Vec<(u8, u8)> = [disk(), cd(None)]
        .iter()
        .flat_map(|unit| commands(unit).map(|one| (one.opcode, one.service_action.unwrap_or(0))))
        .collect();
    let byte = prop_oneof![12 => Just(0u8), 1 => Just(0xff), 2 => 0..16u8, 1 => any::<u8>()];
    let command = (prop::sample::select(opcodes), vec(byte, 30), any::<u8>(), 0..=100usize, 0..4u8);
    let command = command.prop_map(|((opcode, action), rest, flags, cut, plain)| {
        let flags = if plain != 0 { action } else { action | flags };
        let mut bytes = [&[opcode, flags][..], &rest].concat();
        if cut < 20 {
            bytes.truncate(cut);
        }
        bytes
    });
    prop_oneof![4 => command, 1 => vec(any::<u8>(), 0..300)]
}

fn assert_inside(range: Range, end: u64, block: u64) {
    assert!(range.len != 0 && range.offset.checked_add(range.len).is_some_and(|to| to <= end), "{range:?}");
    assert!(range.offset.is_multiple_of(block) && range.len.is_multiple_of(block), "{range:?}");
}

fn check_io(io: &Io, unit: &Unit, data_out: u64, data_in: u64) {
    let block = u64::from(unit.block_size());
    let end = unit.medium.expect("I/O needs a medium").blocks * block;
    let mut writes = true;
    match io {
        Io::Read { range, .. } => {
            assert_inside(*range, end, block);
            assert!(range.len <= data_in);
            writes = false;
        }
        Io::Verify { range } => {
            assert_inside(*range, end, block);
            writes = false;
        }
        Io::Compare { range } => {
            assert_inside(*range, end, block);
            assert!(range.len <= data_out);
            writes = false;
        }
        Io::CompareSame { range, pattern } => {
            assert_inside(*range, end, block);
            assert_eq!(pattern.len() as u64, block);
            writes = false;
        }
        Io::Write { range, .. } => {
            assert_inside(*range, end, block);
            assert!(range.len <= data_out);
        }
        Io::CompareAndWrite { range, .. } => {
            assert_inside(*range, end, block);
            assert!(2 * range.len <= data_out);
        }
        Io::WriteSame { range, pattern, .. } => {
            assert_inside(*range, end, block);
            assert_eq!(pattern.len() as u64, block);
        }
        Io::WriteZeroes { range, .. } => assert_inside(*range, end, block),
        Io::Unmap { ranges, .. } => {
            assert!(!ranges.is_empty() && unit.can_unmap());
            ranges.iter().for_each(|range| assert_inside(*range, end, block));
        }
        Io::Flush => writes = false,
    }
    assert!(!writes || !unit.is_write_protected(), "{io:?}");
}

fn check_answer(answer: &Answer, buffers: u64, data_in: u64) {
    assert_eq!(answer.sense.is_some(), answer.status == Status::CheckCondition);
    if let Some(sense) = answer.sense {
        let bytes = sense.as_bytes();
        assert!(matches!((bytes[0] & 0x7f, bytes.len()), (0x70, 18) | (0x72, 8..)));
        let key = if bytes[0] & 0x7f == 0x70 { bytes[2] } else { bytes[1] };
        assert!(key != 0, "an error has a sense key");
    }
    assert!(answer.data_in.len() as u64 <= data_in);
    assert!(answer.residual <= buffers);
    if answer.status != Status::Good {
        assert!(answer.data_in.is_empty() && answer.residual == buffers);
    }
}

/// Executes it to its end. `true`: it was good.
fn check(unit: &mut Unit, nexus: Nexus, cdb: &[u8], list: &[u8], data_out: u64, data_in: u64) -> bool {
    let request = Request { nexus, cdb, attribute: Attribute::Simple, data_out, data_in };
    let mut step = unit.execute(&request);
    if let Step::Gather { len, command } = &step {
        assert!(*len as u64 <= data_out && *len <= 1 << 16);
        let mut bytes = list.to_vec();
        bytes.resize(*len, 0);
        step = unit.resume(command, &bytes);
    }
    let buffers = data_out + data_in;
    match step {
        Step::Done(answer) => {
            check_answer(&answer, buffers, data_in);
            answer.status == Status::Good
        }
        Step::Io { io, task } => {
            check_io(&io, unit, data_out, data_in);
            check_answer(&task.complete(Ok(())), buffers, data_in);
            true
        }
        Step::Control { actions, task } => {
            for action in &actions {
                if let Action::Save(state) = action {
                    assert_eq!(**state, unit.state());
                }
            }
            check_answer(&task.complete(Ok(())), buffers, data_in);
            true
        }
        Step::Overrun { needed } => {
            assert!(needed > data_out || needed > data_in);
            false
        }
        Step::Gather { .. } => panic!("it has got what it asked for"),
    }
}

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![2 => Just(0), 3 => 0..600u64, 3 => Just(1u64 << 20), 1 => 0..1u64 << 32]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn any_command_ends_well(
        which in units(), cdb in cdb(), list in vec(any::<u8>(), 0..100), out in sizes(), room in sizes(),
    ) {
        check(&mut unit(which), US, &cdb, &list, out, room);
    }

    /// Whatever came before, too; and the state that is kept can always be taken back.
    #[test]
    fn any_commands_end_well(
        which in units(),
        commands in vec((cdb(), any::<bool>(), vec(prop_oneof![Just(0u8), any::<u8>()], 24..49)), 1..30),
    ) {
        let mut used = unit(which);
        for (cdb, ours, list) in &commands {
            check(&mut used, if *ours { US } else { THEM }, cdb, list, 1 << 20, 1 << 20);
            let mut successor = unit(which);
            successor.restore(used.state(), Restart::Successor).expect("what is kept can be taken back");
            prop_assert_eq!(successor.state(), used.state());
        }
    }

    /// Registering, reserving and preempting in any order.
    #[test]
    fn reservations_stay_whole(
        commands in vec((0..8u8, 0..9u8, 0..4u64, 0..4u64, 0..4u64, any::<bool>()), 1..60),
    ) {
        let mut unit = disk();
        for (action, kind, nexus, key, service_key, aptpl) in commands {
            let nexus = Nexus(nexus);
            unit.introduce(nexus);
            let mut list = [&key.to_be_bytes()[..], &service_key.to_be_bytes(), &[0; 8]].concat();
            let mut len = 24;
            if action == 7 {
                len = 48;
                (list[17], list[19], list[23]) = (u8::from(aptpl) << 1, 1, 24);
                list.extend([6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, key as u8]);
                list.extend([0; 12]);
            } else {
                list[20] = u8::from(aptpl);
            }
            check(&mut unit, nexus, &[0x5f, action, kind, 0, 0, 0, 0, 0, len, 0], &list, 64, 0);
            let mut successor = disk();
            successor.restore(unit.state(), Restart::Successor).expect("what is kept can be taken back");
            prop_assert_eq!(&successor.reservations, &unit.reservations);
        }
    }

    #[test]
    fn allocation_lengths_are_honoured(which in units(), room in 0..300u64, length in 0..300u16) {
        let [high, low] = length.to_be_bytes();
        let six = |opcode: u8, page: u8| vec![opcode, 0, page, 0, length.min(255) as u8, 0];
        let ten = |opcode: u8, action: u8, page: u8| vec![opcode, action, page, 0, 0, 0, 0, high, low, 0];
        let cdbs = [
            (vec![0x12, 0, 0, high, low, 0], length),
            (vec![0x12, 1, 0x83, high, low, 0], length),
            (six(0x03, 0), length.min(255)),
            (six(0x1a, 0x3f), length.min(255)),
            (ten(0x5a, 0, 0x3f), length),
            (ten(0x5e, 0, 0), length),
            (ten(0x43, 0, 0), length),
            (ten(0x46, 0, 0), length),
            (vec![0x4a, 1, 0, 0, 0x10, 0, 0, high, low, 0], length),
            (vec![0xa3, 0x0c, 0, 0, 0, 0, 0, 0, high, low, 0, 0], length),
        ];
        for (cdb, allocation) in cdbs {
            let mut unit = unit(which);
            let Step::Done(full) = step_of(&mut unit, US, &cdb_with_much_room(&cdb), &[], 1 << 20) else {
                panic!("{cdb:02x?}")
            };
            let Step::Done(answer) = step_of(&mut unit, US, &cdb, &[], room) else { panic!("{cdb:02x?}") };
            let expected = full.data_in.len().min(allocation.into()).min(room as usize);
            prop_assert_eq!(&answer.data_in, &full.data_in[..expected]);
            if answer.status == Status::Good {
                prop_assert_eq!(answer.residual, room - expected as u64);
            }
        }
    }
}

/// The same command with all the allocation length there can be.
fn cdb_with_much_room(cdb: &[u8]) -> Vec<u8> {
    let mut cdb = cdb.to_vec();
    match cdb[0] {
        0x12 => cdb[3..5].fill(0xff),
        0x03 | 0x1a => cdb[4] = 0xff,
        0xa3 => cdb[6..10].fill(0xff),
        _ => cdb[7..9].fill(0xff),
    }
    cdb
}

#[test]
fn random_commands_do_get_somewhere() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut good = 0;
    for _ in 0..2000 {
        let cdb = cdb().new_tree(&mut runner).expect("a command").current();
        good += usize::from(check(&mut disk(), US, &cdb, &[], 1 << 20, 1 << 20));
    }
    assert!(good > 200, "only {good} of 2000 were good: do the properties still test anything?");
}
