use std::os::fd::AsFd;

use proptest::prelude::*;

use super::*;

const SIZE: u16 = 16;

fn wanted(num_queues: u16, queue_size: u16) -> Inflight {
    Inflight { mmap_size: 0, mmap_offset: 0, num_queues, queue_size }
}

/// An area of two queues as the frontend keeps it.
fn kept() -> (Inflight, OwnedFd) {
    InflightArea::create(wanted(2, SIZE), 2, 0).unwrap()
}

/// Queue 1 as a new process finds it.
fn queue(kept: &(Inflight, OwnedFd)) -> InflightQueue {
    let area = InflightArea::map(kept.0, kept.1.try_clone().unwrap(), 2).unwrap();
    area.queue(QueueIndex(1)).unwrap()
}

/// Where queue 1's part starts in the file.
fn write(kept: &(Inflight, OwnedFd), at: usize, bytes: &[u8]) {
    rustix::io::pwrite(&kept.1, bytes, (stride(SIZE) + at) as u64).unwrap();
}

#[test]
fn the_layout_is_the_specifications() {
    let kept = kept();
    let mut queue = queue(&kept);
    assert_eq!(queue.attach(SIZE, 0x1234).unwrap(), Found::Fresh);
    queue.fetched(2).unwrap();
    queue.fetched(3).unwrap();
    queue.before_used(3).unwrap();
    let mut bytes = [0; 16 * 5];
    rustix::io::pread(&kept.1, &mut bytes, stride(SIZE) as u64).unwrap();
    assert_eq!(bytes[..16], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, SIZE as u8, 0, 3, 0, 0x34, 0x12]);
    assert_eq!(bytes[16 * 3..16 * 4], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[16 * 4..], [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(stride(SIZE), 320);
    assert_eq!(kept.0, Inflight { mmap_size: 640, mmap_offset: 0, num_queues: 2, queue_size: SIZE });
}

#[test]
fn a_fresh_region_on_a_used_ring_drops_no_descriptor_0() {
    let kept = kept();
    let mut first = queue(&kept);
    assert_eq!(first.attach(SIZE, 7).unwrap(), Found::Fresh);
    first.fetched(0).unwrap();
    // It dies before anything is used.
    assert_eq!(queue(&kept).attach(SIZE, 7).unwrap(), Found::Used(vec![0]));
}

#[test]
fn what_is_in_flight_comes_back_in_the_order_of_its_fetching() {
    let kept = kept();
    let mut first = queue(&kept);
    first.attach(SIZE, 0).unwrap();
    for head in [9, 3, 15, 0, 4] {
        first.fetched(head).unwrap();
    }
    first.before_used(15).unwrap();
    first.after_used(15, 1).unwrap();
    let mut second = queue(&kept);
    assert_eq!(second.attach(SIZE, 1).unwrap(), Found::Used(vec![9, 3, 0, 4]));
    // What the second one fetches is behind that.
    second.fetched(1).unwrap();
    assert_eq!(queue(&kept).attach(SIZE, 1).unwrap(), Found::Used(vec![9, 3, 0, 4, 1]));
    // Another queue's part is its own.
    let area = InflightArea::map(kept.0, kept.1.try_clone().unwrap(), 2).unwrap();
    assert_eq!(area.queue(QueueIndex(0)).unwrap().attach(SIZE, 0).unwrap(), Found::Fresh);
    assert!(area.queue(QueueIndex(2)).is_none());
}

#[test]
fn wherever_it_dies_a_head_is_used_once() {
    for steps in 0..5 {
        let kept = kept();
        let mut first = queue(&kept);
        first.attach(SIZE, 65535).unwrap();
        first.fetched(5).unwrap();
        first.fetched(6).unwrap();
        let mut ring_used_idx = 65535u16;
        // The steps of a completion, cut off.
        if steps > 0 {
            first.before_used(6).unwrap();
        }
        if steps > 1 {
            ring_used_idx = 0;
        }
        if steps > 2 {
            first.region.clear(6).unwrap();
        }
        if steps > 3 {
            first.after_used(6, 0).unwrap();
        }
        let expected = if steps > 1 { vec![5] } else { vec![5, 6] };
        for _ in 0..2 {
            let found = queue(&kept).attach(SIZE, ring_used_idx).unwrap();
            assert_eq!(found, Found::Used(expected.clone()), "{steps}");
        }
    }
}

#[test]
fn a_batch_of_another_backend_is_finished() {
    let kept = kept();
    let mut first = queue(&kept);
    first.attach(SIZE, 0).unwrap();
    for head in 0..6 {
        first.fetched(head).unwrap();
    }
    // Three in one batch; it dies with one of them cleared.
    for head in [1, 4, 2] {
        first.before_used(head).unwrap();
    }
    first.region.clear(1).unwrap();
    assert_eq!(queue(&kept).attach(SIZE, 3).unwrap(), Found::Used(vec![0, 3, 5]));
}

#[test]
fn a_ring_that_starts_over_needs_a_fresh_region() {
    let kept = kept();
    let mut first = queue(&kept);
    first.attach(SIZE, 1000).unwrap();
    // Nothing in flight: nothing to be lost.
    assert_eq!(queue(&kept).attach(SIZE, 0).unwrap(), Found::Used(vec![]));
    first.attach(SIZE, 1000).unwrap();
    first.fetched(3).unwrap();
    assert!(matches!(queue(&kept).attach(SIZE, 0), Err(InflightError::OtherRing { in_flight: 1, .. })));
}

#[test]
fn regions_that_do_not_fit_are_refused() {
    let kept = kept();
    assert!(matches!(queue(&kept).attach(32, 0), Err(InflightError::RingTooLarge { .. })));
    // A smaller ring than the largest is one that the driver chose.
    assert_eq!(queue(&kept).attach(8, 0).unwrap(), Found::Fresh);
    let mut first = queue(&kept);
    first.attach(SIZE, 0).unwrap();
    first.fetched(12).unwrap();
    assert!(matches!(queue(&kept).attach(8, 0), Err(InflightError::BadHead { head: 12, size: 8 })));
    write(&kept, DESC_NUM, &[8, 0]);
    assert!(matches!(queue(&kept).attach(SIZE, 0), Err(InflightError::DescNum { .. })));
    write(&kept, DESC_NUM, &[SIZE as u8, 0]);
    write(&kept, FEATURES, &[1]);
    assert!(matches!(queue(&kept).attach(SIZE, 0), Err(InflightError::Version { .. })));
    write(&kept, FEATURES, &[0]);
    write(&kept, VERSION_AT, &[2]);
    assert!(matches!(queue(&kept).attach(SIZE, 0), Err(InflightError::Version { .. })));
    write(&kept, VERSION_AT, &[1]);
    write(&kept, LAST_BATCH_HEAD, &[0xff, 0xff]);
    assert!(matches!(queue(&kept).attach(SIZE, 1), Err(InflightError::BadHead { head: 0xffff, .. })));
}

#[test]
fn areas_that_cannot_be_mapped_are_refused() {
    for (num_queues, queue_size) in [(0, 16), (3, 16), (1, 0), (1, 32769)] {
        assert!(InflightArea::create(wanted(num_queues, queue_size), 2, 0).is_err());
    }
    let (good, fd) = kept();
    let map = |given: Inflight, fd: &dyn AsFd| {
        let area = InflightArea::map(given, fd.as_fd().try_clone_to_owned().unwrap(), 2);
        area.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(map(good, &fd), Ok(()));
    for bad in [
        Inflight { mmap_size: 639, ..good },
        Inflight { mmap_offset: 8, ..good },
        Inflight { mmap_offset: 4096, ..good },
        Inflight { mmap_offset: u64::MAX - 4095, ..good },
        Inflight { queue_size: 128, ..good },
        Inflight { queue_size: 128, mmap_size: u64::MAX, ..good },
        Inflight { num_queues: 3, ..good },
        Inflight { num_queues: 0, ..good },
    ] {
        assert!(map(bad, &fd).is_err(), "{bad:?}");
    }
    let unsealed = memfd(640);
    assert!(map(good, &unsealed).unwrap_err().contains("sealed"));
    assert!(map(good, &tempfile::tempfile().unwrap()).unwrap_err().contains("sealed"));
    assert!(map(good, &rustix::pipe::pipe().unwrap().0).unwrap_err().contains("sealed"));
}

fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

proptest! {
    #[test]
    fn no_region_is_trusted(
        bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(2), any::<u8>()], stride(SIZE)),
        plausible: bool, used_idx: u16, size in 0u32..6, heads in prop::collection::vec(0..SIZE, 0..40),
    ) {
        let kept = kept();
        let mut bytes = bytes;
        if plausible {
            bytes[..12].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, SIZE as u8, 0]);
        }
        write(&kept, 0, &bytes);
        let mut queue = queue(&kept);
        let size = 1 << size;
        if let Ok(found) = queue.attach(size, used_idx) {
            if let Found::Used(found) = found {
                let mut unique = found.clone();
                unique.sort_unstable();
                unique.dedup();
                prop_assert_eq!(unique.len(), found.len());
                prop_assert!(found.iter().all(|head| *head < size));
            }
            for (n, head) in heads.into_iter().filter(|head| *head < size).enumerate() {
                queue.fetched(head).unwrap();
                queue.before_used(head).unwrap();
                queue.after_used(head, used_idx.wrapping_add(n as u16 + 1)).unwrap();
            }
        }
    }
}

#[test]
fn what_a_device_keeps_is_behind_what_the_frontend_was_told_of() {
    let (made, fd) = InflightArea::create(wanted(2, SIZE), 2, 100).unwrap();
    let found = Kept::find(made, &fd, 100).unwrap();
    assert!(found.offset >= made.mmap_size && found.offset.is_multiple_of(Kept::PAGE));
    assert!(Kept::find(made, &fd, 101).is_none() && Kept::find(made, &fd, 0).is_none());
    let far = Inflight { mmap_offset: u64::MAX - 5, ..made };
    assert!(Kept::find(far, &fd, 100).is_none());
    let (made, fd) = kept();
    assert!(Kept::find(made, &fd, 100).is_none(), "another backend's");
}
