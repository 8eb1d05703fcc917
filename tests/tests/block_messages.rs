//! Messages that no frontend should send cleave-block: each is refused, or ends its session, and the next is served.

mod common;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use cleave_common::vhost_user::{
    Channel, Flags, FrontendRequest as Request, MemoryRegion, MemoryTable, Payload, SingleRegion, VringAddr,
    VringFd,
};
use cleave_tests::driver::{
    BlockDriver, Buffer, Frontend, GuestRam, IoStatus, PATIENCE, RequestKind, SplitQueue, USER_BASE,
};
use common::{MIB, disk, pattern, refused, start, state};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

#[test]
fn bad_memory_is_refused_and_the_session_goes_on() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let ram = GuestRam::new(MIB).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let good = MemoryRegion { guest_addr: 0, size: MIB, user_addr: USER_BASE, mmap_offset: 0 };
    let bad = [
        MemoryRegion { size: 0, ..good },
        MemoryRegion { size: 100, ..good },
        MemoryRegion { size: 3 * MIB, ..good },
        MemoryRegion { size: 1 << 62, ..good },
        MemoryRegion { size: !0xfff, ..good },
        MemoryRegion { mmap_offset: 2 * MIB, ..good },
        MemoryRegion { mmap_offset: !0xfff, ..good },
        MemoryRegion { guest_addr: !0xfff, ..good },
        MemoryRegion { guest_addr: 77, ..good },
        MemoryRegion { user_addr: u64::MAX - 4096, ..good },
    ];
    let frontend = &mut driver.frontend;
    let table = |regions: &[MemoryRegion]| MemoryTable { regions: regions.to_vec() };
    for region in bad {
        refused(frontend.tell(Request::SetMemTable, &table(&[region]), &[ram.fd()]));
        refused(frontend.add_mem_reg(SingleRegion(region), ram.fd()));
    }
    let overlapping = [good, MemoryRegion { guest_addr: 4096, user_addr: 0, ..good }];
    refused(frontend.tell(Request::SetMemTable, &table(&overlapping), &[ram.fd(), ram.fd()]));
    let same_user = [good, MemoryRegion { guest_addr: 1 << 32, ..good }];
    refused(frontend.tell(Request::SetMemTable, &table(&same_user), &[ram.fd(), ram.fd()]));
    refused(frontend.tell(Request::SetMemTable, &table(&[good]), &[]));
    refused(frontend.tell(Request::SetMemTable, &table(&[good]), &[ram.fd(), ram.fd()]));
    refused(frontend.tell(Request::SetMemTable, &table(&[good]), &[pipe.as_fd()]));
    // The memory it had is still there.
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

#[test]
fn bad_rings_are_refused_and_the_session_goes_on() {
    let image = disk(MIB);
    let daemon = start(&image, &["--num-queues", "2", "--queue-size", "256"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    let queue = SplitQueue::new(&mut driver.ram, 64, false, false).unwrap();
    let frontend = &mut driver.frontend;
    for num in [0, 3, 512, 65536, u32::MAX] {
        refused(frontend.tell(Request::SetVringNum, &state(1, num), &[]));
    }
    for index in [2, 255, u32::MAX] {
        refused(frontend.tell(Request::SetVringNum, &state(index, 64), &[]));
        refused(frontend.tell(Request::SetVringEnable, &state(index, 1), &[]));
    }
    refused(frontend.tell(Request::SetVringBase, &state(1, 65536), &[]));
    refused(frontend.tell(Request::SetVringEnable, &state(1, 2), &[]));
    refused(frontend.tell(Request::SetVringKick, &VringFd { index: 1, no_fd: true }, &[]));
    refused(frontend.tell(Request::SetVringKick, &VringFd { index: 1, no_fd: false }, &[]));
    refused(frontend.tell(Request::SetVringCall, &VringFd { index: 9, no_fd: true }, &[]));
    frontend.tell(Request::SetVringNum, &state(1, 64), &[]).unwrap();
    let addr = VringAddr {
        index: 1,
        flags: 0,
        descriptor: USER_BASE + queue.descriptors,
        used: USER_BASE + queue.used,
        available: USER_BASE + queue.available,
        log: 0,
    };
    let end = USER_BASE + driver.ram.hole();
    let bad = [
        VringAddr { descriptor: queue.descriptors, ..addr },
        VringAddr { descriptor: addr.descriptor + 8, ..addr },
        VringAddr { available: addr.available + 1, ..addr },
        VringAddr { used: addr.used + 2, ..addr },
        VringAddr { used: end - 64, ..addr },
        VringAddr { available: u64::MAX - 1, ..addr },
        VringAddr { descriptor: end - 16, ..addr },
    ];
    for addr in bad {
        refused(frontend.tell(Request::SetVringAddr, &addr, &[]));
    }
    // What may not change while a ring runs.
    refused(frontend.tell(Request::SetVringNum, &state(0, 64), &[]));
    refused(frontend.tell(Request::SetVringBase, &state(0, 0), &[]));
    refused(frontend.tell(Request::SetFeatures, &u64::MAX, &[]));
    refused(frontend.tell(Request::SetProtocolFeatures, &u64::MAX, &[]));
    refused(frontend.tell(Request::PostcopyAdvise, &(), &[]));
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

#[test]
fn a_ring_without_its_memory_waits_and_holds_up_no_other() {
    let image = disk(MIB);
    let daemon = start(&image, &["--num-queues", "2"]);
    let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    let features = driver.negotiated.acked;
    let frontend = &mut driver.frontend;
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    // Queue 0 is set up in memory that then goes.
    let extra = GuestRam::new(MIB).unwrap();
    let at = 0x20_0000_0000;
    let region = SingleRegion(MemoryRegion { guest_addr: at, size: MIB, user_addr: at, mmap_offset: 0 });
    frontend.add_mem_reg(region, extra.fd()).unwrap();
    let addr =
        VringAddr { index: 0, flags: 0, descriptor: at, available: at + 65536, used: at + 131072, log: 0 };
    frontend.tell(Request::SetVringAddr, &addr, &[]).unwrap();
    frontend.tell(Request::RemMemReg, &region, &[]).unwrap();
    let kick = VringFd { index: 0, no_fd: false };
    refused(frontend.tell(Request::SetVringKick, &kick, &[event.as_fd()]));
    frontend.tell(Request::SetVringEnable, &state(0, 0), &[]).unwrap();
    refused(frontend.tell(Request::SetVringEnable, &state(0, 1), &[]));
    frontend.tell(Request::SetFeatures, &features, &[]).unwrap();
    let buffer = Buffer::to_write(driver.ram.allocate(512, 512), 512);
    assert_eq!(driver.request_on(1, RequestKind::In, 0, &[buffer]).unwrap().0, IoStatus::Ok);
}

#[test]
fn a_refusal_nobody_would_hear_of_ends_the_session() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    driver.frontend.reply_ack = false;
    driver.frontend.tell(Request::SetVringNum, &state(0, 3), &[]).unwrap();
    assert!(driver.frontend.is_closed());
    daemon.wait_for_log("SET_VRING_NUM").unwrap();
    driver.reconnect(&daemon.socket).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}

/// A message as nobody should send it: any request, any body, any number of descriptors.
fn hostile_message() -> impl Strategy<Value = (u32, bool, Vec<u8>, usize)> {
    let request = prop_oneof![4 => 1u32..45, 1 => any::<u32>()];
    let body = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..80),
        // Small numbers are more often nearly right.
        prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(2), any::<u8>()], 0..300),
        any::<u64>().prop_map(|word| word.encode()),
        (0u32..3, 0u32..300).prop_map(|(index, num)| state(index, num).encode()),
    ];
    (request, any::<bool>(), body, 0usize..4)
}

#[test]
fn no_messages_end_the_daemon() {
    let image = disk(MIB);
    let daemon = start(&image, &["--num-queues", "2"]);
    let ram = GuestRam::new(MIB).unwrap();
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) };
    proptest!(config, |(messages in prop::collection::vec(hostile_message(), 1..12), negotiated: bool)| {
        let mut frontend = Frontend::connect(&daemon.socket).unwrap();
        if negotiated && frontend.negotiate(u64::MAX).is_ok() {
            let _ = frontend.set_mem_table(&ram);
        }
        let deadline = Some(Instant::now() + PATIENCE);
        let mut channel = Channel::new(frontend.channel.into_socket());
        for (request, need_reply, body, fds) in messages {
            let flags = if need_reply { Flags::NEED_REPLY } else { Flags::REQUEST };
            let fds = [event.as_fd(), ram.fd(), event.as_fd()][..fds.min(3)].to_vec();
            if channel.send(request, flags, &body, &fds, deadline).is_err() {
                break;
            }
        }
        let _ = channel.socket().shutdown(std::net::Shutdown::Write);
        // It answers or closes, and never keeps us waiting.
        loop {
            match channel.recv(deadline) {
                Ok(Some(_)) => {}
                Ok(None) | Err(cleave_common::vhost_user::ChannelError::Disconnected) => break,
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    });
    let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    assert_eq!(driver.read(0, 512).unwrap(), (IoStatus::Ok, pattern(0, 512)));
}

/// The same to a session whose rings run, with requests in them.
#[test]
fn no_messages_end_the_daemon_under_its_running_rings() {
    let image = disk(MIB);
    let daemon = start(&image, &["--num-queues", "2"]);
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) };
    proptest!(config, |(messages in prop::collection::vec(hostile_message(), 1..12))| {
        let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
        let buffers: Vec<u64> = (0..8).map(|_| driver.ram.allocate(4096, 4096)).collect();
        let deadline = Some(Instant::now() + PATIENCE);
        for (at, (request, need_reply, body, fds)) in messages.into_iter().enumerate() {
            let buffer = Buffer::to_write(buffers[at % buffers.len()], 4096);
            driver.submit(at % 2, RequestKind::In, 0, &[buffer]).unwrap();
            driver.queues[at % 2].kick_now().unwrap();
            let flags = if need_reply { Flags::NEED_REPLY } else { Flags::REQUEST };
            let fds = [event.as_fd(), driver.ram.fd(), event.as_fd()][..fds.min(3)].to_vec();
            if driver.frontend.channel.send(request, flags, &body, &fds, deadline).is_err() {
                break;
            }
        }
        let _ = driver.frontend.channel.socket().shutdown(std::net::Shutdown::Write);
        loop {
            match driver.frontend.channel.recv(deadline) {
                Ok(Some(_)) => {}
                Ok(None) | Err(cleave_common::vhost_user::ChannelError::Disconnected) => break,
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    });
    let mut driver = BlockDriver::connect(&daemon.socket, 2).unwrap();
    assert_eq!(driver.read(0, 512).unwrap(), (IoStatus::Ok, pattern(0, 512)));
    let memory = daemon.process().memory().unwrap();
    assert!(memory < 32 * MIB, "{} KiB", memory >> 10);
}

#[test]
fn no_bytes_end_the_daemon() {
    let image = disk(MIB);
    let daemon = start(&image, &[]);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) };
    proptest!(config, |(bytes in prop::collection::vec(any::<u8>(), 0..200))| {
        let mut stream = UnixStream::connect(&daemon.socket).unwrap();
        // It may have closed the connection before all is written.
        let _ = std::io::Write::write_all(&mut stream, &bytes);
    });
    let mut driver = BlockDriver::connect(&daemon.socket, 1).unwrap();
    assert_eq!(driver.read(0, 512).unwrap().0, IoStatus::Ok);
}
