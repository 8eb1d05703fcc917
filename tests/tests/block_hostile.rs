//! What a hostile guest writes into its rings: each request fails or each queue, never the daemon, and the next
//! frontend is served as ever.

mod common;

use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use cleave_common::vhost_user::{FrontendRequest as Request, VringFd};
use cleave_tests::driver::{
    BlockDriver, Buffer, Daemon, Flags, Frontend, IoStatus, PATIENCE, RequestKind, SplitQueue,
};
use common::{MIB, disk, pattern, start};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use tempfile::NamedTempFile;

const SIZE: u16 = 64;

/// A driver whose descriptors the test writes itself.
fn direct(image: &NamedTempFile) -> (Daemon, BlockDriver) {
    let daemon = start(image, &["--cache", "none"]);
    let frontend = Frontend::connect(&daemon.socket).unwrap();
    let driver = BlockDriver::start(frontend, u64::MAX, 1, SIZE).unwrap();
    (daemon, driver)
}

/// A header at the data area, for `kind` at `sector`; the status is to be at `data + 32`.
fn header(driver: &BlockDriver, kind: RequestKind, sector: u64) -> u64 {
    let mut bytes = [0; 33];
    bytes[0..4].copy_from_slice(&(kind as u32).to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    bytes[32] = 0xaa;
    driver.ram.write(driver.data, &bytes).unwrap();
    driver.data
}

struct Descriptor(u64, u32, u16, u16);

/// Makes descriptor 0 available with these behind it, and gives the bytes that the device says it wrote.
fn submit_raw(driver: &mut BlockDriver, table: &[Descriptor]) -> u32 {
    let BlockDriver { queues, ram, .. } = driver;
    let queue = &mut queues[0];
    for (index, Descriptor(addr, len, flags, next)) in table.iter().enumerate() {
        queue.set_descriptor(ram, index as u16, *addr, *len, *flags, *next).unwrap();
    }
    queue.expect_raw(0);
    queue.make_available(ram, 0).unwrap();
    queue.kick_now().unwrap();
    driver.completion(0).unwrap().1
}

fn works(driver: &mut BlockDriver) {
    assert_eq!(driver.read(0, 4096).unwrap(), (IoStatus::Ok, pattern(0, MIB as usize)[..4096].to_vec()));
}

#[test]
fn chains_that_are_none_are_given_back_and_the_queue_goes_on() {
    let image = disk(MIB);
    let (daemon, mut driver) = direct(&image);
    let head = header(&driver, RequestKind::In, 0);
    let (status, table, far) = (head + 32, head + 8192, driver.ram.hole());
    const N: u16 = Flags::NEXT;
    const W: u16 = Flags::WRITE;
    const I: u16 = Flags::INDIRECT;
    // An indirect table that leads to itself.
    let nested = u128::from(table) | 16 << 64 | u128::from(I) << 96;
    driver.ram.put(table, nested).unwrap();
    let cases: [&[Descriptor]; 16] = [
        &[Descriptor(head, 16, N, 0)],
        &[Descriptor(head, 16, N, 1), Descriptor(head, 16, N, 0)],
        &[Descriptor(head, 16, N, SIZE)],
        &[Descriptor(head, 16, N, 65535)],
        &[Descriptor(head, 16, N, 1), Descriptor(head + 64, 512, W | N, 2), Descriptor(head, 16, 0, 0)],
        &[Descriptor(table, 16, I, 0)],
        &[Descriptor(table, 0, I, 0)],
        &[Descriptor(table, 24, I, 0)],
        &[Descriptor(table, !15, I, 0)],
        &[Descriptor(far, 64, I, 0)],
        &[Descriptor(u64::MAX - 15, 64, I, 0)],
        &[Descriptor(table, 16, I | N, 1)],
        // No status, no header, a header that is too short, a status outside of memory.
        &[Descriptor(head, 16, 0, 0)],
        &[Descriptor(status, 1, W, 0)],
        &[Descriptor(head, 15, N, 1), Descriptor(status, 1, W, 0)],
        &[Descriptor(head, 16, N, 1), Descriptor(far, 1, W, 0)],
    ];
    for (number, case) in cases.iter().enumerate() {
        driver.ram.write(status, &[0xaa]).unwrap();
        assert_eq!(submit_raw(&mut driver, case), 0, "case {number}");
        assert_eq!(driver.ram.read(status, 1).unwrap(), [0xaa], "case {number}: nobody wrote a status");
        works(&mut driver);
        header(&driver, RequestKind::In, 0);
    }
    assert!(daemon.log().contains("which are not shown"), "complaints are bounded");
}

#[test]
fn buffers_outside_of_memory_are_io_errors() {
    let image = disk(MIB);
    let (_daemon, mut driver) = direct(&image);
    let end = driver.ram.hole();
    for (addr, len) in [
        (end, 512),
        (end - 512, 1024),
        (driver.ram.high() - 512, 512),
        (driver.ram.high() - 256, 512),
        (u64::MAX - 511, 512),
        (u64::MAX, 512),
        (1 << 63, 4096),
        (0, !511),
    ] {
        for (kind, buffer) in
            [(RequestKind::In, Buffer::to_write(addr, len)), (RequestKind::Out, Buffer::to_read(addr, len))]
        {
            let (status, _) = driver.request(kind, 0, &[buffer]).unwrap();
            assert_eq!(status, IoStatus::IoErr, "{kind:?} {addr:#x} {len:#x}");
        }
        works(&mut driver);
    }
    let id = [Buffer::to_write(end - 10, 20)];
    assert_eq!(driver.request(RequestKind::GetId, 0, &id).unwrap().0, IoStatus::IoErr);
    // Longer than 4 GiB in all.
    let buffers = vec![Buffer::to_write(0, u32::MAX); 3];
    let head = driver.submit(0, RequestKind::In, 0, &buffers).unwrap().unwrap();
    driver.kick(0).unwrap();
    assert_eq!(driver.completion(0).unwrap(), (head, 0));
    works(&mut driver);
}

#[test]
fn a_chain_longer_than_any_request_is_refused() {
    let image = disk(MIB);
    let (_daemon, mut driver) = direct(&image);
    let table = driver.ram.allocate(65536 * 16, 4096);
    let zero = driver.ram.allocate(4096, 4096);
    for n in 0..65535u64 {
        let raw =
            u128::from(zero) | 1 << 64 | u128::from(Flags::NEXT) << 96 | u128::from(n as u16 + 1) << 112;
        driver.ram.put(table + 16 * n, raw).unwrap();
    }
    assert_eq!(submit_raw(&mut driver, &[Descriptor(table, 65535 * 16, Flags::INDIRECT, 0)]), 0);
    works(&mut driver);
}

/// A ring broken by `break_it` stops for good, says so, and works again once it is set up again.
fn breaks(break_it: impl Fn(&mut BlockDriver)) {
    let image = disk(MIB);
    let (daemon, mut driver) = direct(&image);
    let err = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    works(&mut driver);
    // The ring runs already.
    let which = VringFd { index: 0, no_fd: false };
    driver.frontend.tell(Request::SetVringErr, &which, &[err.as_fd()]).unwrap();

    break_it(&mut driver);
    driver.queues[0].kick_now().unwrap();
    daemon.wait_for_log("is broken until it is set up again").unwrap();
    driver.queues[0].kick_now().unwrap();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(daemon.log().matches("is broken").count(), 1);
    assert_eq!(rustix::io::read(&err, &mut [0; 8]), Ok(8), "the frontend is told");

    // The session goes on, and so does the ring after a reset.
    driver.frontend.stop_queue(0).unwrap();
    driver.queues[0].reset(&driver.ram).unwrap();
    driver.frontend.start_queue(0, &driver.queues[0], 0).unwrap();
    works(&mut driver);
}

#[test]
fn an_index_that_jumps_breaks_the_ring() {
    breaks(|driver| {
        let idx = driver.queues[0].avail_idx().wrapping_add(SIZE + 1);
        driver.queues[0].set_avail_idx(&driver.ram, idx).unwrap();
    });
}

#[test]
fn an_index_that_goes_back_breaks_the_ring() {
    breaks(|driver| driver.queues[0].set_avail_idx(&driver.ram, 0).unwrap());
}

#[test]
fn a_head_that_is_no_descriptor_breaks_the_ring() {
    breaks(|driver| driver.queues[0].make_available(&driver.ram, SIZE).unwrap());
}

#[test]
fn one_head_twice_at_once_is_served_once() {
    let image = disk(MIB);
    let (_daemon, mut driver) = direct(&image);
    for _ in 0..50 {
        let buffer = Buffer::to_write(driver.data, 4096);
        let head = driver.submit(0, RequestKind::In, 0, &[buffer]).unwrap().unwrap();
        for _ in 0..3 {
            driver.queues[0].make_available(&driver.ram, head).unwrap();
        }
        driver.kick(0).unwrap();
        driver.queues[0].wait(&driver.ram, PATIENCE).unwrap();
        // Stop, so that nothing is on its way, and start over.
        driver.frontend.stop_queue(0).unwrap();
        driver.queues[0].reset(&driver.ram).unwrap();
        driver.frontend.start_queue(0, &driver.queues[0], 0).unwrap();
    }
    works(&mut driver);
}

#[test]
fn memory_that_goes_away_under_requests_is_an_error_of_theirs() {
    let image = disk(MIB);
    let (daemon, mut driver) = direct(&image);
    // Memory that the frontend cuts off: the kernel cannot reach it, and neither can we.
    let extra = rustix::fs::memfd_create("extra", rustix::fs::MemfdFlags::empty()).unwrap();
    rustix::fs::ftruncate(&extra, MIB).unwrap();
    let addr = 0x2_0000_0000;
    let region = cleave_common::vhost_user::MemoryRegion {
        guest_addr: addr,
        size: MIB,
        user_addr: cleave_tests::driver::USER_BASE + addr,
        mmap_offset: 0,
    };
    driver.frontend.add_mem_reg(cleave_common::vhost_user::SingleRegion(region), extra.as_fd()).unwrap();
    rustix::fs::ftruncate(&extra, 0).unwrap();
    for kind in [RequestKind::In, RequestKind::Out] {
        let buffer = Buffer { addr, len: 4096, device_writes: kind == RequestKind::In };
        assert_eq!(driver.request(kind, 0, &[buffer]).unwrap().0, IoStatus::IoErr);
    }
    works(&mut driver);
    drop(daemon);
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![4 => 0u64..0x20_0000, 1 => any::<u64>(), 1 => 0x1_0000_0000u64..0x1_0020_0000];
    let len = prop_oneof![4 => prop::sample::select(vec![0u32, 1, 16, 512, 1024, 4096]), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..4, 1 => 4u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next)
}

/// What it may have grown to: its own memory, the bounce buffers of two queues, and what an allocator keeps.
const MOST_MEMORY: u64 = 32 * MIB;

#[test]
fn no_ring_ends_the_daemon() {
    let image = disk(MIB);
    let daemon = start(&image, &["--cache", "none", "--read-only"]);
    any_rings(&daemon);
    works(&mut BlockDriver::connect(&daemon.socket, 1).unwrap());
}

/// The same on a disk that can be written, discarded and zeroed.
#[test]
fn no_ring_ends_a_daemon_that_writes() {
    let image = disk(MIB);
    let daemon = start(&image, &["--throttle", "iops-total=1000000"]);
    any_rings(&daemon);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.write(0, &pattern(0, 4096)).unwrap(), IoStatus::Ok);
    works(&mut driver);
    assert_eq!(image.as_file().metadata().unwrap().len(), MIB, "no request changes the size of a disk");
}

fn any_rings(daemon: &Daemon) {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) };
    let table = prop::collection::vec(descriptor(), usize::from(SIZE));
    let heads = prop::collection::vec(prop_oneof![20 => 0..SIZE, 1 => any::<u16>()], 1..200);
    proptest!(config, |(table in table, heads in heads, jump in prop_oneof![5 => Just(0u16), 1 => any::<u16>()])| {
        let frontend = Frontend::connect(&daemon.socket).unwrap();
        let mut driver = BlockDriver::start(frontend, u64::MAX, 1, SIZE).unwrap();
        let BlockDriver { queues, ram, frontend, .. } = &mut driver;
        let queue: &mut SplitQueue = &mut queues[0];
        for (index, (addr, len, flags, next)) in table.into_iter().enumerate() {
            queue.set_descriptor(ram, index as u16, addr, len, flags, next).unwrap();
        }
        // Headers that mean something are where many descriptors point.
        for at in (0..0x20_0000u64).step_by(4096) {
            ram.write(at + 0x10_0000, &[(at / 4096 % 14) as u8, 0, 0, 0, 0, 0, 0, 0, 1, 0]).unwrap();
        }
        for batch in heads.chunks(usize::from(SIZE) / 2) {
            for head in batch {
                queue.make_available(ram, *head).unwrap();
            }
            queue.kick_now().unwrap();
        }
        let idx = queue.avail_idx().wrapping_add(jump);
        queue.set_avail_idx(ram, idx).unwrap();
        queue.kick_now().unwrap();
        // It still answers, with everything it had fetched done.
        frontend.stop_queue(0).unwrap();
    });
    let memory = daemon.process().memory().unwrap();
    assert!(memory < MOST_MEMORY, "{} KiB", memory >> 10);
}
