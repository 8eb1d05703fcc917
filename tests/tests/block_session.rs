//! cleave-block as a frontend sees it: sessions, and rings that start and stop.

mod common;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{FrontendRequest as Request, MemoryRegion, SingleRegion, VringFd};
use cleave_tests::driver::{BlockDriver, Buffer, Frontend, IoStatus, PATIENCE, RequestKind, USER_BASE};
use common::{MIB, disk, pattern, refused, start, state};
use rustix::event::{EventfdFlags, eventfd};

/// Long enough for a daemon that would do something to do it.
const A_WHILE: Duration = Duration::from_millis(50);

/// `count` reads of 4 KiB made available on queue 0, without a kick.
fn submit_reads(driver: &mut BlockDriver, count: u64) {
    let data = driver.ram.allocate(count * 4096, 4096);
    for n in 0..count {
        let buffer = Buffer::to_write(data + n * 4096, 4096);
        driver.submit(0, RequestKind::In, n * 8, &[buffer]).unwrap().unwrap();
    }
}

fn take_completions(driver: &mut BlockDriver, count: usize) {
    for _ in 0..count {
        let (head, _) = driver.completion(0).unwrap();
        assert_eq!(driver.status(0, head).unwrap(), IoStatus::Ok);
    }
}

#[test]
fn it_listens_again_and_the_disk_is_the_same() {
    let image = disk(MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.write(3, &pattern(3, 512)).unwrap(), IoStatus::Ok);
    for _ in 0..20 {
        driver.reconnect(&daemon.socket).unwrap();
        assert_eq!(driver.read(3, 512).unwrap(), (IoStatus::Ok, pattern(3, 512)));
    }
}

#[test]
fn a_second_frontend_is_refused_and_the_first_goes_on() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert!(Frontend::connect(&daemon.socket).unwrap().is_closed());
    daemon.wait_for_log("refused a second frontend").unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

#[test]
fn a_second_frontend_is_refused_under_one_that_never_rests() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    driver.frontend.reply_ack = false;
    let mut second = Frontend::connect(&daemon.socket).unwrap();
    let refused = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let until = Instant::now() + PATIENCE;
            while !refused.load(Ordering::Relaxed) && Instant::now() < until {
                driver.frontend.tell(Request::SetOwner, &(), &[]).unwrap();
            }
        });
        assert!(second.is_closed());
        assert!(daemon.log().contains("refused a second frontend"), "the first one goes on");
        refused.store(true, Ordering::Relaxed);
    });
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

#[test]
fn want_of_descriptors_ends_no_session() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let pid = rustix::process::Pid::from_raw(daemon.pid() as i32);
    let old = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let none = rustix::process::Rlimit { current: Some(3), ..old };
    let old = rustix::process::prlimit(pid, rustix::process::Resource::Nofile, none).unwrap();
    assert_eq!(old.current, old.maximum, "the daemon takes what it may have");
    let mut second = Frontend::connect(&daemon.socket).unwrap();
    daemon.wait_for_log("cannot accept a frontend now").unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    rustix::process::prlimit(pid, rustix::process::Resource::Nofile, old).unwrap();
    assert!(second.is_closed());
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

#[test]
fn stopping_a_ring_completes_what_was_fetched_and_nothing_after() {
    let image = disk(8 * MIB);
    let daemon = start(&image, &["--cache", "none"]);
    for _ in 0..20 {
        let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
        submit_reads(&mut driver, 100);
        driver.queues[0].kick_now().unwrap();
        let base = driver.frontend.stop_queue(0).unwrap();
        take_completions(&mut driver, base.into());
        thread::sleep(Duration::from_millis(1));
        assert!(driver.queues[0].pop_used(&driver.ram).unwrap().is_none(), "a stopped ring goes on");

        // Goes on where it stopped, on a ring that has been in use.
        driver.frontend.start_queue(0, &driver.queues[0], base).unwrap();
        driver.queues[0].kick_now().unwrap();
        take_completions(&mut driver, 100 - usize::from(base));
        assert_eq!(driver.frontend.stop_queue(0).unwrap(), 100);
        assert_eq!(driver.frontend.stop_queue(0).unwrap(), 100, "stopping twice is the same");
    }
}

#[test]
fn a_ring_starts_with_its_first_kick() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    submit_reads(&mut driver, 1);
    thread::sleep(A_WHILE);
    assert!(driver.queues[0].pop_used(&driver.ram).unwrap().is_none(), "nobody kicked");
    driver.queues[0].kick_now().unwrap();
    take_completions(&mut driver, 1);
}

#[test]
fn a_disabled_ring_waits_and_loses_no_kick() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    for _ in 0..3 {
        driver.frontend.tell(Request::SetVringEnable, &state(0, 0), &[]).unwrap();
        submit_reads(&mut driver, 2);
        driver.queues[0].kick_now().unwrap();
        thread::sleep(A_WHILE);
        assert!(driver.queues[0].pop_used(&driver.ram).unwrap().is_none(), "the ring is disabled");
        driver.frontend.tell(Request::SetVringEnable, &state(0, 1), &[]).unwrap();
        take_completions(&mut driver, 2);
    }
    // A kick from before the ring is enabled for the first time, which is all that will come.
    driver.frontend.stop_queue(0).unwrap();
    driver.frontend.tell(Request::SetVringEnable, &state(0, 0), &[]).unwrap();
    let base = driver.queues[0].avail_idx();
    driver.frontend.set_vring(0, &driver.queues[0], base).unwrap();
    submit_reads(&mut driver, 1);
    driver.queues[0].kick_now().unwrap();
    driver.frontend.tell(Request::SetVringEnable, &state(0, 1), &[]).unwrap();
    take_completions(&mut driver, 1);
}

#[test]
fn the_call_descriptor_may_change_while_the_ring_runs() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    // Without event indices each completion is an interrupt.
    let frontend = Frontend::connect(&daemon.socket).unwrap();
    let mut driver = BlockDriver::start(frontend, !virtio::RING_EVENT_IDX, 1, 64).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    let masked = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let which = VringFd { index: 0, no_fd: false };
    driver.frontend.tell(Request::SetVringCall, &which, &[masked.as_fd()]).unwrap();
    while driver.queues[0].wait_for_call(Duration::ZERO).unwrap() {}
    submit_reads(&mut driver, 1);
    driver.kick(0).unwrap();
    assert!(!driver.queues[0].wait_for_call(A_WHILE).unwrap(), "the old call descriptor is signalled");
    assert_eq!(rustix::io::read(&masked, &mut [0; 8]), Ok(8));
    take_completions(&mut driver, 1);

    // None at all: the driver polls.
    driver.frontend.tell(Request::SetVringCall, &VringFd { index: 0, no_fd: true }, &[]).unwrap();
    submit_reads(&mut driver, 1);
    driver.kick(0).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while driver.queues[0].pop_used(&driver.ram).unwrap().is_none() {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
}

#[test]
fn a_call_descriptor_that_would_block_is_not_waited_for() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    // Full: the next write to it blocks until somebody reads.
    let full = eventfd(0, EventfdFlags::empty()).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let which = VringFd { index: 0, no_fd: false };
    driver.frontend.tell(Request::SetVringCall, &which, &[full.as_fd()]).unwrap();
    submit_reads(&mut driver, 4);
    driver.queues[0].kick_now().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while driver.frontend.stop_queue(0).unwrap() != 4 {
        assert!(Instant::now() < deadline);
        driver.frontend.start_queue(0, &driver.queues[0], driver.queues[0].used_idx()).unwrap();
    }
}

#[test]
fn a_kick_descriptor_may_be_anything() {
    let image = disk(MIB);
    let mut daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let (pipe, writer) = rustix::pipe::pipe().unwrap();
    drop(writer);
    let (_ours, socket) = UnixStream::pair().unwrap();
    let memory = driver.ram.fd().try_clone_to_owned().unwrap();
    let which = VringFd { index: 0, no_fd: false };
    let null = std::fs::File::open("/dev/null").unwrap();
    for endless in [memory.as_fd(), null.as_fd()] {
        refused(driver.frontend.tell(Request::SetVringKick, &which, &[endless]));
    }
    for fd in [pipe.as_fd(), socket.as_fd()] {
        driver.frontend.tell(Request::SetVringKick, &which, &[fd]).unwrap();
        let before = daemon.process().cpu_time().unwrap();
        thread::sleep(A_WHILE);
        assert!(daemon.process().cpu_time().unwrap() - before < A_WHILE / 2, "the daemon spins");
    }
    let fd = driver.queues[0].kick_fd().try_clone_to_owned().unwrap();
    driver.frontend.tell(Request::SetVringKick, &which, &[fd.as_fd()]).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    assert!(daemon.is_running());
}

#[test]
fn memory_comes_and_goes_under_a_running_ring() {
    let image = disk(MIB);
    let daemon = start(&image, &["--cache", "none"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_ne!(driver.negotiated.protocol_features & protocol::CONFIGURE_MEM_SLOTS, 0);
    assert_eq!(driver.frontend.ask::<u64>(Request::GetMaxMemSlots, &()).unwrap(), 509);
    let extra = rustix::fs::memfd_create("extra", rustix::fs::MemfdFlags::empty()).unwrap();
    rustix::fs::ftruncate(&extra, MIB).unwrap();
    let addr = 0x2_0000_0000;
    let region = MemoryRegion { guest_addr: addr, size: MIB, user_addr: USER_BASE + addr, mmap_offset: 0 };
    for _ in 0..5 {
        assert_eq!(
            driver.request(RequestKind::In, 0, &[Buffer::to_write(addr, 4096)]).unwrap().0,
            IoStatus::IoErr
        );
        driver.frontend.add_mem_reg(SingleRegion(region), extra.as_fd()).unwrap();
        refused(driver.frontend.add_mem_reg(SingleRegion(region), extra.as_fd()));
        assert_eq!(
            driver.request(RequestKind::In, 0, &[Buffer::to_write(addr, 4096)]).unwrap().0,
            IoStatus::Ok
        );
        let mut got = vec![0; 4096];
        rustix::io::pread(&extra, &mut got, 0).unwrap();
        assert!(got == pattern(0, MIB as usize)[..4096]);
        driver.frontend.tell(Request::RemMemReg, &SingleRegion(region), &[]).unwrap();
        refused(driver.frontend.tell(Request::RemMemReg, &SingleRegion(region), &[]));
    }
    // The whole table again, with requests in flight.
    for _ in 0..20 {
        submit_reads(&mut driver, 10);
        driver.queues[0].kick_now().unwrap();
        driver.frontend.set_mem_table(&driver.ram).unwrap();
        take_completions(&mut driver, 10);
    }
}

#[test]
fn a_reset_device_starts_over() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
    driver.frontend.set_config(32, &[0]).unwrap();
    driver.frontend.tell(Request::ResetDevice, &(), &[]).unwrap();
    assert!(driver.config().unwrap().writeback, "the write cache is as it was at first");
    submit_reads(&mut driver, 1);
    driver.queues[0].kick_now().unwrap();
    thread::sleep(A_WHILE);
    assert!(driver.queues[0].pop_used(&driver.ram).unwrap().is_none(), "no ring runs after a reset");
    driver.queues[0].reset(&driver.ram).unwrap();
    driver.frontend.start_queue(0, &driver.queues[0], 0).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

#[test]
fn a_frontend_that_dies_at_any_point_leaves_the_daemon_serving() {
    let image = disk(8 * MIB);
    let daemon = start(&image, &["--cache", "none"]);
    for depth in [0, 1, 100] {
        let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
        submit_reads(&mut driver, depth);
        driver.queues[0].kick_now().unwrap();
    }
    // In the middle of a message.
    let stream = UnixStream::connect(&daemon.socket).unwrap();
    std::io::Write::write_all(&mut &stream, &[1, 0, 0, 0, 1]).unwrap();
    drop(stream);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}
