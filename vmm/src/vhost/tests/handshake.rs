use super::*;

fn handshake(script: Script) -> Result<Offer, SessionError> {
    handshake_within(script, Duration::from_secs(5))
}

fn handshake_within(script: Script, deadline: Duration) -> Result<Offer, SessionError> {
    let (_daemon, socket) = Daemon::pair(script);
    connect(Target { patience: patience(deadline), ..target(socket) })
        .map(|session| session.offer().clone())
        .map_err(|error| error.source)
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
    let accepted = |daemon: &Daemon| {
        daemon.wait_for(Request::SetProtocolFeatures, 1, |seen| u64::decode(&seen.body).unwrap())
    };
    let plain = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | protocol::RESET_DEVICE;
    assert_eq!(accepted(&daemon), plain);
    let all = Script { protocol_features: u64::MAX, ..Script::default() };
    let (daemon, socket) = Daemon::pair(all);
    connect(target(socket)).unwrap();
    assert_eq!(accepted(&daemon), plain | protocol::BACKEND_REQ | protocol::INFLIGHT_SHMFD);
    assert_eq!(daemon.wait_for(Request::SetBackendReqFd, 1, |seen| seen.fds.len()), 1);
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
            patience: patience(SHORT),
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
fn what_is_no_socket_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    for path in [file, directory.path().to_owned()] {
        assert!(is_no_socket(&path));
        let endpoint = Endpoint::Path { path, wait: SOON };
        let started = Instant::now();
        let error =
            connect(Target { device: "test0".into(), endpoint, queues: None, patience: patience(SHORT) });
        assert!(matches!(error.unwrap_err().source, SessionError::NotASocket(_)));
        assert!(started.elapsed() < SOON);
    }
    assert!(!is_no_socket(&directory.path().join("nothing")));
    let datagrams = directory.path().join("datagrams");
    let _other = std::os::unix::net::UnixDatagram::bind(&datagrams).unwrap();
    let endpoint = Endpoint::Path { path: datagrams, wait: SOON * 60 };
    let (_daemon, unused) = UnixStream::pair().unwrap();
    let error = connect(Target { endpoint, ..target(unused) }).unwrap_err().source;
    assert!(matches!(error, SessionError::OtherKind(_)), "{error}");
}

#[test]
fn a_daemon_of_ours_may_take_its_time_for_the_first_answer() {
    let slow = Script { slow: Some((Request::GetFeatures, SHORT)), ..Script::default() };
    let (_daemon, socket) = Daemon::pair(slow);
    let patience = Patience { deadline: SHORT / 5, first_answer: SOON, ..Patience::default() };
    connect(Target { patience, ..target(socket) }).unwrap();
}
