//! UNMAP and WRITE SAME.

use super::*;
use crate::Range;
use crate::cdb::{be16, be32, be64, put};

fn range(lba: u64, blocks: u64) -> Range {
    Range { offset: lba * BLOCK, len: blocks * BLOCK }
}

/// An UNMAP of these, and its CDB.
fn unmap(extents: &[(u64, u32)]) -> ([u8; 10], Vec<u8>) {
    let len = 16 * extents.len();
    let mut list = vec![0; 8 + len];
    put(&mut list, 0, (len as u16 + 6).to_be_bytes());
    put(&mut list, 2, (len as u16).to_be_bytes());
    for (index, (lba, blocks)) in extents.iter().enumerate() {
        put(&mut list, 8 + index * 16, lba.to_be_bytes());
        put(&mut list, 16 + index * 16, blocks.to_be_bytes());
    }
    (cdbs::ten(0x42, 0, 0, list.len() as u16), list)
}

#[test]
fn unmap_names_its_ranges() {
    let (cdb, list) = unmap(&[(0, 8), (5, 0), (992, 8)]);
    let ranges = vec![range(0, 8), range(992, 8)];
    assert_eq!(io(&mut disk(), &cdb, &list), Io::Unmap { ranges, durable: false });
    // Of a descriptor that is cut off nothing is done, nor of those past the length that is given.
    let mut short = cdb;
    put(&mut short, 7, (8u16 + 16 + 15).to_be_bytes());
    assert_eq!(io(&mut disk(), &short, &list), Io::Unmap { ranges: vec![range(0, 8)], durable: false });
    let mut fewer = list.clone();
    put(&mut fewer, 2, 16u16.to_be_bytes());
    assert_eq!(io(&mut disk(), &cdb, &fewer), Io::Unmap { ranges: vec![range(0, 8)], durable: false });
}

#[test]
fn unmap_of_nothing_is_good() {
    assert_good(&run(&mut disk(), &cdbs::ten(0x42, 0, 0, 0), &[]));
    let (cdb, list) = unmap(&[]);
    assert_good(&run(&mut disk(), &cdb, &list));
    let (cdb, list) = unmap(&[(3, 0)]);
    assert_good(&run(&mut disk(), &cdb, &list));
}

#[test]
fn unmap_refuses_what_is_too_much_or_not_there() {
    let refused = |extents: &[(u64, u32)], sense| {
        let (cdb, list) = unmap(extents);
        assert_sense(&run(&mut disk(), &cdb, &list), sense);
    };
    refused(&[(0, 1), (999, 2)], out_of_range(1000));
    refused(&[(u64::MAX, 1)], out_of_range(u64::MAX));
    refused(&[(0, 0); 257], Sense::list(2));
    assert_sense(&run(&mut disk(), &cdbs::ten(0x42, 0, 0, 7), &[0; 7]), Sense::PARAMETER_LIST_LENGTH_ERROR);
    let mut large = known(Unit::disk(identity(), thin(), medium(1 << 40)).expect("a good disk"));
    let (cdb, list) = unmap(&[(0, u32::MAX)]);
    assert!(matches!(io(&mut large, &cdb, &list), Io::Unmap { .. }));
    let (cdb, list) = unmap(&[(0, u32::MAX), (0, 1)]);
    assert_sense(&run(&mut large, &cdb, &list), Sense::list(8 + 16 + 8));
    let fixed = Disk { unmap: None, ..thin() };
    let mut unit = known(Unit::disk(identity(), fixed, medium(BLOCKS)).expect("a good disk"));
    let (cdb, list) = unmap(&[(0, 8)]);
    assert_sense(&run(&mut unit, &cdb, &list), Sense::INVALID_OPERATION_CODE);
    assert_sense(&run(&mut unit, &cdbs::ten(0x41, 0x08, 0, 1), &[0; 512]), Sense::cdb_bit(1, 3));
}

#[test]
fn write_same_knows_zeroes() {
    let zeroes = [0; BLOCK as usize];
    let mut ones = zeroes;
    ones[511] = 1;
    let (range, durable) = (range(10, 20), false);
    for (flags, unmap) in [(0x00, false), (0x08, true)] {
        let zero = Io::WriteZeroes { range, unmap, durable };
        assert_eq!(io(&mut disk(), &cdbs::ten(0x41, flags, 10, 20), &zeroes), zero);
        assert_eq!(io(&mut disk(), &cdbs::sixteen(0x93, flags, 10, 20), &zeroes), zero);
        assert_eq!(io(&mut disk(), &cdbs::sixteen(0x93, flags | 1, 10, 20), &[]), zero);
        // Blocks that are given back would not read as this.
        let pattern = ones.into();
        let same = Io::WriteSame { range, pattern, durable };
        assert_eq!(io(&mut disk(), &cdbs::sixteen(0x93, flags, 10, 20), &ones), same);
    }
    let cdb = cdbs::ten(0x41, 0, 10, 20);
    assert_eq!(task(&mut disk(), &cdb, &[0; 1024]).complete(Ok(())).residual, 512 + (1 << 20));
    let Step::Overrun { needed: 512 } = step_of(&mut disk(), US, &cdb, &[0; 511], 0) else { panic!() };
}

#[test]
fn write_same_goes_to_the_end_and_no_further_than_its_limit() {
    let rest = Io::WriteZeroes { range: range(990, 10), unmap: false, durable: false };
    assert_eq!(io(&mut disk(), &cdbs::sixteen(0x93, 1, 990, 0), &[]), rest);
    assert_sense(&run(&mut disk(), &cdbs::sixteen(0x93, 1, 990, 11), &[]), out_of_range(1000));
    assert_sense(&run(&mut disk(), &cdbs::sixteen(0x93, 1, 1000, 0), &[]), out_of_range(1000));
    let mut large = known(Unit::disk(identity(), thin(), medium(1 << 32)).expect("a good disk"));
    let limits = data(&mut large, &[0x12, 1, 0xb0, 0, 64, 0]);
    let most = be64(&limits, 36);
    assert!(matches!(io(&mut large, &cdbs::sixteen(0x93, 1, 0, most as u32), &[]), Io::WriteZeroes { .. }));
    assert_sense(&run(&mut large, &cdbs::sixteen(0x93, 1, 0, most as u32 + 1), &[]), Sense::cdb(10));
    assert_sense(&run(&mut large, &cdbs::sixteen(0x93, 1, 0, 0), &[]), Sense::cdb(10));
}

#[test]
fn what_is_told_of_provisioning_is_so() {
    let limits = data(&mut disk(), &[0x12, 1, 0xb0, 0, 64, 0]);
    assert_eq!((limits.len(), be16(&limits, 2)), (64, 0x3c));
    assert_eq!((limits[5], be32(&limits, 8)), (255, 256), "compare and write, transfer");
    assert_eq!(be32(&limits, 24), 256, "unmap descriptors");
    assert_eq!((be32(&limits, 28), be32(&limits, 32)), (8, 1 << 31), "granularity, alignment");
    assert_eq!(data(&mut disk(), &[0x12, 1, 0xb2, 0, 64, 0]), [0, 0xb2, 0, 4, 0, 0xe4, 2, 0]);
    let (cdb, list) = unmap(&[(0, 1); 256]);
    assert!(matches!(io(&mut disk(), &cdb, &list), Io::Unmap { ranges, .. } if ranges.len() == 256));
}
