//! Commands as an initiator sends them, and what it gets.

mod attentions;
mod cd;
mod disk;
mod errors;
mod hostile;
mod mode;
mod provision;
mod report;
mod state;

use crate::{
    Answer, Attribute, Disk, Failure, Identity, Io, Medium, Nexus, Request, Sense, Status, Step, Task, Unit,
    Unmap,
};

pub(crate) const US: Nexus = Nexus(0x5000_0000_0000_0001);
pub(crate) const THEM: Nexus = Nexus(0x5000_0000_0000_0002);

/// Of the disk below.
pub(crate) const BLOCKS: u64 = 1000;
pub(crate) const BLOCK: u64 = 512;

pub(crate) fn identity() -> Identity {
    Identity::new("disk", "S3R1AL", Some(0x5123_4567_89ab_cdef)).expect("good names")
}

pub(crate) fn thin() -> Disk {
    Disk {
        physical_exponent: 3,
        unmap: Some(Unmap { granularity: 8, reads_zeroes: true }),
        max_transfer: 256,
        ..Disk::new(BLOCK as u32)
    }
}

pub(crate) fn medium(blocks: u64) -> Option<Medium> {
    Some(Medium { blocks, read_only: false })
}

pub(crate) fn disk() -> Unit {
    known(Unit::disk(identity(), thin(), medium(BLOCKS)).expect("a good disk"))
}

pub(crate) fn read_only_disk() -> Unit {
    let medium = Some(Medium { blocks: BLOCKS, read_only: true });
    known(Unit::disk(identity(), thin(), medium).expect("a good disk"))
}

pub(crate) fn removable_disk(medium: Option<Medium>) -> Unit {
    let disk = Disk { removable: true, ..thin() };
    known(Unit::disk(identity(), disk, medium).expect("a good disk"))
}

pub(crate) fn cd(blocks: Option<u64>) -> Unit {
    known(Unit::cd(identity(), blocks.and_then(medium)).expect("a good drive"))
}

/// A unit that both initiators know already.
fn known(mut unit: Unit) -> Unit {
    [US, THEM].into_iter().for_each(|nexus| unit.introduce(nexus));
    unit
}

/// A command of `nexus` with all of its data, as far as it goes without I/O.
pub(crate) fn step_of(unit: &mut Unit, nexus: Nexus, cdb: &[u8], out: &[u8], room: u64) -> Step {
    let request =
        Request { nexus, cdb, attribute: Attribute::Simple, data_out: out.len() as u64, data_in: room };
    match unit.execute(&request) {
        Step::Gather { len, command } => unit.resume(&command, &out[..len]),
        step => step,
    }
}

/// As [`step_of`], with much room, and all that is to be done done well.
pub(crate) fn run_of(unit: &mut Unit, nexus: Nexus, cdb: &[u8], out: &[u8]) -> Answer {
    match step_of(unit, nexus, cdb, out, 1 << 20) {
        Step::Done(answer) => answer,
        Step::Io { task, .. } | Step::Control { task, .. } => task.complete(Ok(())),
        step => panic!("{cdb:02x?}: {step:?}"),
    }
}

pub(crate) fn run(unit: &mut Unit, cdb: &[u8], out: &[u8]) -> Answer {
    run_of(unit, US, cdb, out)
}

pub(crate) fn data(unit: &mut Unit, cdb: &[u8]) -> Vec<u8> {
    let answer = run(unit, cdb, &[]);
    assert_eq!(answer.status, Status::Good, "{cdb:02x?}: {:02x?}", answer.sense);
    answer.data_in
}

pub(crate) fn io(unit: &mut Unit, cdb: &[u8], out: &[u8]) -> Io {
    match step_of(unit, US, cdb, out, 1 << 20) {
        Step::Io { io, .. } => io,
        step => panic!("{cdb:02x?}: {step:?}"),
    }
}

pub(crate) fn task(unit: &mut Unit, cdb: &[u8], out: &[u8]) -> Task {
    match step_of(unit, US, cdb, out, 1 << 20) {
        Step::Io { task, .. } | Step::Control { task, .. } => task,
        step => panic!("{cdb:02x?}: {step:?}"),
    }
}

/// This is the first block that is not there.
pub(crate) fn out_of_range(first: u64) -> Sense {
    Sense::LBA_OUT_OF_RANGE.with_information(Some(first))
}

#[track_caller]
pub(crate) fn assert_good(answer: &Answer) {
    assert_eq!((answer.status, answer.sense), (Status::Good, None));
}

/// The answer is a CHECK CONDITION with this sense, in fixed format.
#[track_caller]
pub(crate) fn assert_sense(answer: &Answer, sense: Sense) {
    assert_eq!(answer.status, Status::CheckCondition, "expected {sense:?}");
    let (got, wanted) = (answer.sense.expect("sense"), sense.encode(false));
    assert_eq!(got, wanted, "expected {sense:?}, got {:02x?}", got.as_bytes());
}

/// Commands as bytes.
pub(crate) mod cdbs {
    pub(crate) const TEST_UNIT_READY: [u8; 6] = [0; 6];
    pub(crate) const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 96, 0];
    pub(crate) const REQUEST_SENSE: [u8; 6] = [0x03, 0, 0, 0, 252, 0];
    pub(crate) const EJECT: [u8; 6] = [0x1b, 0, 0, 0, 0x02, 0];
    pub(crate) const CLOSE: [u8; 6] = [0x1b, 0, 0, 0, 0x03, 0];
    pub(crate) const STOP: [u8; 6] = [0x1b, 0, 0, 0, 0x00, 0];
    pub(crate) const START: [u8; 6] = [0x1b, 0, 0, 0, 0x01, 0];
    pub(crate) const PREVENT: [u8; 6] = [0x1e, 0, 0, 0, 1, 0];
    pub(crate) const ALLOW: [u8; 6] = [0x1e, 0, 0, 0, 0, 0];

    pub(crate) fn ten(opcode: u8, flags: u8, lba: u32, blocks: u16) -> [u8; 10] {
        let mut cdb = [0; 10];
        (cdb[0], cdb[1]) = (opcode, flags);
        cdb[2..6].copy_from_slice(&lba.to_be_bytes());
        cdb[7..9].copy_from_slice(&blocks.to_be_bytes());
        cdb
    }

    pub(crate) fn twelve(opcode: u8, flags: u8, lba: u32, blocks: u32) -> [u8; 12] {
        let mut cdb = [0; 12];
        (cdb[0], cdb[1]) = (opcode, flags);
        cdb[2..6].copy_from_slice(&lba.to_be_bytes());
        cdb[6..10].copy_from_slice(&blocks.to_be_bytes());
        cdb
    }

    pub(crate) fn sixteen(opcode: u8, flags: u8, lba: u64, blocks: u32) -> [u8; 16] {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1]) = (opcode, flags);
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
        cdb
    }

    pub(crate) fn six(opcode: u8, lba: u32, blocks: u8) -> [u8; 6] {
        let [_, a, b, c] = lba.to_be_bytes();
        [opcode, a, b, c, blocks, 0]
    }
}

#[test]
fn every_failure_has_its_sense() {
    let table = [
        (
            Failure::Medium { at: Some(5 * BLOCK) },
            0x28,
            Sense::UNRECOVERED_READ_ERROR.with_information(Some(5)),
        ),
        (Failure::Medium { at: None }, 0x28, Sense::UNRECOVERED_READ_ERROR),
        (Failure::Medium { at: Some(6 * BLOCK + 1) }, 0x2a, Sense::WRITE_ERROR.with_information(Some(6))),
        (Failure::NoSpace, 0x2a, Sense::SPACE_ALLOCATION_FAILED),
        (Failure::WriteProtected, 0x2a, Sense::WRITE_PROTECTED),
        (Failure::Miscompare { at: 77 }, 0x2a, Sense::MISCOMPARE.with_information(Some(77))),
        (Failure::Internal, 0x28, Sense::INTERNAL_TARGET_FAILURE),
    ];
    for (failure, opcode, sense) in table {
        let mut unit = disk();
        let out = vec![0; 8 * BLOCK as usize];
        let answer = task(&mut unit, &cdbs::ten(opcode, 0, 4, 8), &out).complete(Err(failure));
        assert_sense(&answer, sense);
        assert_eq!(answer.residual, out.len() as u64 + (1 << 20), "nothing is said to have moved");
    }
    for (failure, status) in [(Failure::Aborted, Status::TaskAborted), (Failure::Busy, Status::Busy)] {
        let answer = task(&mut disk(), &cdbs::ten(0x28, 0, 0, 1), &[]).complete(Err(failure));
        assert_eq!((answer.status, answer.sense), (status, None));
    }
}
