//! The dirty log of cleave-block: what it writes to guest memory, by io_uring too, is in it, and nothing else.

mod common;

use std::os::fd::AsFd;

use cleave_common::vhost_user::{FrontendRequest as Request, LogBase};
use cleave_tests::driver::{BlockDriver, Buffer, DirtyLog, Frontend, IoStatus, RequestKind};
use common::{MIB, disk, start};
use rustix::event::{EventfdFlags, eventfd};

/// The first address behind all memory.
const END: u64 = (1 << 32) + (32 << 20);

fn page(addr: u64) -> u64 {
    addr & !4095
}

fn sorted(mut pages: Vec<u64>) -> Vec<u64> {
    pages.sort_unstable();
    pages.dedup();
    pages
}

/// A request, and the pages that were logged for it.
fn logged(
    driver: &mut BlockDriver,
    log: &DirtyLog,
    kind: RequestKind,
    buffers: &[Buffer],
) -> (u64, Vec<u64>) {
    let head = driver.submit(0, kind, 0, buffers).unwrap().unwrap();
    driver.kick(0).unwrap();
    driver.completion(0).unwrap();
    assert_eq!(driver.status(0, head).unwrap(), IoStatus::Ok);
    // The log is complete once the ring has stopped, and goes on with it.
    let base = driver.frontend.stop_queue(0).unwrap();
    let pages = log.take().unwrap();
    driver.frontend.start_queue(0, &driver.queues[0], base).unwrap();
    (driver.header_addr(0, head), pages)
}

#[test]
fn what_the_disk_writes_is_logged() {
    let image = disk(MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let data = driver.ram.allocate(32 * 4096, 4096);
    let high = driver.ram.high() + 8 * 4096;
    let log = DirtyLog::new(END).unwrap();
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    driver.frontend.tell(Request::SetLogFd, &(), &[event.as_fd()]).unwrap();
    driver.frontend.set_log_base(&log).unwrap();
    let read = [Buffer::to_write(data + 512, 8192), Buffer::to_write(high, 4096)];
    let write = [Buffer::to_read(data + 16 * 4096, 4096)];

    // There is a log, but nobody wants it.
    assert_eq!(logged(&mut driver, &log, RequestKind::In, &read).1, [0u64; 0]);

    // The data, and where the status is; the used ring where it was asked for.
    driver.set_logging(true, None).unwrap();
    let (header, pages) = logged(&mut driver, &log, RequestKind::In, &read);
    let expected = vec![page(header + 16), data, data + 4096, data + 8192, high];
    assert_eq!(pages, sorted(expected.clone()));
    assert_eq!(rustix::io::read(&event, &mut [0; 8]), Ok(8), "the frontend is told");
    let used = data + 24 * 4096;
    driver.set_logging(true, Some(used)).unwrap();
    // Restarting says anew where the used ring is; keep the flag.
    let head = driver.submit(0, RequestKind::In, 0, &read).unwrap().unwrap();
    driver.kick(0).unwrap();
    driver.completion(0).unwrap();
    let header = driver.header_addr(0, head);
    driver.frontend.stop_queue(0).unwrap();
    let pages = log.take().unwrap();
    let mut expected = vec![page(header + 16), data, data + 4096, data + 8192, high];
    expected.push(used);
    assert_eq!(pages, sorted(expected));
    let base = driver.queues[0].used_idx();
    driver.frontend.start_queue(0, &driver.queues[0], base).unwrap();

    // A write writes no more than its status.
    let (header, pages) = logged(&mut driver, &log, RequestKind::Out, &write);
    assert_eq!(pages, [page(header + 16)]);

    // Another log takes over while the ring runs, and the end of it all.
    let other = DirtyLog::new(END).unwrap();
    driver.frontend.set_log_base(&other).unwrap();
    let (header, pages) = logged(&mut driver, &other, RequestKind::Out, &write);
    assert_eq!(pages, [page(header + 16)]);
    assert_eq!(log.take().unwrap(), [0u64; 0]);
    driver.set_logging(false, None).unwrap();
    assert_eq!(logged(&mut driver, &other, RequestKind::In, &read).1, [0u64; 0]);
}

#[test]
fn a_log_that_is_too_short_or_no_log_harms_nobody() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let unsealed = rustix::fs::memfd_create("r", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&unsealed, MIB).unwrap();
    let good = DirtyLog::new(END).unwrap();
    let bad = [
        (good.base, pipe.as_fd()),
        (good.base, unsealed.as_fd()),
        (LogBase { size: good.base.size + 1, ..good.base }, good.fd.as_fd()),
        (LogBase { size: 0, ..good.base }, good.fd.as_fd()),
        (LogBase { offset: 8, size: 8 }, good.fd.as_fd()),
        (LogBase { offset: u64::MAX - 4095, ..good.base }, good.fd.as_fd()),
    ];
    for (base, fd) in bad {
        let mut frontend = Frontend::connect(&daemon.socket).unwrap();
        frontend.negotiate(u64::MAX).unwrap();
        let fd = fd.try_clone_to_owned().unwrap();
        assert!(frontend.set_log_base(&DirtyLog { base, fd }).is_err(), "{base:?}");
    }
    // One that does not cover what is written.
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let short = DirtyLog::new(4096 * 8).unwrap();
    driver.frontend.set_log_base(&short).unwrap();
    driver.set_logging(true, Some(u64::MAX - 1)).unwrap();
    assert_eq!(driver.read(0, 4096).unwrap().0, IoStatus::Ok);
}
