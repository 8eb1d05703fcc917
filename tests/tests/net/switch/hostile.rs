//! A port whose guest or frontend is hostile: the others go on.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use cleave_common::vhost_user::{FrontendRequest, MemoryRegion, MemoryTable};
use cleave_tests::driver::USER_BASE;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

const SIZE: u16 = 64;

#[test]
fn a_ring_that_breaks_is_left_alone_and_the_others_go_on() {
    let bridge = bridge(3, &[]);
    let [mut a, mut b, mut c] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
    meet((&mut a, 0), (&mut c, 2));
    for broken in 0..3 {
        let queue = &mut b.queues[0];
        match broken {
            0 => queue.set_avail_idx(&b.ram, queue.avail_idx().wrapping_add(257)).unwrap(),
            1 => queue.make_available(&b.ram, 256).unwrap(),
            // Small ones, so that both are fetched for one frame.
            _ => {
                let head = b.offer(0, &[64]).unwrap();
                (0..3).for_each(|_| b.queues[0].make_available(&b.ram, head).unwrap());
            }
        }
        for number in 0..300 {
            a.send(0, &PLAIN, &between(0, 1, number, 1000)).unwrap();
            passes(&mut a, &mut c, &between(0, 2, number, 1000));
        }
        bridge.daemon.wait_for_log("device{p1}: queue 0 is broken until it is set up again").unwrap();
        passes(&mut c, &mut a, &between(2, 0, 7, 100));
        b.reconnect(&bridge.sockets[1], u64::MAX).unwrap();
        b.offer_many(0, 100, 2048).unwrap();
        meet((&mut a, 0), (&mut b, 1));
        empty(&mut b);
    }
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![4 => 0u64..0x20_0000, 1 => any::<u64>(), 1 => 0x1_0000_0000u64..0x1_0020_0000];
    let len = prop_oneof![6 => prop::sample::select(vec![0u32, 1, 2, 12, 16, 60, 512, 2048, 65_000]), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..4, 1 => 4u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next)
}

#[test]
fn no_ring_ends_the_switch_or_stops_others() {
    let bridge = bridge(3, &["--queues", "2"]);
    let [mut a, _, mut c] = bridge.drivers::<3>();
    meet((&mut a, 0), (&mut c, 2));
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) };
    let table = prop::collection::vec(descriptor(), usize::from(SIZE));
    let heads = prop::collection::vec(prop_oneof![20 => 0..SIZE, 1 => any::<u16>()], 1..200);
    let jump = prop_oneof![5 => Just(0u16), 1 => any::<u16>()];
    let others = std::cell::RefCell::new((&mut a, &mut c));
    proptest!(config, |(table in table, heads in heads, jump in jump, mergeable: bool)| {
        let frontend = Frontend::connect(&bridge.sockets[1]).unwrap();
        let features = if mergeable { u64::MAX } else { !feature::MRG_RXBUF };
        let mut driver = NetDriver::start(frontend, features, SIZE).unwrap();
        let NetDriver { queues, ram, frontend, .. } = &mut driver;
        let (a, c) = &mut *others.borrow_mut();
        for queue in queues.iter_mut() {
            for (index, (addr, len, flags, next)) in table.iter().enumerate() {
                queue.set_descriptor(ram, index as u16, *addr, *len, *flags, *next).unwrap();
            }
            for batch in heads.chunks(usize::from(SIZE) / 2) {
                for head in batch {
                    queue.make_available(ram, *head).unwrap();
                }
                queue.kick_now().unwrap();
                for n in 0..4 {
                    a.send(0, &PLAIN, &between(0, 1, n, 14 + 300 * n as usize)).unwrap();
                }
            }
            let idx = queue.avail_idx().wrapping_add(jump);
            queue.set_avail_idx(ram, idx).unwrap();
            queue.kick_now().unwrap();
        }
        for index in 0..queues.len() as u16 {
            frontend.stop_queue(index).unwrap();
        }
        empty_now(a);
        empty_now(c);
    });
    empty(&mut a);
    empty(&mut c);
    // The hostile guest may have said that it is anybody.
    meet((&mut a, 0), (&mut c, 2));
}

fn empty_now(driver: &mut NetDriver) {
    while driver.receive_within(0, Duration::ZERO).unwrap().is_some() {}
}

/// While another guest sends without end.
#[test]
fn once_a_queue_is_stopped_nobody_writes_to_its_buffers() {
    let bridge = bridge(2, &[]);
    let [mut a, mut b] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !over.load(Ordering::Relaxed) {
                a.send(0, &PLAIN, &between(0, 1, number, 1500)).unwrap();
                number += 1;
            }
        });
        let _end = Ends(&over);
        let image = |b: &NetDriver| b.ram.read(0x1000, 4 << 20).unwrap();
        for round in 0..100 {
            let base = b.frontend.stop_queue(0).unwrap();
            assert_eq!(base, b.queues[0].device_used_idx(&b.ram).unwrap(), "round {round}");
            let before = image(&b);
            thread::sleep(Duration::from_millis(1));
            assert!(image(&b) == before, "something was written in round {round}");
            b.frontend.start_queue(0, &b.queues[0], base).unwrap();
            b.queues[0].kick_now().unwrap();
            for _ in 0..20 {
                let came = b.receive(0).unwrap().bytes;
                assert_eq!((came.len(), &came[..12]), (1500, &between(0, 1, 0, 14)[..12]));
            }
        }
    });
}

/// Says so even when a check fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Such a file can be cut off, which would end the process for everybody.
#[test]
fn memory_that_can_be_cut_off_is_refused() {
    let bridge = bridge(2, &[]);
    let mut frontend = Frontend::connect(&bridge.sockets[0]).unwrap();
    frontend.negotiate(u64::MAX).unwrap();
    let file = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, 1 << 20).unwrap();
    let region = MemoryRegion { guest_addr: 0, size: 1 << 20, user_addr: USER_BASE, mmap_offset: 0 };
    let table = MemoryTable { regions: vec![region] };
    frontend.tell(FrontendRequest::SetMemTable, &table, &[file.as_fd()]).unwrap_err();
    bridge.daemon.wait_for_log("memfds sealed against shrinking").unwrap();
    drop(frontend);
    let [mut a, mut b] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
}

/// What a frontend gives for interrupts may be anything: here a pipe that is full, which nobody reads.
#[test]
fn an_interrupt_that_nobody_takes_stops_nobody_else() {
    let bridge = bridge(3, &[]);
    let [mut a, mut b, mut c] = bridge.drivers();
    meet((&mut a, 0), (&mut b, 1));
    meet((&mut a, 0), (&mut c, 2));
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    rustix::io::write(&writer, &[0; 4096]).unwrap();
    let call = cleave_common::vhost_user::VringFd { index: 0, no_fd: false };
    b.frontend.tell(FrontendRequest::SetVringCall, &call, &[writer.as_fd()]).unwrap();
    for number in 0..200 {
        a.send(0, &PLAIN, &between(0, 1, number, 100)).unwrap();
        passes(&mut a, &mut c, &between(0, 2, number, 100));
    }
    b.reconnect(&bridge.sockets[1], u64::MAX).unwrap();
    b.offer_many(0, 100, 2048).unwrap();
    meet((&mut a, 0), (&mut b, 1));
}
