//! A CD-ROM drive: its discs, its tray, and who holds it.

use super::*;
use crate::cdb::{be16, be32};
use crate::{Action, EjectError, Range};

/// GET EVENT STATUS NOTIFICATION, media class, polled.
const EVENT: [u8; 10] = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];
const CONFIGURATION: [u8; 10] = [0x46, 0, 0, 0, 0, 0, 0, 4, 0, 0];

const CD: Option<u64> = Some(300_000);
const DVD: Option<u64> = Some(2_000_000);

/// What has happened to the medium, and what of tray (1) and medium (2) there is.
fn event(unit: &mut Unit, nexus: Nexus) -> (u8, u8) {
    let bytes = run_of(unit, nexus, &EVENT, &[]).data_in;
    assert_eq!((bytes.len(), &bytes[..4]), (8, &[0, 6, 4, 0x10][..]));
    (bytes[4], bytes[5])
}

fn toc(unit: &mut Unit, flags: u8, format: u8, track: u8) -> Answer {
    run(unit, &[0x43, flags, format, 0, 0, 0, track, 0, 255, 0], &[])
}

#[test]
fn a_disc_is_read() {
    let mut unit = cd(CD);
    assert_eq!(data(&mut unit, &cdbs::ten(0x25, 0, 0, 0)), [0, 0x04, 0x93, 0xdf, 0, 0, 8, 0]);
    let range = Range { offset: 16 * 2048, len: 3 * 2048 };
    let read = Io::Read { range, fua: false };
    assert_eq!(io(&mut unit, &cdbs::ten(0x28, 0x08, 16, 3), &[]), read);
    assert_eq!(io(&mut unit, &cdbs::twelve(0xa8, 0, 16, 3), &[]), read);
    assert_eq!(io(&mut unit, &[0xbe, 0x08, 0, 0, 0, 16, 0, 0, 3, 0x10, 0, 0], &[]), read);
    assert_sense(&run(&mut unit, &cdbs::ten(0x28, 0, 300_000, 1), &[]), out_of_range(300_000));
    assert_sense(&run(&mut unit, &cdbs::ten(0x2a, 0, 0, 1), &[0; 2048]), Sense::INVALID_OPERATION_CODE);
    assert_sense(&run(&mut unit, &cdbs::sixteen(0x9e, 0x10, 0, 32), &[]), Sense::INVALID_OPERATION_CODE);
    assert_good(&run(&mut unit, &cdbs::ten(0x2b, 0, 299_999, 0), &[]));
    assert_sense(&run(&mut unit, &cdbs::ten(0x2b, 0, 300_000, 0), &[]), out_of_range(300_000));
}

#[test]
fn read_cd_reads_user_data_only() {
    let mut unit = cd(CD);
    let mut read_cd = |kind: u8, lba: u32, blocks: u8, flags: u8, sub_channel: u8| {
        let [a, b, c, d] = lba.to_be_bytes();
        run(&mut unit, &[0xbe, kind << 2, a, b, c, d, 0, 0, blocks, flags, sub_channel, 0], &[])
    };
    assert_good(&read_cd(0, 0, 1, 0, 0));
    assert_good(&read_cd(2, 0, 0, 0x10, 0));
    assert_sense(&read_cd(1, 0, 1, 0x10, 0), Sense::ILLEGAL_MODE_FOR_THIS_TRACK);
    assert_sense(&read_cd(0, 0, 1, 0xf8, 0), Sense::cdb_bit(9, 7));
    assert_sense(&read_cd(0, 0, 1, 0x10, 1), Sense::cdb_bit(10, 2));
    assert_sense(&read_cd(0, 299_999, 2, 0x10, 0), out_of_range(300_000));
}

#[test]
fn the_table_of_contents_has_one_track() {
    let mut unit = cd(CD);
    let whole = [
        0, 18, 1, 1, // header
        0, 0x14, 1, 0, 0, 0, 0, 0, // the track
        0, 0x14, 0xaa, 0, 0, 0x04, 0x93, 0xe0, // its end
    ];
    assert_eq!(toc(&mut unit, 0, 0, 0).data_in, whole);
    assert_eq!(toc(&mut unit, 0, 0, 1).data_in, whole);
    let end = toc(&mut unit, 2, 0, 0xaa).data_in;
    // 300,150 frames: 66 minutes, 42 seconds.
    assert_eq!(end, [0, 10, 1, 1, 0, 0x14, 0xaa, 0, 0, 66, 42, 0]);
    assert_eq!(toc(&mut unit, 0, 1, 0).data_in, [0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0]);
    let full = toc(&mut unit, 0, 2, 0).data_in;
    assert_eq!((usize::from(be16(&full, 0)), full.len()), (2 + 4 * 11, 4 + 4 * 11));
    assert_eq!(full[4 + 2 * 11..][..11], [1, 0x14, 0, 0xa2, 0, 0, 0, 0, 66, 42, 0]);
    assert_eq!(full[4 + 3 * 11..][..11], [1, 0x14, 0, 1, 0, 0, 0, 0, 0, 2, 0]);
    // The format where it used to be.
    assert_eq!(run(&mut unit, &[0x43, 0, 0, 0, 0, 0, 0, 0, 255, 0x40], &[]).data_in.len(), 12);
    assert_sense(&toc(&mut unit, 0, 0, 2), Sense::cdb(6));
    assert_sense(&toc(&mut unit, 0, 2, 2), Sense::cdb(6));
    assert_sense(&toc(&mut unit, 0, 5, 0), Sense::cdb_bit(2, 3));
}

#[test]
fn profiles_follow_the_medium() {
    for (blocks, profile) in [(None, 0), (CD, 0x08), (DVD, 0x10)] {
        let bytes = data(&mut cd(blocks), &CONFIGURATION);
        assert_eq!((be32(&bytes, 0) as usize, be16(&bytes, 6)), (bytes.len() - 4, profile));
        let mut features = Vec::new();
        let mut at = 8;
        while at < bytes.len() {
            features.push((be16(&bytes, at), bytes[at + 2] & 1 != 0));
            assert_eq!(bytes[at + 3] % 4, 0);
            at += 4 + usize::from(bytes[at + 3]);
        }
        assert_eq!(at, bytes.len());
        let now: Vec<u16> = features.iter().filter(|(_, current)| *current).map(|(code, _)| *code).collect();
        let mut expected = vec![0, 1, 2, 3, 0x100, 0x105];
        match profile {
            0x08 => drop(expected.splice(4..4, [0x10, 0x1e])),
            0x10 => drop(expected.splice(4..4, [0x10, 0x1f])),
            _ => {}
        }
        assert_eq!(now, expected);
    }
    let mut unit = cd(CD);
    let mut one = CONFIGURATION;
    (one[1], one[3]) = (2, 0x1e);
    assert_eq!(data(&mut unit, &one), [0, 0, 0, 12, 0, 0, 0, 8, 0, 0x1e, 0x09, 4, 0, 0, 0, 0]);
    one[1] = 3;
    assert_sense(&run(&mut unit, &one, &[]), Sense::cdb_bit(1, 1));
}

#[test]
fn discs_say_what_they_are() {
    let information = data(&mut cd(CD), &[0x51, 0, 0, 0, 0, 0, 0, 0, 255, 0]);
    assert_eq!((information.len(), &information[..7]), (34, &[0, 32, 0x0e, 1, 1, 1, 1][..]));
    assert_sense(&run(&mut cd(CD), &[0x51, 1, 0, 0, 0, 0, 0, 0, 255, 0], &[]), Sense::cdb_bit(1, 2));
    let structure = |format: u8| [0xad, 0, 0, 0, 0, 0, 0, format, 255, 255, 0, 0];
    assert_sense(&run(&mut cd(CD), &structure(0), &[]), Sense::INCOMPATIBLE_MEDIUM);
    assert_sense(&run(&mut cd(DVD), &structure(0x10), &[]), Sense::cdb(7));
    assert_sense(&run(&mut cd(None), &structure(0), &[]), Sense::MEDIUM_NOT_PRESENT_TRAY_CLOSED);
    let physical = data(&mut cd(DVD), &structure(0));
    assert_eq!((be16(&physical, 0), physical.len()), (2050, 2052));
    assert_eq!((be32(&physical, 8), be32(&physical, 12)), (0x03_0000, 0x03_0000 + 1_999_999));
    assert_eq!(data(&mut cd(DVD), &structure(1)), [0, 6, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_capabilities_page_says_tray_and_lock() {
    let mut unit = cd(CD);
    let sense = [0x1a, 0, 0x2a, 0, 255, 0];
    let bytes = data(&mut unit, &sense);
    assert_eq!(bytes[..6], [25, 0, 0, 0, 0x2a, 20]);
    assert_eq!((bytes[6], bytes[10]), (0x3b, 0x29));
    assert_good(&run(&mut unit, &cdbs::PREVENT, &[]));
    assert_eq!(data(&mut unit, &sense)[10], 0x2b);
    assert_eq!(data(&mut unit, &[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 255, 0]).len(), 8 + 12 + 22);
}

#[test]
fn the_guest_ejects_and_the_host_loads() {
    let mut unit = cd(CD);
    let Step::Control { actions, .. } = step_of(&mut unit, US, &cdbs::EJECT, &[], 0) else { panic!() };
    assert!(matches!(&actions[..], [Action::Save(_), Action::Ejected]), "{actions:?}");
    assert!(unit.is_tray_open() && !unit.has_medium());
    assert_sense(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]), Sense::MEDIUM_NOT_PRESENT_TRAY_OPEN);
    assert_sense(&toc(&mut unit, 0, 0, 0), Sense::MEDIUM_NOT_PRESENT_TRAY_OPEN);
    assert_sense(&run(&mut unit, &cdbs::ten(0x28, 0, 0, 1), &[]), Sense::MEDIUM_NOT_PRESENT_TRAY_OPEN);
    assert_eq!(data(&mut unit, &[0xbd, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0])[1], 0x10);
    assert_eq!((event(&mut unit, US), event(&mut unit, US)), ((3, 1), (0, 1)));
    assert_good(&run(&mut unit, &cdbs::EJECT, &[]));
    let Step::Control { actions, .. } = step_of(&mut unit, US, &cdbs::CLOSE, &[], 0) else { panic!() };
    assert!(matches!(&actions[..], [Action::Save(_), Action::Closed]), "{actions:?}");
    assert_sense(&run(&mut unit, &cdbs::TEST_UNIT_READY, &[]), Sense::MEDIUM_NOT_PRESENT_TRAY_CLOSED);
    unit.load(Medium { blocks: 5, read_only: true }).expect("a good medium");
    // Both hear of it, by the event first: it passes the attention.
    assert_eq!((event(&mut unit, US), event(&mut unit, US)), ((2, 2), (0, 2)));
    for nexus in [US, THEM] {
        let answer = run_of(&mut unit, nexus, &cdbs::TEST_UNIT_READY, &[]);
        assert_sense(&answer, Sense::unit_attention(0x28, 0));
        assert_good(&run_of(&mut unit, nexus, &cdbs::TEST_UNIT_READY, &[]));
    }
    assert_eq!(event(&mut unit, THEM), (2, 2));
}

#[test]
fn a_locked_tray_stays_shut() {
    let mut unit = cd(CD);
    assert_good(&run_of(&mut unit, THEM, &cdbs::PREVENT, &[]));
    assert_sense(&run(&mut unit, &cdbs::EJECT, &[]), Sense::MEDIUM_REMOVAL_PREVENTED);
    // Somebody else's permission does not help.
    assert_good(&run(&mut unit, &cdbs::ALLOW, &[]));
    assert_eq!(unit.eject(false), Err(EjectError::Locked));
    assert_eq!((event(&mut unit, US), event(&mut unit, THEM)), ((1, 2), (1, 2)));
    assert_good(&run_of(&mut unit, THEM, &cdbs::ALLOW, &[]));
    assert_eq!(unit.eject(false), Ok(()));
    assert_eq!(event(&mut unit, US), (3, 1));
    unit.load(Medium { blocks: 5, read_only: true }).expect("a good medium");
    assert_good(&run_of(&mut unit, THEM, &EVENT, &[]));
    unit.nexus_mut(THEM).attentions.take();
    assert_good(&run_of(&mut unit, THEM, &cdbs::PREVENT, &[]));
    assert_eq!(unit.eject(true), Ok(()));
    assert_eq!(disk().eject(true), Err(EjectError::Fixed));
}

#[test]
fn events_have_their_rules() {
    let mut unit = cd(CD);
    assert_sense(&run(&mut unit, &[0x4a, 0, 0, 0, 0x10, 0, 0, 0, 8, 0], &[]), Sense::cdb_bit(1, 0));
    assert_eq!(data(&mut unit, &[0x4a, 1, 0, 0, 0x02, 0, 0, 0, 8, 0]), [0, 2, 0x80, 0x10]);
    unit.load(Medium { blocks: 5, read_only: true }).expect("a good medium");
    // Who asks for the header only has not been told.
    assert_eq!(data(&mut unit, &[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 4, 0]), [0, 6, 4, 0x10]);
    assert_eq!(event(&mut unit, US), (2, 2));
}
