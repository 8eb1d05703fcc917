use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

fn pair() -> (Channel, Channel) {
    let (a, b) = UnixStream::pair().unwrap();
    (Channel::new(a), Channel::new(b))
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(5))
}

fn file() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

#[test]
fn the_wire_is_what_the_specification_draws() {
    let header = Header { request: 5, flags: Flags::NEED_REPLY, size: 0x0102 };
    assert_eq!(header.encode(), [5, 0, 0, 0, 9, 0, 0, 0, 2, 1, 0, 0]);
    assert_eq!(VringState { index: 1, num: 256 }.encode(), [1, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(VringFd { index: 3, no_fd: true }.encode(), [3, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(VringAddr::LEN, 40);
    assert_eq!(Inflight::LEN, 24, "with the C struct's padding");
    assert_eq!(Inflight::decode(&[1; 20]), Inflight::decode(&[1; 24]));
    let config = Config { offset: 4, flags: 0, data: vec![7, 8] };
    assert_eq!(config.encode(), [4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 8]);
    assert_eq!(SingleRegion::default().encode().len(), 40);
    assert_eq!(u32::from(FrontendRequest::CheckDeviceState), 43);
    assert_eq!(FrontendRequest::ALL.len(), 43);
    assert_eq!(FrontendRequest::try_from(44), Err(UnknownRequest(44)));
}

#[test]
fn a_memory_table_may_come_with_all_eight_slots() {
    let table = MemoryTable { regions: vec![MemoryRegion { size: 1, ..MemoryRegion::default() }] };
    let mut body = table.encode();
    assert_eq!(body.len(), 8 + 32);
    body.resize(8 + 8 * 32, 0xff);
    assert_eq!(MemoryTable::decode(&body), Ok(table));
    body[0] = 9;
    assert_eq!(MemoryTable::decode(&body), Err(Malformed::TooManyRegions(9)));
    assert!(matches!(MemoryTable::decode(&[1, 0, 0, 0]), Err(Malformed::Length { .. })));
}

#[test]
fn messages_keep_their_order_and_their_fds() {
    let (mut a, mut b) = pair();
    let fd = file();
    a.send(FrontendRequest::SetOwner, Flags::REQUEST, &[], &[], soon()).unwrap();
    a.send(FrontendRequest::SetVringKick, Flags::NEED_REPLY, &0u64.encode(), &[fd.as_fd()], soon()).unwrap();
    a.send(FrontendRequest::GetFeatures, Flags::REQUEST, &[], &[], soon()).unwrap();
    drop(a);

    let owner = b.recv(soon()).unwrap().unwrap();
    assert_eq!((owner.request, owner.fds.len()), (3, 0));
    let mut kick = b.recv(soon()).unwrap().unwrap();
    assert!(kick.flags.needs_reply() && !kick.flags.is_reply());
    assert_eq!(kick.payload(), Ok(VringFd { index: 0, no_fd: false }));
    let received = kick.single_fd().unwrap();
    assert!(rustix::io::fcntl_getfd(&received).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    assert!(kick.single_fd().is_err());
    let features = b.recv(soon()).unwrap().unwrap();
    assert_eq!((features.request, features.fds.len()), (1, 0));
    assert!(b.recv(soon()).unwrap().is_none());
}

#[test]
fn a_message_that_trickles_in_survives_timeouts() {
    let (raw, b) = UnixStream::pair().unwrap();
    let mut channel = Channel::new(b);
    let bytes = [&Header { request: 9, flags: Flags::REPLY, size: 8 }.encode()[..], &7u64.encode()].concat();
    for byte in &bytes {
        let deadline = Some(Instant::now() + Duration::from_millis(1));
        assert!(matches!(channel.recv(deadline), Err(ChannelError::Timeout)));
        (&raw).write_all(&[*byte]).unwrap();
    }
    assert_eq!(channel.recv(soon()).unwrap().unwrap().payload(), Ok(7u64));
}

#[test]
fn an_end_inside_a_message_is_no_orderly_end() {
    let (raw, b) = UnixStream::pair().unwrap();
    (&raw).write_all(&[1, 0, 0]).unwrap();
    drop(raw);
    assert!(matches!(Channel::new(b).recv(soon()), Err(ChannelError::Disconnected)));
}

#[test]
fn a_reader_that_never_reads_ends_at_the_deadline() {
    let (mut a, _b) = pair();
    let body = vec![0; MAX_BODY_LEN];
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let error = loop {
        if let Err(error) = a.send(FrontendRequest::SetConfig, Flags::REQUEST, &body, &[], deadline) {
            break error;
        }
    };
    assert!(matches!(error, ChannelError::Timeout), "{error}");
}

#[test]
fn a_large_message_passes_a_slow_reader_whole() {
    let (mut a, mut b) = pair();
    let body: Vec<u8> = (0..MAX_BODY_LEN).map(|n| n as u8).collect();
    let expected = body.clone();
    let sender = thread::spawn(move || {
        for _ in 0..200 {
            a.send(FrontendRequest::SetConfig, Flags::REQUEST, &body, &[], soon()).unwrap();
        }
    });
    for _ in 0..200 {
        assert_eq!(b.recv(soon()).unwrap().unwrap().body, expected);
    }
    sender.join().unwrap();
}

#[test]
fn too_many_fds_are_refused_and_closed() {
    let (a, b) = UnixStream::pair().unwrap();
    let mut channel = Channel::new(b);
    let (read_end, fd) = rustix::pipe::pipe().unwrap();
    let many: Vec<BorrowedFd<'_>> = vec![fd.as_fd(); MAX_FDS + 1];
    let error = Channel::new(a.try_clone().unwrap()).send(
        FrontendRequest::SetMemTable,
        Flags::REQUEST,
        &[],
        &many,
        None,
    );
    assert!(matches!(error, Err(ChannelError::Malformed(Malformed::TooManyFds))));

    // Past our own sender's bound: a hostile peer, with descriptors at the header and again at the body.
    let header = Header { request: 5, flags: Flags::REQUEST, size: 1 }.encode();
    for (bytes, count) in [(&header[..], MAX_FDS), (&[0u8][..], MAX_FDS)] {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&many[..count])));
        let parts = [std::io::IoSlice::new(bytes)];
        rustix::net::sendmsg(&a, &parts, &mut control, rustix::net::SendFlags::empty()).unwrap();
    }
    assert!(matches!(channel.recv(soon()), Err(ChannelError::Malformed(Malformed::TooManyFds))));
    // Once every copy of the write end is closed the pipe has an end.
    drop(fd);
    assert_eq!(rustix::io::read(&read_end, &mut [0; 1]), Ok(0));
}

#[test]
fn another_version_or_an_endless_body_is_refused() {
    for (flags, size) in [(0u32, 0u32), (2, 0), (1, MAX_BODY_LEN as u32 + 1), (1, u32::MAX)] {
        let (raw, b) = UnixStream::pair().unwrap();
        for word in [1, flags, size] {
            (&raw).write_all(&word.to_le_bytes()).unwrap();
        }
        assert!(matches!(Channel::new(b).recv(soon()), Err(ChannelError::Malformed(_))));
    }
}

fn round_trips<P: Payload + PartialEq + std::fmt::Debug>(payload: &P) {
    assert_eq!(P::decode(&payload.encode()).as_ref(), Ok(payload));
}

proptest! {
    #[test]
    fn payloads_read_back(a: u32, b: u32, c: u64, d: u64, e: u64, f: u64, g: u16, h: u8, no_fd: bool,
            data in prop::collection::vec(any::<u8>(), 0..300), count in 0usize..=8) {
        round_trips(&c);
        round_trips(&());
        round_trips(&VringState { index: a, num: b });
        round_trips(&VringAddr { index: a, flags: b, descriptor: c, used: d, available: e, log: f });
        let region = MemoryRegion { guest_addr: c, size: d, user_addr: e, mmap_offset: f };
        round_trips(&region);
        round_trips(&SingleRegion(region));
        round_trips(&MemoryTable { regions: vec![region; count] });
        round_trips(&LogBase { size: c, offset: d });
        round_trips(&Inflight { mmap_size: c, mmap_offset: d, num_queues: g, queue_size: g });
        round_trips(&DeviceState { direction: a, phase: b });
        round_trips(&VringArea { index_and_flags: c, size: d, offset: e });
        round_trips(&VringFd { index: h, no_fd });
        round_trips(&Config { offset: a, flags: b, data });
    }

    #[test]
    fn no_bytes_make_a_payload_panic(body in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = u64::decode(&body);
        let _ = VringState::decode(&body);
        let _ = VringAddr::decode(&body);
        let _ = SingleRegion::decode(&body);
        let _ = MemoryTable::decode(&body);
        let _ = LogBase::decode(&body);
        let _ = Inflight::decode(&body);
        let _ = DeviceState::decode(&body);
        let _ = VringFd::decode(&body);
        let _ = Config::decode(&body);
    }

    #[test]
    fn no_bytes_make_the_channel_panic_or_hang(bytes in prop::collection::vec(any::<u8>(), 0..600), version: bool) {
        let (raw, b) = UnixStream::pair().unwrap();
        let mut bytes = bytes;
        if version && bytes.len() >= HEADER_LEN {
            bytes[4] = 1;
            bytes[9..12].fill(0);
        }
        (&raw).write_all(&bytes).unwrap();
        drop(raw);
        let mut channel = Channel::new(b);
        let mut left = bytes.len();
        while let Ok(Some(message)) = channel.recv(soon()) {
            left -= HEADER_LEN + message.body.len();
        }
        prop_assert!(left <= bytes.len());
    }
}
