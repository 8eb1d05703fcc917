//! cleave-block as a driver sees it: what is asked is done, in every shape the virtio specification allows.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;

use cleave_common::vhost_user::features::virtio;
use cleave_tests::driver::{BlockDriver, Buffer, Frontend, IoStatus, PATIENCE, RequestKind};
use common::{MIB, disk, pattern, start};

const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;

#[test]
fn what_is_written_is_read_and_is_on_the_disk() {
    let image = disk(8 * MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    for (sector, len) in [(0, 512), (1, 4096), (77, 64 << 10), (8 * MIB / 512 - 2048, 1 << 20)] {
        let bytes = pattern(sector, len);
        assert_eq!(driver.write(sector, &bytes).unwrap(), IoStatus::Ok);
        assert_eq!(driver.read(sector, len as u32).unwrap(), (IoStatus::Ok, bytes.clone()));
        let mut on_disk = vec![0; len];
        assert_eq!(driver.flush().unwrap(), IoStatus::Ok);
        fs::File::open(image.path()).unwrap().read_exact_at(&mut on_disk, sector * 512).unwrap();
        assert!(on_disk == bytes, "sector {sector}");
    }
}

#[test]
fn every_way_to_cut_a_request_into_buffers() {
    for (features, cache) in [
        (u64::MAX, "none"),
        (u64::MAX, "writeback"),
        (!virtio::RING_INDIRECT_DESC, "none"),
        (!virtio::RING_EVENT_IDX, "none"),
        (!(virtio::RING_EVENT_IDX | virtio::RING_INDIRECT_DESC), "writethrough"),
    ] {
        let image = disk(MIB);
        let daemon = start(&image, &["--cache", cache]);
        let frontend = Frontend::connect(&daemon.socket).unwrap();
        let mut driver = BlockDriver::start(frontend, features, 1, 128).unwrap();
        // Misaligned for O_DIRECT in address and in length, across many pages, and not in order of addresses.
        let cuts: [&[u32]; 5] =
            [&[8192], &[512, 512, 7168], &[1, 511, 3, 7677], &[4096, 100, 3996], &[2; 64]];
        for (round, cut) in cuts.into_iter().enumerate() {
            for shift in [0, 1, 8, 512] {
                check_cut(&mut driver, round as u64 * 16, cut, shift);
            }
        }
    }
}

fn check_cut(driver: &mut BlockDriver, sector: u64, cut: &[u32], shift: u64) {
    let len: u32 = cut.iter().sum();
    let (whole, rest) = (len / 512 * 512, len % 512);
    let data = driver.data;
    // The last buffer comes first in memory.
    let mut at = data + shift + 16384;
    let mut buffers: Vec<Buffer> = Vec::new();
    for part in cut {
        at -= u64::from(*part);
        buffers.push(Buffer::to_read(at, *part));
    }
    let bytes = pattern(sector + shift, len as usize);
    let mut from = 0;
    for buffer in &buffers {
        driver.ram.write(buffer.addr, &bytes[from..from + buffer.len as usize]).unwrap();
        from += buffer.len as usize;
    }
    let (status, written) = driver.request(RequestKind::Out, sector, &buffers).unwrap();
    if rest != 0 {
        assert_eq!((status, written), (IoStatus::IoErr, 1), "{cut:?} is no whole number of sectors");
        return;
    }
    assert_eq!((status, written), (IoStatus::Ok, 1), "{cut:?} shifted by {shift}");
    assert_eq!(driver.read(sector, whole).unwrap().1, bytes, "{cut:?} shifted by {shift}");

    for buffer in &mut buffers {
        buffer.device_writes = true;
        driver.ram.write(buffer.addr, &vec![0; buffer.len as usize]).unwrap();
    }
    assert_eq!(driver.request(RequestKind::In, sector, &buffers).unwrap(), (IoStatus::Ok, len + 1));
    let mut read = Vec::new();
    for buffer in &buffers {
        read.extend(driver.ram.read(buffer.addr, buffer.len as usize).unwrap());
    }
    assert!(read == bytes, "{cut:?} shifted by {shift}");
}

#[test]
fn header_data_and_status_may_share_buffers() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let bytes = pattern(5, 1024);
    assert_eq!(driver.write(4, &bytes).unwrap(), IoStatus::Ok);
    let at = driver.data;
    // A read of sector 4, its header in two pieces, its status behind the data.
    driver.ram.write(at, &[0; 8]).unwrap();
    driver.ram.write(at + 100, &4u64.to_le_bytes()).unwrap();
    let buffers = [Buffer::to_read(at, 8), Buffer::to_read(at + 100, 8), Buffer::to_write(at + 4096, 1025)];
    let BlockDriver { queues, ram, .. } = &mut driver;
    queues[0].add(ram, &buffers).unwrap().unwrap();
    queues[0].kick(ram).unwrap();
    assert_eq!(driver.completion(0).unwrap().1, 1025);
    assert_eq!(driver.ram.read(at + 4096, 1024).unwrap(), bytes);
    assert_eq!(driver.ram.read(at + 4096 + 1024, 1).unwrap(), [0]);
}

#[test]
fn memory_above_the_hole_is_reached_too() {
    let image = disk(MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let bytes = pattern(9, 4096);
    let high = driver.ram.high() + 0x10000;
    driver.ram.write(high, &bytes).unwrap();
    assert_eq!(driver.request(RequestKind::Out, 8, &[Buffer::to_read(high, 4096)]).unwrap().0, IoStatus::Ok);
    assert_eq!(driver.read(8, 4096).unwrap().1, bytes);
}

#[test]
fn config_space_describes_the_disk() {
    let image = disk(3 * MIB);
    let daemon = start(&image, &["--num-queues", "3"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 3).unwrap();
    let config = driver.config().unwrap();
    assert_eq!((config.sectors, config.seg_max, config.num_queues), (6144, 126, 3));
    assert_eq!((config.blk_size, config.writeback), (512, true));
    assert_eq!(driver.negotiated.num_queues, 3);
    // Past its end config space reads as zeros; a read that starts nowhere near it is refused.
    assert_eq!(driver.frontend.config(60, 196).unwrap(), [0; 196]);
    assert!(driver.frontend.config(4000, 200).is_err());
}

#[test]
fn the_serial_number_is_what_was_given() {
    let image = disk(MIB);
    let daemon = start(&image, &["--serial", "0123456789abcdefghij"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let data = driver.data;
    driver.ram.write(data, &[0xff; 32]).unwrap();
    let (status, _) = driver.request(RequestKind::GetId, 0, &[Buffer::to_write(data, 20)]).unwrap();
    assert_eq!(status, IoStatus::Ok);
    assert_eq!(driver.ram.read(data, 21).unwrap(), b"0123456789abcdefghij\xff");
}

#[test]
fn what_no_device_knows_is_unsupported() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.request(RequestKind::Unknown, 0, &[]).unwrap(), (IoStatus::Unsupported, 1));
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

#[test]
fn a_readonly_disk_is_never_written() {
    let image = disk(MIB);
    let before = fs::read(image.path()).unwrap();
    let daemon = start(&image, &["--read-only"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_ne!(driver.negotiated.offered & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    assert_eq!(driver.negotiated.offered & (FLUSH | CONFIG_WCE), 0);
    assert_eq!(driver.write(0, &pattern(1, 512)).unwrap(), IoStatus::IoErr);
    assert_eq!(driver.read(0, 512).unwrap(), (IoStatus::Ok, before[..512].to_vec()));
    assert_eq!(driver.flush().unwrap(), IoStatus::Ok);
    drop(daemon);
    assert!(fs::read(image.path()).unwrap() == before);
}

#[test]
fn the_disks_end_is_its_end() {
    let image = disk(MIB);
    let sectors = MIB / 512;
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.read(sectors - 1, 512).unwrap().0, IoStatus::Ok);
    for (sector, len) in
        [(sectors - 1, 1024), (sectors, 512), (u64::MAX, 512), (u64::MAX / 512, 4096), (1 << 55, 512)]
    {
        assert_eq!(driver.read(sector, len).unwrap().0, IoStatus::IoErr, "read at {sector}");
        assert_eq!(
            driver.write(sector, &vec![1; len as usize]).unwrap(),
            IoStatus::IoErr,
            "write at {sector}"
        );
    }
    assert_eq!(driver.read(0, 100).unwrap().0, IoStatus::IoErr, "no whole sector");
    assert_eq!(fs::metadata(image.path()).unwrap().len(), MIB);
}

#[test]
fn a_file_cut_off_under_us_is_an_error_not_an_end() {
    let image = disk(MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    image.as_file().set_len(MIB / 2).unwrap();
    assert_eq!(driver.read(MIB / 512 - 8, 4096).unwrap().0, IoStatus::IoErr);
    assert_eq!(driver.read(0, 4096).unwrap().0, IoStatus::Ok);
}

#[test]
fn queues_work_side_by_side_and_full() {
    let image = disk(16 * MIB);
    let daemon = start(&image, &["--cache", "none", "--num-queues", "4"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 4).unwrap();
    const DEPTH: u64 = 100;
    let areas: Vec<u64> = (0..4).map(|_| driver.ram.allocate(DEPTH * 4096, 4096)).collect();
    for kind in [RequestKind::Out, RequestKind::In] {
        for (queue, area) in areas.iter().enumerate() {
            for n in 0..DEPTH {
                let (sector, at) = ((queue as u64 * DEPTH + n) * 8, area + n * 4096);
                let bytes = if kind == RequestKind::Out { pattern(sector, 4096) } else { vec![0; 4096] };
                driver.ram.write(at, &bytes).unwrap();
                let buffer = Buffer { addr: at, len: 4096, device_writes: kind == RequestKind::In };
                driver.submit(queue, kind, sector, &[buffer]).unwrap().unwrap();
            }
        }
        (0..4).for_each(|queue| driver.kick(queue).unwrap());
        for queue in 0..4 {
            for _ in 0..DEPTH {
                let (head, _) = driver.completion(queue).unwrap();
                assert_eq!(driver.status(queue, head).unwrap(), IoStatus::Ok);
            }
        }
    }
    for (queue, area) in areas.iter().enumerate() {
        for n in 0..DEPTH {
            let sector = (queue as u64 * DEPTH + n) * 8;
            assert!(
                driver.ram.read(area + n * 4096, 4096).unwrap() == pattern(sector, 4096),
                "sector {sector}"
            );
        }
    }
}

#[test]
fn the_ring_goes_round_many_times() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    for features in [u64::MAX, !virtio::RING_EVENT_IDX] {
        let frontend = Frontend::connect(&daemon.socket).unwrap();
        let mut driver = BlockDriver::start(frontend, features, 1, 16).unwrap();
        // More than 2^16 completions: every index wraps.
        for round in 0..70_000 / 16 + 1 {
            let data = driver.data;
            for n in 0..16 {
                driver
                    .submit(0, RequestKind::GetId, 0, &[Buffer::to_write(data + n * 32, 20)])
                    .unwrap()
                    .unwrap();
                if features != u64::MAX && n >= 4 {
                    // Without indirect descriptors three of sixteen make a request.
                    break;
                }
            }
            driver.kick(0).unwrap();
            while driver.queues[0].in_flight() > 0 {
                let (head, _) = driver.completion(0).unwrap();
                assert_eq!(driver.status(0, head).unwrap(), IoStatus::Ok, "round {round}");
            }
        }
    }
}

#[test]
fn few_kicks_and_interrupts_are_needed_with_event_indices() {
    let image = disk(4 * MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let data = driver.ram.allocate(64 * 4096, 4096);
    // The driver asks to be told at its last completion only.
    let queue = &driver.queues[0];
    driver.ram.put(queue.available + 4 + 2 * u64::from(queue.size), 63u16).unwrap();
    for n in 0..64 {
        let buffer = Buffer::to_write(data + n * 4096, 4096);
        driver.submit(0, RequestKind::In, n * 8, &[buffer]).unwrap().unwrap();
    }
    driver.kick(0).unwrap();
    assert_eq!(driver.queues[0].kicks, 1);
    assert!(driver.queues[0].wait_for_call(PATIENCE).unwrap());
    for _ in 0..64 {
        assert!(driver.queues[0].pop_used(&driver.ram).unwrap().is_some());
    }
    assert_eq!(driver.queues[0].interrupts, 1);
}

#[test]
fn the_write_cache_is_what_the_guest_says() {
    let image = disk(MIB);
    let daemon = start(&image, &["--cache", "writeback"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    driver.frontend.set_config(32, &[0]).unwrap();
    assert!(!driver.config().unwrap().writeback);
    assert_eq!(driver.write(0, &pattern(1, 4096)).unwrap(), IoStatus::Ok);
    driver.frontend.set_config(32, &[1]).unwrap();
    assert!(driver.config().unwrap().writeback);
    assert!(driver.frontend.set_config(0, &[1]).is_err(), "the capacity is not writable");
    assert!(driver.frontend.set_config(32, &[2]).is_err());
    drop(daemon);

    let daemon = start(&image, &["--cache", "writethrough"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert!(!driver.config().unwrap().writeback);
    assert_eq!(driver.write(0, &pattern(1, 4096)).unwrap(), IoStatus::Ok);
    // A guest that has not acknowledged the switch cannot use it.
    drop(driver);
    let frontend = Frontend::connect(&daemon.socket).unwrap();
    let mut driver = BlockDriver::start(frontend, !CONFIG_WCE, 1, 64).unwrap();
    assert!(driver.frontend.set_config(32, &[1]).is_err());
}
