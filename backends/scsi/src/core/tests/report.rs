//! INQUIRY and what commands there are.

use super::*;
use crate::cdb::{be16, be32};
use crate::commands::commands;

fn vital(unit: &mut Unit, page: u8) -> Vec<u8> {
    let bytes = data(unit, &[0x12, 1, page, 0, 252, 0]);
    assert_eq!(bytes[1], page);
    assert_eq!(usize::from(be16(&bytes, 2)), bytes.len() - 4);
    bytes[4..].to_vec()
}

#[test]
fn inquiry_says_who_it_is() {
    let bytes = data(&mut disk(), &cdbs::INQUIRY);
    assert_eq!(bytes.len(), 96);
    assert_eq!(bytes[..8], [0x00, 0x00, 0x06, 0x12, 91, 0, 0, 0x02]);
    assert_eq!(&bytes[8..36], b"CLEAVE  disk            0001");
    assert_eq!(data(&mut removable_disk(None), &cdbs::INQUIRY)[..2], [0x00, 0x80]);
    assert_eq!(data(&mut cd(None), &cdbs::INQUIRY)[..2], [0x05, 0x80]);
    // SAM-5, SPC-4, and SBC-3 or MMC-6.
    assert_eq!(bytes[58..66], [0x00, 0xa0, 0x04, 0x60, 0x04, 0xc0, 0, 0]);
    assert_eq!(data(&mut cd(None), &cdbs::INQUIRY)[62..66], [0x04, 0xe0, 0, 0]);
    assert_eq!(data(&mut disk(), &[0x12, 0, 0, 0, 5, 0]).len(), 5);
    assert_sense(&run(&mut disk(), &[0x12, 0, 0x80, 0, 96, 0], &[]), Sense::cdb(2));
    assert_sense(&run(&mut disk(), &[0x12, 1, 0xc0, 0, 96, 0], &[]), Sense::cdb(2));
}

#[test]
fn vital_product_data_is_all_there() {
    let mut unit = disk();
    let pages = vital(&mut unit, 0x00);
    assert_eq!(pages, [0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    assert_eq!(vital(&mut unit, 0x80), b"S3R1AL");
    let mut designators = b"\x02\x01\x00\x1eCLEAVE  disk            S3R1AL".to_vec();
    designators.extend([1, 3, 0, 8, 0x51, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
    designators.extend([1, 0x14, 0, 4, 0, 0, 0, 1]);
    assert_eq!(vital(&mut unit, 0x83), designators);
    let characteristics = vital(&mut unit, 0xb1);
    assert_eq!((characteristics.len(), be16(&characteristics, 0)), (0x3c, 1));
    assert_eq!(vital(&mut cd(None), 0x00), [0x00, 0x80, 0x83]);
    let unnamed = Identity::new("x", "", None).expect("good names");
    let mut unit = known(Unit::disk(unnamed, thin(), medium(1)).expect("a good disk"));
    assert_eq!(vital(&mut unit, 0x00)[..2], [0x00, 0x83]);
    assert_sense(&run(&mut unit, &[0x12, 1, 0x80, 0, 96, 0], &[]), Sense::cdb(2));
}

#[test]
fn names_are_what_scsi_can_say() {
    assert!(Identity::new("seventeen letters", "", None).is_err());
    assert!(Identity::new("tab\there", "", None).is_err());
    assert!(Identity::new("", "übel", None).is_err());
    assert!(Identity::new("", &"9".repeat(37), None).is_err());
}

fn operation_codes(unit: &mut Unit, options: u8, opcode: u8, service_action: u16) -> Answer {
    let mut cdb = [0xa3, 0x0c, options, opcode, 0, 0, 0, 0, 255, 255, 0, 0];
    cdb[4..6].copy_from_slice(&service_action.to_be_bytes());
    run(unit, &cdb, &[])
}

#[test]
fn every_command_is_reported_and_is_one() {
    for mut unit in [disk(), cd(Some(100))] {
        let bytes = operation_codes(&mut unit, 0, 0, 0).data_in;
        assert_eq!(be32(&bytes, 0) as usize, bytes.len() - 4);
        let listed: Vec<&[u8]> = bytes[4..].chunks_exact(8).collect();
        assert_eq!(listed.len(), commands(&unit).count());
        for one in listed {
            let (opcode, action, has_action) = (one[0], be16(one, 2), one[5] & 1 != 0);
            let len = usize::from(be16(one, 6));
            // The length is in the operation code (SPC-4, 4.2.5.1).
            let by_group = [6, 10, 10, 0, 16, 12][usize::from(opcode >> 5)];
            assert_eq!(len, by_group, "{opcode:02x}");
            let answer = operation_codes(&mut unit, if has_action { 2 } else { 1 }, opcode, action);
            assert_eq!(answer.data_in[..2], [0, 3], "{opcode:02x}");
            assert_eq!((answer.data_in.len(), answer.data_in[4]), (4 + len, opcode));
            assert!(!has_action || u16::from(answer.data_in[5] & 0x1f) == action, "{opcode:02x}");
            // Whatever else may be wrong with it, it is known.
            let mut cdb = vec![0; len];
            (cdb[0], cdb[1]) = (opcode, if has_action { action as u8 } else { 0 });
            if let Step::Done(answer) = step_of(&mut unit, US, &cdb, &[], 1 << 20) {
                assert_ne!(answer.sense, Some(Sense::INVALID_OPERATION_CODE.encode(false)), "{opcode:02x}");
                let no_such_action = Some(Sense::cdb_bit(1, 4).encode(false));
                assert!(!has_action || answer.sense != no_such_action, "{opcode:02x}");
            }
        }
        let with_timeouts = operation_codes(&mut unit, 0x80, 0, 0).data_in;
        assert_eq!((with_timeouts.len() - 4) / 20, (bytes.len() - 4) / 8);
        assert_eq!(with_timeouts[4 + 5] & 2, 2);
        assert_eq!(with_timeouts[12..14], [0, 10]);
    }
}

#[test]
fn asking_for_one_command_has_its_rules() {
    let mut unit = disk();
    let not_supported = [0, 1, 0, 0];
    assert_eq!(operation_codes(&mut unit, 1, 0x04, 0).data_in, not_supported);
    assert_eq!(operation_codes(&mut unit, 1, 0x43, 0).data_in, not_supported, "of a CD-ROM");
    assert_eq!(operation_codes(&mut unit, 2, 0x9e, 0x12).data_in, not_supported);
    assert_eq!(operation_codes(&mut unit, 3, 0x9e, 0x10).data_in[1], 3);
    assert_eq!(operation_codes(&mut unit, 3, 0x28, 0).data_in[1], 3);
    assert_eq!(operation_codes(&mut unit, 3, 0x28, 1).data_in, not_supported);
    let timed = operation_codes(&mut unit, 0x81, 0x28, 0).data_in;
    assert_eq!((timed[1], timed.len()), (0x83, 4 + 10 + 12));
    for (options, opcode) in [(1, 0x9e), (2, 0x28), (4, 0x28), (7, 0)] {
        assert_sense(&operation_codes(&mut unit, options, opcode, 0), Sense::cdb_bit(2, 2));
    }
    assert_eq!(data(&mut unit, &cdbs::twelve(0xa3, 0x0d, 0, 4)), [0xdc, 0x03, 0, 0]);
    assert_sense(&run(&mut unit, &cdbs::twelve(0xa3, 0x0d, 0, 3), &[]), Sense::cdb(6));
    let mut extended = cdbs::twelve(0xa3, 0x0d, 0, 64);
    extended[2] = 0x80;
    assert_eq!(data(&mut unit, &extended)[..4], [0xdc, 0x03, 0, 12]);
}
