//! The segments of DISCARD and WRITE_ZEROES (virtio 1.2, 5.2.6): read once, and checked whole before anything is done.

use cleave_runtime::{Chain, GuestMemory};
use cleave_storage::{Range, RangeOp};

use super::{Limits, Request, SECTOR, Status, Work};

/// Most segments in one request.
pub(crate) const MAX_SEGMENTS: u32 = 64;

/// Most sectors in one segment: 1 GiB.
pub(crate) const MAX_SECTORS: u32 = 1 << 21;

/// Bytes of `struct virtio_blk_discard_write_zeroes`: sector, num_sectors, flags.
const SEGMENT_LEN: usize = 16;

/// The only bit of `flags` that means anything: the storage of zeroed sectors may be given back.
const UNMAP: u32 = 1;

/// What a request of either kind asks for.
pub(crate) fn read(
    chain: &Chain,
    memory: &GuestMemory,
    request: &Request,
    work: Work,
    limits: &Limits,
    durable: bool,
) -> Result<(RangeOp, Vec<Range>), Status> {
    let len = request.data_len as usize;
    if len > MAX_SEGMENTS as usize * SEGMENT_LEN {
        return Err(Status::IoErr);
    }
    let mut bytes = vec![0; len];
    let mut rest = &mut bytes[..];
    for segment in Request::data(chain, work) {
        let (now, later) = rest.split_at_mut(rest.len().min(segment.len as usize));
        memory.read(now, segment.addr).map_err(|_| Status::IoErr)?;
        rest = later;
    }
    parse(&bytes, work == Work::WriteZeroes, limits, durable)
}

fn parse(
    bytes: &[u8],
    zeroes: bool,
    limits: &Limits,
    durable: bool,
) -> Result<(RangeOp, Vec<Range>), Status> {
    let (segments, rest) = bytes.as_chunks::<SEGMENT_LEN>();
    if segments.is_empty() || !rest.is_empty() {
        return Err(Status::IoErr);
    }
    let mut ranges = Vec::with_capacity(segments.len());
    let mut all_flags = UNMAP;
    for segment in segments {
        let raw = u128::from_le_bytes(*segment);
        let (sector, num_sectors, flags) = (raw as u64, (raw >> 64) as u32, (raw >> 96) as u32);
        if flags & !UNMAP != 0 || (flags & UNMAP != 0 && !zeroes) {
            return Err(Status::Unsupported);
        }
        if num_sectors > MAX_SECTORS {
            return Err(Status::IoErr);
        }
        let len = u64::from(num_sectors) * SECTOR;
        ranges.push(Range { offset: limits.check(sector, len)?, len });
        all_flags &= flags;
    }
    // Unmapping is allowed, never asked for: it is done where all segments allow it.
    let op = match zeroes {
        true => RangeOp::WriteZeroes { unmap: all_flags & UNMAP != 0, durable },
        false => RangeOp::Discard,
    };
    Ok((op, ranges))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { len: 1 << 30, logical_block: 4096, read_only: false };

    fn segment(sector: u64, num_sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &num_sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    fn both(bytes: &[u8]) -> [Result<Vec<Range>, Status>; 2] {
        [false, true].map(|zeroes| parse(bytes, zeroes, &LIMITS, false).map(|(_, ranges)| ranges))
    }

    #[test]
    fn ranges_in_bytes() {
        let bytes = [segment(8, 16, 0), segment(0, 0, 0), segment((1 << 21) - 8, 8, 0)].concat();
        let ranges = vec![
            Range { offset: 4096, len: 8192 },
            Range { offset: 0, len: 0 },
            Range { offset: (1 << 30) - 4096, len: 4096 },
        ];
        assert_eq!(both(&bytes), [Ok(ranges.clone()), Ok(ranges)]);
    }

    #[test]
    fn unmapping_needs_the_consent_of_all_segments() {
        for (flags, unmap) in [([1, 1], true), ([1, 0], false), ([0, 0], false)] {
            let bytes = [segment(0, 8, flags[0]), segment(8, 8, flags[1])].concat();
            let (op, _) = parse(&bytes, true, &LIMITS, true).unwrap();
            assert_eq!(op, RangeOp::WriteZeroes { unmap, durable: true });
        }
    }

    #[test]
    fn one_bad_segment_spoils_the_request() {
        let good = segment(0, 8, 0);
        for (bad, status) in [
            (segment(1 << 21, 8, 0), Status::IoErr),
            (segment((1 << 21) - 8, 16, 0), Status::IoErr),
            (segment(u64::MAX, 8, 0), Status::IoErr),
            (segment(u64::MAX / 512 - 7, 8, 0), Status::IoErr),
            (segment(1, 8, 0), Status::IoErr),
            (segment(0, 1, 0), Status::IoErr),
            (segment(0, MAX_SECTORS + 8, 0), Status::IoErr),
            (segment(0, u32::MAX, 0), Status::IoErr),
            (segment(0, 8, 2), Status::Unsupported),
            (segment(0, 8, 1 << 31 | 1), Status::Unsupported),
            (vec![0; 15], Status::IoErr),
        ] {
            let bytes = [good.clone(), bad].concat();
            assert_eq!(both(&bytes), [Err(status), Err(status)]);
        }
        assert_eq!(both(&[]), [Err(Status::IoErr), Err(Status::IoErr)]);
        assert_eq!(both(&segment(0, 8, 1))[0], Err(Status::Unsupported), "discard knows no flag");
    }

    proptest! {
        #[test]
        fn what_is_accepted_lies_on_the_disk(bytes in prop::collection::vec(any::<u8>(), 0..1024), zeroes: bool) {
            if let Ok((_, ranges)) = parse(&bytes, zeroes, &LIMITS, false) {
                for range in ranges {
                    prop_assert!(range.offset + range.len <= LIMITS.len);
                    prop_assert!(range.offset.is_multiple_of(4096) && range.len.is_multiple_of(4096));
                }
            }
        }
    }
}
