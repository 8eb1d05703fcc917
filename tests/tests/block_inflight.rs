//! cleave-block dies with requests in flight, and a successor finishes them: each once, in the order of their fetching.

mod common;

use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use cleave_common::vhost_user::Inflight;
use cleave_tests::driver::{BlockDriver, Buffer, Frontend, InflightRegion, IoStatus, RequestKind};
use common::{MIB, disk, pattern, refused, start};
use proptest::prelude::*;

const SIZE: u16 = 64;
const BLOCK: u64 = 4096;

fn driver(daemon: &cleave_tests::driver::Daemon, num_queues: u16) -> BlockDriver {
    BlockDriver::start(Frontend::connect(&daemon.socket).unwrap(), u64::MAX, num_queues, SIZE).unwrap()
}

/// Requests that the device answers at once, in the order in which it looks at them.
fn submit_ids(driver: &mut BlockDriver, count: usize) -> Vec<u16> {
    let data = driver.ram.allocate(32 * count as u64, 64);
    let buffer = |n: usize| [Buffer::to_write(data + 32 * n as u64, 20)];
    (0..count).map(|n| driver.submit(0, RequestKind::GetId, 0, &buffer(n)).unwrap().unwrap()).collect()
}

fn completed(driver: &mut BlockDriver, count: usize) -> Vec<u16> {
    (0..count)
        .map(|_| {
            let (head, _) = driver.completion(0).unwrap();
            assert_eq!(driver.status(0, head).unwrap(), IoStatus::Ok);
            head
        })
        .collect()
}

fn nothing_more(driver: &mut BlockDriver) {
    driver.frontend.stop_queue(0).unwrap();
    assert_eq!(driver.queues[0].pop_used(&driver.ram).unwrap(), None);
    assert_eq!(driver.queues[0].in_flight(), 0);
}

#[test]
fn what_was_in_flight_comes_first_in_its_first_order() {
    let image = disk(MIB);
    let mut daemon = start(&image, &[]);
    let mut driver = driver(&daemon, 1);
    let region = driver.track_inflight().unwrap();
    submit_ids(&mut driver, 3);
    driver.queues[0].kick_now().unwrap();
    completed(&mut driver, 3);
    assert_eq!(region.marked(0).unwrap(), [0u16; 0]);

    // As if it had been killed after it had fetched five of eight, and used one that it no longer shows as in flight.
    let heads = submit_ids(&mut driver, 8);
    daemon.signal(rustix::process::Signal::KILL).unwrap();
    daemon.wait().unwrap();
    let order = [3, 1, 4, 0, 2];
    for (counter, n) in order.into_iter().enumerate() {
        region.mark(0, heads[n], 1000 + counter as u64).unwrap();
    }
    daemon.kill_and_restart().unwrap();
    driver.resume(&daemon.socket, Some(&region)).unwrap();
    let expected: Vec<u16> = order.into_iter().chain(5..8).map(|n| heads[n]).collect();
    assert_eq!(completed(&mut driver, 8), expected);
    assert_eq!(region.marked(0).unwrap(), [0u16; 0]);
    nothing_more(&mut driver);
}

#[test]
fn a_fresh_region_under_a_ring_in_use_loses_no_request() {
    let image = disk(MIB);
    let mut daemon = start(&image, &[]);
    let mut driver = driver(&daemon, 1);
    for _ in 0..10 {
        assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    }
    let region = driver.track_inflight().unwrap();
    assert_eq!(region.read(region.queue(0) + 8, 8).unwrap(), [1, 0, SIZE as u8, 0, 0, 0, 10, 0]);
    daemon.kill_and_restart().unwrap();
    // Descriptor 0 is where an empty batch list points.
    let head = submit_ids(&mut driver, 1)[0];
    assert_eq!(head, 0);
    region.mark(0, head, 0).unwrap();
    driver.resume(&daemon.socket, Some(&region)).unwrap();
    assert_eq!(completed(&mut driver, 1), [head]);
    nothing_more(&mut driver);
}

#[test]
fn killed_at_any_moment_nothing_is_lost_or_done_twice() {
    let image = disk(8 * MIB);
    let mut daemon = start(&image, &["--cache", "none", "--num-queues", "2"]);
    let mut driver = driver(&daemon, 2);
    let region = driver.track_inflight().unwrap();
    let count = u64::from(SIZE);
    let data = driver.ram.allocate(2 * count * BLOCK, BLOCK);
    let (mut again, mut rounds) = (0, 0);
    while rounds < 30 {
        for n in 0..2 * count {
            driver.ram.write(data + n * BLOCK, &pattern(rounds * 1000 + n, BLOCK as usize)).unwrap();
            let buffer = Buffer::to_read(data + n * BLOCK, BLOCK as u32);
            let queue = (n / count) as usize;
            driver.submit(queue, RequestKind::Out, n * 8, &[buffer]).unwrap().unwrap();
        }
        for queue in 0..2 {
            driver.queues[queue].kick_now().unwrap();
        }
        // From before it has fetched anything until after it has done everything.
        thread::sleep(Duration::from_micros(rounds * 50));
        daemon.kill_and_restart().unwrap();
        again += region.marked(0).unwrap().len() + region.marked(1).unwrap().len();
        driver.resume(&daemon.socket, Some(&region)).unwrap();
        for queue in 0..2 {
            // A head that comes twice is one that the driver does not know.
            while driver.queues[queue].in_flight() > 0 {
                let (head, _) = driver.completion(queue).unwrap();
                assert_eq!(driver.status(queue, head).unwrap(), IoStatus::Ok);
            }
            assert_eq!(driver.frontend.stop_queue(queue as u16).unwrap(), driver.queues[queue].avail_idx());
            assert_eq!(driver.queues[queue].pop_used(&driver.ram).unwrap(), None);
            assert_eq!(region.marked(queue as u16).unwrap(), [0u16; 0]);
            let base = driver.queues[queue].used_idx();
            driver.frontend.start_queue(queue as u16, &driver.queues[queue], base).unwrap();
        }
        for n in 0..2 * count {
            let (status, bytes) = driver.read(n * 8, BLOCK as u32).unwrap();
            assert!(
                status == IoStatus::Ok && bytes == pattern(rounds * 1000 + n, BLOCK as usize),
                "block {n}"
            );
        }
        rounds += 1;
    }
    assert!(again > 0, "it was never killed with a request in flight");
}

#[test]
fn a_pause_keeps_the_region_and_a_reset_drops_it() {
    use cleave_common::vhost_user::FrontendRequest as Request;
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = driver(&daemon, 1);
    let region = driver.track_inflight().unwrap();
    let used_idx = |region: &InflightRegion| region.read(region.queue(0) + 14, 2).unwrap()[0];
    // A new table pauses the ring.
    for round in 1..4 {
        driver.frontend.set_mem_table(&driver.ram).unwrap();
        assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
        assert_eq!(used_idx(&region), round);
    }
    driver.frontend.tell(Request::ResetDevice, &(), &[]).unwrap();
    driver.queues[0].reset(&driver.ram).unwrap();
    driver.frontend.start_queue(0, &driver.queues[0], 0).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    assert_eq!(used_idx(&region), 3, "a region from before the reset");
}

#[test]
fn a_region_that_does_not_fit_is_refused() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = driver(&daemon, 1);
    let region = driver.frontend.get_inflight(1, SIZE).unwrap();
    refused(driver.frontend.set_inflight(&region));
    driver.frontend.stop_queue(0).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let unsealed = rustix::fs::memfd_create("r", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&unsealed, MIB).unwrap();
    let good = region.description;
    for description in [
        Inflight { num_queues: 2, ..good },
        Inflight { num_queues: 0, ..good },
        Inflight { queue_size: 0, ..good },
        Inflight { queue_size: 128, ..good },
        Inflight { queue_size: 128, mmap_size: MIB, ..good },
        Inflight { mmap_size: 1, ..good },
        Inflight { mmap_offset: 1, ..good },
        Inflight { mmap_offset: 1 << 40, ..good },
    ] {
        let fd = region.fd.try_clone().unwrap();
        refused(driver.frontend.set_inflight(&InflightRegion { description, fd }));
    }
    for fd in [pipe.as_fd(), unsealed.as_fd(), image.as_file().as_fd()] {
        let fd = fd.try_clone_to_owned().unwrap();
        refused(driver.frontend.set_inflight(&InflightRegion { description: good, fd }));
    }
    // One that another ring has left behind is refused when the ring is to start.
    region.write(8, &[1, 0, SIZE as u8, 0, 0, 0, 0xff, 0x7f]).unwrap();
    region.mark(0, 3, 0).unwrap();
    driver.frontend.set_inflight(&region).unwrap();
    refused(driver.frontend.start_queue(0, &driver.queues[0], 0));
    daemon.wait_for_log("needs a fresh region").unwrap();
    let fresh = driver.frontend.get_inflight(1, SIZE).unwrap();
    driver.frontend.set_inflight(&fresh).unwrap();
    driver.frontend.start_queue(0, &driver.queues[0], 0).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

#[test]
fn no_region_ends_the_daemon() {
    let image = disk(MIB);
    let daemon = start(&image, &["--read-only"]);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) };
    let byte = prop_oneof![4 => Just(0u8), 2 => Just(1), 1 => any::<u8>()];
    let bytes = prop::collection::vec(byte, 16 + 16 * usize::from(SIZE));
    proptest!(config, |(bytes in bytes, version in 0u8..3, used_idx in 0u8..80)| {
        let mut driver = driver(&daemon, 1);
        driver.frontend.stop_queue(0).unwrap();
        let region = driver.frontend.get_inflight(1, SIZE).unwrap();
        region.write(0, &bytes).unwrap();
        region.write(0, &[0, 0, 0, 0, 0, 0, 0, 0, version, 0, SIZE as u8, 0]).unwrap();
        region.write(14, &[used_idx.wrapping_neg(), if used_idx == 0 { 0 } else { 0xff }]).unwrap();
        driver.frontend.set_inflight(&region).unwrap();
        if driver.frontend.start_queue(0, &driver.queues[0], 0).is_ok() {
            submit_ids(&mut driver, 4);
            driver.queues[0].kick_now().unwrap();
            // It answers, whatever it made of the region; and it may write to it while it serves.
            region.write(0, &bytes).unwrap();
            driver.frontend.stop_queue(0).unwrap();
        }
    });
    let mut driver = driver(&daemon, 1);
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}
