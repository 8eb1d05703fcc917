use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{
    Config, FrontendRequest as Request, MemoryTable as WireTable, Payload, VringAddr, VringFd, VringState,
};

use super::connect::Offer;
use super::fake::{Daemon, Fault, Script};
use super::*;
use crate::bus::Event;

const SHORT: Duration = Duration::from_millis(500);
const ACKED: u64 = virtio::VERSION_1 | 1;

fn target(socket: UnixStream) -> Target {
    Target {
        device: "test0".into(),
        endpoint: Endpoint::Socket(socket),
        queues: None,
        deadline: Duration::from_secs(5),
    }
}

fn handshake(script: Script) -> Result<Offer, SessionError> {
    handshake_within(script, Duration::from_secs(5))
}

fn handshake_within(script: Script, deadline: Duration) -> Result<Offer, SessionError> {
    let (_daemon, socket) = Daemon::pair(script);
    connect(Target { deadline, ..target(socket) })
        .map(|session| session.offer().clone())
        .map_err(|error| error.source)
}

fn memory() -> Arc<MemoryTable> {
    let file: Arc<OwnedFd> = Arc::new(File::open("/dev/null").unwrap().into());
    let region = |start, len, offset| Region { start, len, file: Arc::clone(&file), offset };
    let regions = vec![region(0, 0x10_0000, 0), region(1 << 32, 0x10_0000, 0x10_0000)];
    Arc::new(MemoryTable::new(regions).unwrap())
}

fn ring(index: u8) -> Ring {
    let addresses = RingAddresses { descriptor: 0x1000, available: 0x2000, used: (1 << 32) + 0x3000 };
    let event = || Arc::new(Event::new().unwrap());
    Ring::new(&memory(), index, 256, addresses, event(), Some(event())).unwrap()
}

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Started,
    Stopped,
    Config(Vec<u8>),
    Lost(String),
}

struct Ear(Sender<Heard>);

impl Observer for Ear {
    fn started(&self) {
        self.0.send(Heard::Started).unwrap();
    }
    fn stopped(&self) {
        self.0.send(Heard::Stopped).unwrap();
    }
    fn config(&self, config: &[u8]) {
        self.0.send(Heard::Config(config.to_vec())).unwrap();
    }
    fn lost(&self, reason: &SessionError) {
        self.0.send(Heard::Lost(reason.to_string())).unwrap();
    }
}

struct Fixture {
    daemon: Daemon,
    mailbox: Arc<Mailbox>,
    heard: Receiver<Heard>,
    _ear: Arc<Ear>,
    _thread: SessionThread,
}

fn session(script: Script) -> Fixture {
    session_within(script, Duration::from_secs(5))
}

fn session_within(script: Script, deadline: Duration) -> Fixture {
    let (daemon, socket) = Daemon::pair(script);
    let session = connect(Target { deadline, ..target(socket) }).unwrap();
    let (sender, heard) = channel();
    let ear = Arc::new(Ear(sender));
    let observer: Weak<dyn Observer> = Arc::downgrade(&(Arc::clone(&ear) as Arc<dyn Observer>));
    let mailbox = Mailbox::new().unwrap();
    let thread = session.spawn(Arc::clone(&mailbox), memory(), observer).unwrap();
    Fixture { daemon, mailbox, heard, _ear: ear, _thread: thread }
}

impl Fixture {
    fn start(&self) {
        self.mailbox.start(Start { features: ACKED, rings: vec![ring(0), ring(1)] });
    }

    fn hear(&self) -> Heard {
        self.heard.recv_timeout(Duration::from_secs(5)).expect("nothing is heard")
    }

    fn hear_lost(&self) -> String {
        match self.hear() {
            Heard::Lost(reason) => reason,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_handshake_learns_what_the_daemon_offers() {
    let features = u64::MAX;
    let offer = handshake(Script { features, ..Script::default() }).unwrap();
    assert_eq!(offer.num_queues, 2);
    assert_eq!(offer.config, (0..60).collect::<Vec<u8>>());
    let kept = [0, 23, 28, 29, 32, 35, 36, 50, 63];
    let hidden = [24, 25, 26, 27, 30, 31, 33, 34, 37, 38, 39, 40, 41, 49];
    assert!(kept.iter().all(|bit| offer.features >> bit & 1 == 1), "{:#x}", offer.features);
    assert!(hidden.iter().all(|bit| offer.features >> bit & 1 == 0), "{:#x}", offer.features);
}

#[test]
fn only_what_we_use_is_negotiated() {
    let (daemon, socket) = Daemon::pair(Script::default());
    connect(target(socket)).unwrap();
    let accepted = daemon.wait_for(Request::SetProtocolFeatures, 1, |seen| u64::decode(&seen.body).unwrap());
    assert_eq!(accepted, protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | protocol::RESET_DEVICE);
}

#[test]
fn config_space_is_found_whatever_its_length() {
    for len in [0, 1, 12, 36, 60, 96, 255, 256] {
        for strict_config in [false, true] {
            let config: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let script = Script { config: config.clone(), strict_config, ..Script::default() };
            assert_eq!(handshake(script).unwrap().config, config, "{len} {strict_config}");
        }
    }
}

#[test]
fn a_daemon_that_can_say_little_has_one_queue_or_what_the_user_says() {
    let script = Script { protocol_features: 0, ..Script::default() };
    let plain = Script { features: virtio::VERSION_1, ..script.clone() };
    for script in [script, plain] {
        let offer = handshake(script.clone()).unwrap();
        assert_eq!((offer.num_queues, offer.config.len()), (1, 0));
        let (_daemon, socket) = Daemon::pair(script);
        let session = connect(Target { queues: Some(3), ..target(socket) }).unwrap();
        assert_eq!(session.offer().num_queues, 3);
    }
    let many = handshake(Script { queues: u64::MAX, ..Script::default() }).unwrap();
    assert_eq!(many.num_queues, MAX_QUEUES);
    let none = handshake(Script { queues: 0, ..Script::default() });
    assert!(matches!(none, Err(SessionError::NoQueues)));
}

#[test]
fn a_daemon_without_version_1_is_refused() {
    let error = handshake(Script { features: 0x1000, ..Script::default() }).unwrap_err();
    assert!(error.to_string().contains("no VIRTIO_F_VERSION_1 (its features are 0x1000)"), "{error}");
}

#[test]
fn every_fault_in_the_handshake_ends_it_with_its_reason() {
    let at = |request, fault| {
        let script = Script { fault: Some((request, fault)), ..Script::default() };
        handshake_within(script, SHORT).unwrap_err()
    };
    for request in
        [Request::GetFeatures, Request::GetProtocolFeatures, Request::GetQueueNum, Request::GetConfig]
    {
        let started = Instant::now();
        assert!(matches!(at(request, Fault::Mute), SessionError::Timeout { request: r, .. } if r == request));
        assert!(started.elapsed() < SHORT * 5);
        assert!(matches!(at(request, Fault::Close), SessionError::Closed { .. }));
        assert!(matches!(
            at(request, Fault::Answer(vec![1; 7])),
            SessionError::Malformed { request: r, .. } if r == request
        ));
        assert!(matches!(at(request, Fault::OtherRequest), SessionError::WrongAnswer { got: 99, .. }));
        let garbage = at(request, Fault::Raw(b"HTTP/1.1 400 Bad Request\r\n".to_vec()));
        assert!(matches!(garbage, SessionError::Malformed { .. }), "{garbage}");
    }
}

#[test]
fn a_path_is_tried_until_the_whole_handshake_works() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let attempt = |wait| {
        connect(Target {
            device: "test0".into(),
            endpoint: Endpoint::Path { path: path.clone(), wait },
            queues: None,
            deadline: SHORT,
        })
    };
    let nobody = attempt(Duration::ZERO).unwrap_err().to_string();
    assert!(nobody.starts_with("device test0: no daemon listens on /"), "{nobody}");

    let server = thread::spawn({
        let path = path.clone();
        move || {
            thread::sleep(Duration::from_millis(60));
            let listener = UnixListener::bind(&path).unwrap();
            // First one that dies at once, then one that hangs, then a good one.
            drop(listener.accept().unwrap());
            let hung = listener.accept().unwrap();
            let (socket, _) = listener.accept().unwrap();
            drop(hung);
            Daemon::serve(Script::default(), socket)
        }
    });
    let session = attempt(Duration::from_secs(10)).unwrap();
    assert_eq!(session.offer().num_queues, 2);
    server.join().unwrap();

    let stale = attempt(Duration::ZERO).unwrap_err();
    assert!(matches!(stale.source, SessionError::NobodyListens { .. }), "{stale}");
}

#[test]
fn a_start_gives_the_daemon_all_it_needs() {
    let fixture = session(Script::default());
    let rings = vec![ring(0), ring(1)];
    let kicks: Vec<_> = rings.iter().map(|ring| Arc::clone(&ring.kick)).collect();
    fixture.mailbox.start(Start { features: ACKED, rings });
    assert_eq!(fixture.hear(), Heard::Started);
    let daemon = &fixture.daemon;
    let last = |request| daemon.last(request).unwrap();
    assert_eq!(u64::decode(&last(Request::SetFeatures)), Ok(ACKED | virtio::PROTOCOL_FEATURES));
    let table = WireTable::decode(&last(Request::SetMemTable)).unwrap();
    assert_eq!(table.regions.len(), 2);
    assert_eq!(table.regions[1].guest_addr, 1 << 32);
    assert_eq!(table.regions[1].user_addr, 0x5001_0000_0000);
    assert_eq!(table.regions[1].mmap_offset, 0x10_0000);
    assert_eq!(daemon.wait_for(Request::SetMemTable, 1, |seen| seen.fds.len()), 2);
    let addresses = VringAddr::decode(&last(Request::SetVringAddr)).unwrap();
    assert_eq!((addresses.index, addresses.flags), (1, 0));
    assert_eq!(addresses.descriptor, 0x5000_0000_1000);
    assert_eq!(addresses.available, 0x5000_0000_2000);
    assert_eq!(addresses.used, 0x5001_0000_3000);
    assert_eq!(VringState::decode(&last(Request::SetVringNum)), Ok(VringState { index: 1, num: 256 }));
    assert_eq!(VringState::decode(&last(Request::SetVringEnable)), Ok(VringState { index: 1, num: 1 }));
    assert_eq!(VringFd::decode(&last(Request::SetVringCall)), Ok(VringFd { index: 1, no_fd: false }));
    let requests = daemon.requests();
    let at = |request| requests.iter().position(|seen| *seen == request).unwrap();
    assert!(at(Request::SetVringCall) < at(Request::SetVringKick));
    assert!(kicks.iter().all(|kick| kick.is_signalled()), "each queue is kicked once");
}

#[test]
fn a_daemon_without_acknowledgements_is_kicked_once_its_rings_are_enabled() {
    let script = Script {
        protocol_features: Script::default().protocol_features & !protocol::REPLY_ACK,
        slow: Some((Request::GetFeatures, SHORT)),
        ..Script::default()
    };
    let fixture = session(script);
    let rings = vec![ring(0), ring(1)];
    let kicks: Vec<_> = rings.iter().map(|ring| Arc::clone(&ring.kick)).collect();
    fixture.mailbox.start(Start { features: ACKED, rings });
    fixture.daemon.wait_for(Request::GetFeatures, 2, |_| ());
    assert!(!kicks.iter().any(|kick| kick.is_signalled()), "the daemon has not answered yet");
    assert_eq!(fixture.hear(), Heard::Started);
    assert!(kicks.iter().all(|kick| kick.is_signalled()));
    let requests = fixture.daemon.requests();
    assert!(requests.ends_with(&[Request::SetVringEnable, Request::GetFeatures]), "{requests:?}");
}

#[test]
fn a_stop_takes_every_ring_back_and_resets_the_device() {
    let fixture = session(Script::default());
    fixture.start();
    assert_eq!(fixture.hear(), Heard::Started);
    fixture.mailbox.stop();
    assert_eq!(fixture.hear(), Heard::Stopped);
    let requests = fixture.daemon.requests();
    let count = |request| requests.iter().filter(|seen| **seen == request).count();
    assert_eq!(count(Request::GetVringBase), 2);
    assert_eq!(count(Request::ResetDevice), 1);
    assert_eq!(requests.last(), Some(&Request::ResetDevice));
    fixture.start();
    assert_eq!(fixture.hear(), Heard::Started);
}

#[test]
fn a_ring_without_a_vector_is_polled_and_may_get_one_later() {
    let fixture = session(Script::default());
    let polled = Ring { call: None, ..ring(0) };
    fixture.mailbox.start(Start { features: ACKED, rings: vec![polled] });
    assert_eq!(fixture.hear(), Heard::Started);
    let call = |count| {
        let read = |seen: &super::fake::Seen| (VringFd::decode(&seen.body).unwrap().no_fd, seen.fds.len());
        fixture.daemon.wait_for(Request::SetVringCall, count, read)
    };
    assert_eq!(call(1), (true, 0));
    fixture.mailbox.set_call(0, Some(Arc::new(Event::new().unwrap())));
    fixture.mailbox.set_call(9, None);
    assert_eq!(call(2), (false, 1));
}

#[test]
fn a_config_write_goes_out_and_what_became_of_it_comes_back() {
    let fixture = session(Script::default());
    assert!(fixture.mailbox.write_config(4, &[0xaa, 0xbb]));
    let Heard::Config(config) = fixture.hear() else { panic!() };
    assert_eq!((config.len(), &config[3..7]), (60, &[3, 0xaa, 0xbb, 6][..]));
    let body = fixture.daemon.last(Request::SetConfig).unwrap();
    assert_eq!(Config::decode(&body), Ok(Config { offset: 4, flags: 0, data: vec![0xaa, 0xbb] }));
}

#[test]
fn what_a_guest_can_leave_in_the_mailbox_is_bounded() {
    let mailbox = Mailbox::new().unwrap();
    let taken = (0..10_000).filter(|_| mailbox.write_config(0, &[0])).count();
    assert_eq!(taken, 64);
    (0..10_000u32).for_each(|at| mailbox.set_call(at as u8, None));
    assert_eq!(mailbox.take().calls.len(), 256);
}

#[test]
fn a_stop_takes_back_what_was_asked_for_before() {
    let mailbox = Mailbox::new().unwrap();
    mailbox.write_config(0, &[1]);
    mailbox.start(Start { features: ACKED, rings: vec![ring(0)] });
    mailbox.write_config(0, &[2]);
    mailbox.set_call(0, None);
    mailbox.stop();
    mailbox.write_config(0, &[3]);
    let notes = mailbox.take();
    assert!(notes.stop && notes.start.is_none() && notes.calls.is_empty());
    assert!(notes.late_config_writes.is_empty());
    assert_eq!(notes.config_writes.iter().map(|write| write.data[0]).collect::<Vec<_>>(), [3]);
}

#[test]
fn config_writes_keep_their_place_before_or_after_the_start() {
    let fixture = session(slow_config_writes(SHORT));
    fixture.mailbox.write_config(0, &[1]);
    fixture.daemon.wait_for(Request::SetConfig, 1, |_| ());
    fixture.mailbox.write_config(0, &[2]);
    fixture.start();
    fixture.mailbox.write_config(0, &[3]);
    fixture.daemon.wait_for(Request::SetConfig, 3, |_| ());
    let mut order = fixture.daemon.requests();
    order.retain(|request| matches!(request, Request::SetConfig | Request::SetFeatures));
    let write = Request::SetConfig;
    assert_eq!(order, [write, write, Request::SetFeatures, write]);
}

#[test]
fn a_daemon_that_dies_is_lost_and_stops_are_still_answered() {
    let fixture = session(Script { fault: Some((Request::SetConfig, Fault::Close)), ..Script::default() });
    fixture.start();
    assert_eq!(fixture.hear(), Heard::Started);
    fixture.mailbox.write_config(0, &[1]);
    assert!(fixture.hear_lost().contains("closed the connection at SET_CONFIG"));
    fixture.mailbox.stop();
    assert_eq!(fixture.hear(), Heard::Stopped);
    fixture.start();
    fixture.mailbox.stop();
    assert_eq!(fixture.hear(), Heard::Stopped);
}

#[test]
fn a_hang_up_between_requests_is_seen_at_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let kept = theirs.try_clone().unwrap();
    let daemon = Daemon::serve(Script::default(), theirs);
    let session = connect(target(ours)).unwrap();
    let (sender, heard) = channel();
    let ear = Arc::new(Ear(sender));
    let observer: Weak<dyn Observer> = Arc::downgrade(&(Arc::clone(&ear) as Arc<dyn Observer>));
    let _thread = session.spawn(Mailbox::new().unwrap(), memory(), observer).unwrap();
    kept.shutdown(std::net::Shutdown::Both).unwrap();
    let reason = heard.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(reason, Heard::Lost("the daemon closed the connection".into()));
    daemon.thread.join().unwrap();
}

#[test]
fn a_daemon_that_hangs_costs_a_reset_no_more_than_the_deadline() {
    for request in [Request::GetVringBase, Request::ResetDevice] {
        let script = Script { fault: Some((request, Fault::Mute)), ..Script::default() };
        let fixture = session_within(script, SHORT);
        fixture.start();
        assert_eq!(fixture.hear(), Heard::Started);
        let started = Instant::now();
        fixture.mailbox.stop();
        assert!(fixture.hear_lost().contains(&format!("did not answer {request} within 0.5 s")));
        assert_eq!(fixture.hear(), Heard::Stopped);
        assert!(started.elapsed() < SHORT * 5);
    }
}

#[test]
fn a_stop_and_its_reset_have_one_deadline() {
    let script = Script {
        slow: Some((Request::GetVringBase, Duration::from_secs(1))),
        fault: Some((Request::ResetDevice, Fault::Mute)),
        ..Script::default()
    };
    let fixture = session_within(script, Duration::from_secs(2));
    fixture.start();
    assert_eq!(fixture.hear(), Heard::Started);
    let started = Instant::now();
    fixture.mailbox.stop();
    fixture.hear_lost();
    assert_eq!(fixture.hear(), Heard::Stopped);
    assert!(started.elapsed() < Duration::from_millis(2800), "{:?}", started.elapsed());
}

fn slow_config_writes(pause: Duration) -> Script {
    Script { slow: Some((Request::SetConfig, pause)), ..Script::default() }
}

#[test]
fn config_writes_that_wait_have_one_deadline() {
    let fixture = session_within(slow_config_writes(SHORT), SHORT * 4);
    (0..20).for_each(|_| assert!(fixture.mailbox.write_config(0, &[1])));
    let end = loop {
        match fixture.hear() {
            Heard::Config(_) => {}
            end => break end,
        }
    };
    assert!(matches!(end, Heard::Lost(reason) if reason.contains("within 2 s")));
    assert!(fixture.daemon.requests().iter().filter(|seen| **seen == Request::SetConfig).count() < 10);
}

#[test]
fn a_stop_or_the_end_does_not_wait_for_config_writes() {
    let fixture = session(slow_config_writes(SHORT));
    let sent = || fixture.daemon.requests().iter().filter(|seen| **seen == Request::SetConfig).count();
    (0..20).for_each(|_| assert!(fixture.mailbox.write_config(0, &[1])));
    fixture.daemon.wait_for(Request::SetConfig, 3, |_| ());
    fixture.mailbox.stop();
    while fixture.hear() != Heard::Stopped {}
    assert!(sent() < 10, "{}", sent());

    let Fixture { daemon, mailbox, heard: _heard, _ear, _thread: thread } =
        session(slow_config_writes(SHORT));
    (0..20).for_each(|_| assert!(mailbox.write_config(0, &[1])));
    daemon.wait_for(Request::SetConfig, 3, |_| ());
    let ended = Instant::now();
    drop(thread);
    daemon.thread.join().unwrap();
    assert!(ended.elapsed() < SHORT * 8, "{:?}", ended.elapsed());
}

#[test]
fn a_daemon_that_refuses_or_babbles_is_lost() {
    let refuses = Fault::Answer(5u64.encode());
    let fixture = session(Script { fault: Some((Request::SetMemTable, refuses)), ..Script::default() });
    fixture.start();
    assert_eq!(fixture.hear_lost(), "the daemon refused SET_MEM_TABLE (answer 5)");

    let unasked = [&0u64.encode()[..], &[0; 100]].concat();
    let fixture =
        session(Script { fault: Some((Request::SetVringEnable, Fault::Raw(unasked))), ..Script::default() });
    fixture.start();
    fixture.hear_lost();
}

#[test]
fn rings_are_checked_against_guest_memory() {
    let event = || Arc::new(Event::new().unwrap());
    let good = RingAddresses { descriptor: 0x1000, available: 0x2000, used: 0x3000 };
    let check = |size, addresses| Ring::new(&memory(), 0, size, addresses, event(), None).map(|_| ());
    assert_eq!(check(256, good), Ok(()));
    assert_eq!(check(256, RingAddresses { descriptor: 0xf_f000, ..good }), Ok(()));
    for bad in [
        RingAddresses { descriptor: 0xf_f010, ..good },
        RingAddresses { descriptor: u64::MAX - 15, ..good },
        RingAddresses { available: 0x10_0000, ..good },
        RingAddresses { used: 1 << 31, ..good },
    ] {
        assert!(matches!(check(256, bad), Err(RingError::NotInMemory { .. })), "{bad:x?}");
    }
    for bad in [
        RingAddresses { descriptor: 0x1008, ..good },
        RingAddresses { available: 0x2001, ..good },
        RingAddresses { used: 0x3002, ..good },
    ] {
        assert!(matches!(check(256, bad), Err(RingError::Misaligned { .. })), "{bad:x?}");
    }
    assert!(matches!(check(0, good), Err(RingError::Size { .. })));
    assert!(matches!(check(3, good), Err(RingError::Size { .. })));
}
