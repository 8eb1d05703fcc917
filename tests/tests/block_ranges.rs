//! DISCARD and WRITE_ZEROES, down to the file.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use cleave_tests::driver::{BlockDriver, Buffer, IoStatus, RequestKind};
use common::{MIB, disk, disk_in, pattern, start, tmpfs};

const RO: u64 = 1 << 5;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const UNMAP: u32 = 1;

#[test]
fn both_are_offered_with_their_limits() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.negotiated.offered & (DISCARD | WRITE_ZEROES), DISCARD | WRITE_ZEROES);
    let config = driver.frontend.config(0, 60).unwrap();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    let (sectors, segments) = (1 << 21, 64);
    assert_eq!([word(36), word(40), word(48), word(52)], [sectors, segments, sectors, segments]);
    assert_eq!(word(44), word(20) * (1 << config[24]) / 512, "the alignment is a physical block");
    assert_eq!(config[56..60], [1, 0, 0, 0]);
}

#[test]
fn a_readonly_disk_offers_neither() {
    let image = disk(MIB);
    let before = fs::read(image.path()).unwrap();
    let daemon = start(&image, &["--read-only"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.negotiated.offered & (RO | DISCARD | WRITE_ZEROES), RO);
    assert_eq!(driver.frontend.config(36, 24).unwrap(), [0; 24]);
    for kind in [RequestKind::Discard, RequestKind::WriteZeroes] {
        assert_eq!(driver.deallocate(kind, &[(0, 8, 0)]).unwrap(), IoStatus::Unsupported);
    }
    assert!(fs::read(image.path()).unwrap() == before);
}

#[test]
fn zeroes_are_where_they_were_asked_for_and_nowhere_else() {
    // A tmpfs knows how to punch holes, but not how to zero a range.
    let ram = tmpfs(16 * MIB);
    for (place, cache) in [(None, "none"), (None, "writethrough"), (Some(ram.path()), "writeback")] {
        for flags in [0, UNMAP] {
            let image = place.map_or_else(|| disk(4 * MIB), |place| disk_in(place, 4 * MIB));
            let mut expected = fs::read(image.path()).unwrap();
            let daemon = start(&image, &["--cache", cache]);
            let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
            let segments = [(8, 8, flags), (8191, 1, flags), (2048, 3000, flags), (0, 0, flags)];
            assert_eq!(driver.deallocate(RequestKind::WriteZeroes, &segments).unwrap(), IoStatus::Ok);
            for (sector, sectors, _) in segments {
                let start = sector as usize * 512;
                expected[start..start + sectors as usize * 512].fill(0);
            }
            assert!(fs::read(image.path()).unwrap() == expected, "{cache} {flags} {place:?}");
            assert_eq!(driver.read(8, 4096).unwrap(), (IoStatus::Ok, vec![0; 4096]));
            assert_eq!(driver.read(16, 512).unwrap().1, expected[8192..8704]);
        }
    }
}

#[test]
fn discarded_storage_goes_back_to_the_host() {
    let image = disk(4 * MIB);
    image.as_file().sync_all().unwrap();
    let blocks = || fs::metadata(image.path()).unwrap().blocks();
    let before = blocks();
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let segments = [(2048, 2048, 0), (6144, 1024, 0)];
    assert_eq!(driver.deallocate(RequestKind::Discard, &segments).unwrap(), IoStatus::Ok);
    assert!(blocks() + 3072 <= before, "{} of {before} are left", blocks());
    assert_eq!(driver.read(0, 4096).unwrap(), (IoStatus::Ok, pattern(0, 4096)));
    assert_eq!(driver.write(2048, &pattern(3, 4096)).unwrap(), IoStatus::Ok);
    assert_eq!(driver.read(2048, 4096).unwrap(), (IoStatus::Ok, pattern(3, 4096)));
    assert_eq!(fs::metadata(image.path()).unwrap().len(), 4 * MIB);
}

#[test]
fn a_bad_segment_spoils_the_request_before_anything_is_done() {
    let image = disk(MIB);
    let before = fs::read(image.path()).unwrap();
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let end = MIB / 512;
    for (bad, status) in [
        ((end, 1, 0), IoStatus::IoErr),
        ((end - 1, 2, 0), IoStatus::IoErr),
        ((u64::MAX, 8, 0), IoStatus::IoErr),
        ((1 << 55, 8, 0), IoStatus::IoErr),
        ((0, u32::MAX, 0), IoStatus::IoErr),
        ((0, 8, 2), IoStatus::Unsupported),
        ((0, 8, u32::MAX), IoStatus::Unsupported),
    ] {
        for kind in [RequestKind::Discard, RequestKind::WriteZeroes] {
            assert_eq!(driver.deallocate(kind, &[(0, 8, 0), bad]).unwrap(), status, "{kind:?} {bad:?}");
        }
    }
    let discard = |driver: &mut BlockDriver, segments: &[(u64, u32, u32)]| {
        driver.deallocate(RequestKind::Discard, segments).unwrap()
    };
    assert_eq!(discard(&mut driver, &[(0, 8, UNMAP)]), IoStatus::Unsupported);
    assert_eq!(discard(&mut driver, &[(0, 0, 0); 64]), IoStatus::Ok);
    assert_eq!(discard(&mut driver, &[(0, 0, 0); 65]), IoStatus::IoErr);
    assert_eq!(discard(&mut driver, &[]), IoStatus::IoErr);
    // A segment that is cut off, one in buffers of a byte, and one outside of memory.
    let (data, hole) = (driver.data, driver.ram.hole());
    driver.ram.write(data, &[0; 32]).unwrap();
    let mut ask = |buffers: &[Buffer]| driver.request(RequestKind::WriteZeroes, 0, buffers).unwrap().0;
    assert_eq!(ask(&[Buffer::to_read(data, 17)]), IoStatus::IoErr);
    let bytes: Vec<Buffer> = (0..16).map(|at| Buffer::to_read(data + at, 1)).collect();
    assert_eq!(ask(&bytes), IoStatus::Ok, "no sectors at all");
    assert_eq!(ask(&[Buffer::to_read(hole, 16)]), IoStatus::IoErr);
    assert!(fs::read(image.path()).unwrap() == before);
}

#[test]
fn a_zeroed_range_is_ordered_with_the_requests_around_it() {
    let image = disk(MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    for round in 0..50 {
        assert_eq!(driver.write(64, &pattern(round, 8192)).unwrap(), IoStatus::Ok);
        let segment = [(72, 8, UNMAP * (round as u32 % 2))];
        assert_eq!(driver.deallocate(RequestKind::WriteZeroes, &segment).unwrap(), IoStatus::Ok);
        let (status, bytes) = driver.read(64, 8192).unwrap();
        assert_eq!(status, IoStatus::Ok);
        assert!(bytes[..4096] == pattern(round, 8192)[..4096] && bytes[4096..] == [0; 4096]);
    }
}
