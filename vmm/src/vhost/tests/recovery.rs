use super::*;

/// As the driver set them up, with the events to look at.
fn rings() -> (Vec<Ring>, Vec<Arc<Event>>, Vec<Arc<Event>>) {
    let rings = vec![ring(0), ring(1)];
    let kicks = rings.iter().map(|ring| Arc::clone(&ring.kick)).collect();
    let calls = rings.iter().filter_map(|ring| ring.call.clone()).collect();
    (rings, kicks, calls)
}

fn base(daemon: &Daemon) -> u32 {
    VringState::decode(&daemon.last(Request::SetVringBase).unwrap()).unwrap().num
}

/// Ends the daemon, which is lost then.
fn end(fixture: &Fixture) {
    fixture.daemon.end();
    let reason = fixture.hear_lost();
    assert!(reason.contains("closed the connection"), "{reason}");
}

#[test]
fn a_successor_gets_all_that_the_lost_daemon_had() {
    let mut fixture = session(recording());
    let (rings, kicks, calls) = rings();
    fixture.mailbox.start(Start { features: ACKED, rings });
    assert_eq!(fixture.hear(), Heard::Started);
    assert_eq!(base(&fixture.daemon), 0);
    let record = fixture.daemon.wait_for(Request::SetInflightFd, 1, |seen| seen.fds[0].try_clone().unwrap());
    // Queue 1 has two requests in flight.
    [4, 9].into_iter().for_each(|head| {
        pwrite(&record, &[1], RECORD + 16 + 16 * head).unwrap();
    });
    fixture.move_to(7, 5);
    pwrite(&record, &5u16.to_le_bytes(), RECORD + 14).unwrap();
    kicks.iter().for_each(|kick| {
        kick.clear();
    });
    end(&fixture);
    fixture.replace(recording());
    assert_eq!(fixture.hear(), Heard::Reconnected(2));
    let daemon = &fixture.daemon;
    assert_eq!(base(daemon), 5, "where the used ring ends");
    let requests = daemon.requests();
    let at = |request| requests.iter().position(|seen| *seen == request).unwrap();
    assert!(!requests.contains(&Request::GetInflightFd), "a record is there already");
    assert!(at(Request::SetMemTable) < at(Request::SetInflightFd));
    assert!(at(Request::SetInflightFd) < at(Request::SetVringNum));
    let given = daemon.wait_for(Request::SetInflightFd, 1, |seen| seen.fds[0].try_clone().unwrap());
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
    assert_eq!(inode(&given), inode(&record), "the record of the lost daemon");
    let features = u64::decode(&daemon.last(Request::SetFeatures).unwrap()).unwrap();
    assert_eq!(features, ACKED | virtio::PROTOCOL_FEATURES);
    assert!(kicks.iter().all(|kick| kick.is_signalled()), "each queue is kicked once");
    assert!(calls.iter().all(|call| call.is_signalled()), "what was complete and not said is");

    // A reset ends all of this: the next start gets a fresh record.
    fixture.stopped();
    fixture.running();
    assert_eq!(base(&fixture.daemon), 0);
    let fresh = fixture.daemon.wait_for(Request::SetInflightFd, 2, |seen| seen.fds[0].try_clone().unwrap());
    assert_ne!(inode(&fresh), inode(&record));
}

#[test]
fn without_a_record_nothing_outstanding_or_order_resumes() {
    let mut fixture = session(Script::default());
    fixture.running();
    fixture.move_to(9, 9);
    end(&fixture);
    fixture.replace(Script::default());
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
    assert_eq!(base(&fixture.daemon), 9);

    let in_order = || {
        let script = Script::default();
        Script { features: script.features | virtio::IN_ORDER, ..script }
    };
    let mut fixture = session(in_order());
    fixture.start_with(ACKED | virtio::IN_ORDER);
    assert_eq!(fixture.hear(), Heard::Started);
    fixture.move_to(9, 3);
    end(&fixture);
    fixture.replace(in_order());
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
    assert_eq!(base(&fixture.daemon), 3);
}

#[test]
fn without_a_record_what_was_outstanding_fails_the_device_until_its_reset() {
    let mut fixture = session(Script::default());
    fixture.running();
    fixture.move_to(9, 8);
    end(&fixture);
    assert_eq!(fixture.hear(), Heard::NeedsReset(CannotResume::Outstanding(2)));
    fixture.replace(Script::default());
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
    assert_eq!(fixture.daemon.last(Request::SetVringKick), None, "it has no ring");
    fixture.stopped();
    fixture.running();
    assert_eq!(base(&fixture.daemon), 0);
}

#[test]
fn a_successor_that_keeps_no_record_cannot_take_one_over() {
    let mut fixture = session(recording());
    fixture.running();
    fixture.move_to(9, 8);
    end(&fixture);
    fixture.replace(Script::default());
    assert_eq!(fixture.hear(), Heard::NeedsReset(CannotResume::Outstanding(2)));
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
}

#[test]
fn stops_and_starts_are_taken_while_there_is_no_daemon() {
    let mut fixture = session(recording());
    fixture.running();
    fixture.move_to(9, 8);
    end(&fixture);
    fixture.stopped();
    fixture.move_to(0, 0);
    fixture.start();
    fixture.mailbox.set_call(1, None);
    fixture.hears_nothing();
    fixture.replace(recording());
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
    assert_eq!(fixture.hear(), Heard::Started);
    assert_eq!(base(&fixture.daemon), 0);
    let call = VringFd::decode(&fixture.daemon.last(Request::SetVringCall).unwrap()).unwrap();
    assert_eq!(call, VringFd { index: 1, no_fd: true });

    end(&fixture);
    fixture.stopped();
    fixture.replace(recording());
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
    assert_eq!(fixture.daemon.last(Request::SetVringKick), None, "nothing is to run");
    fixture.running();
}

#[test]
fn a_successor_has_all_that_the_guest_has_seen() {
    let mut fixture = session(recording());
    fixture.running();
    end(&fixture);
    fixture.replace(Script { features: recording().features & !1, ..recording() });
    let Heard::AttemptFailed(reason) = fixture.hear() else { panic!() };
    assert!(reason.contains("(0x1 are missing): start it as the first one was"), "{reason}");
    fixture.replace(Script { queues: 1, ..recording() });
    let Heard::AttemptFailed(reason) = fixture.hear() else { panic!() };
    assert!(reason.contains("has 1 queues and the guest has seen 2"), "{reason}");
    let fault = Some((Request::SetVringKick, Fault::Close));
    fixture.replace(Script { fault, ..recording() });
    let Heard::AttemptFailed(reason) = fixture.hear() else { panic!() };
    assert!(reason.contains("closed the connection at SET_VRING_KICK"), "{reason}");
    fixture.replace(Script { features: recording().features | 4, queues: 5, ..recording() });
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
    end(&fixture);
    assert_eq!(*fixture.ear.serials.lock().unwrap(), [0, 1, 2, 3, 4], "who was meant each time");
}

#[test]
fn a_successor_is_told_what_the_driver_wrote_and_tells_its_config_space() {
    let mut fixture = session(Script::default());
    fixture.running();
    fixture.mailbox.write_config(4, &[0xaa, 0xbb]);
    fixture.mailbox.write_config(9, &[0xcc]);
    // It is read behind the last of those that wait: behind each of them, or once.
    let mut config = fixture.hear_config();
    if config[9] != 0xcc {
        config = fixture.hear_config();
    }
    assert_eq!((config[4], config[9]), (0xaa, 0xcc));
    end(&fixture);
    fixture.mailbox.write_config(5, &[0xdd]);
    fixture.replace(Script { config: vec![1; 60], ..Script::default() });
    let config = fixture.hear_config();
    assert_eq!(config[..10], [1, 1, 1, 1, 0xaa, 0xdd, 1, 1, 1, 0xcc]);
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
    fixture.stopped();
    end(&fixture);
    fixture.replace(Script { config: vec![2; 40], ..Script::default() });
    assert_eq!(fixture.hear_config(), [2; 40], "a reset has undone it");
}

/// A daemon that someone else runs.
struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        Self { _directory: directory, path }
    }

    fn listen(&self) -> UnixListener {
        let _ = std::fs::remove_file(&self.path);
        UnixListener::bind(&self.path).unwrap()
    }

    fn side(&self, listener: &UnixListener, deadline: Duration) -> (Side, Daemon) {
        let endpoint = Endpoint::Path { path: self.path.clone(), wait: SOON };
        let patience = Patience { look: SHORT / 5, ..patience(deadline) };
        let target = Target { device: "test0".into(), endpoint, queues: None, patience };
        thread::scope(|scope| {
            let daemon = scope.spawn(|| serve(listener, recording()));
            (Side::of(target), daemon.join().unwrap())
        })
    }
}

fn serve(listener: &UnixListener, script: Script) -> Daemon {
    Daemon::serve(script, listener.accept().unwrap().0)
}

#[test]
fn a_daemon_that_someone_else_runs_is_looked_for_without_end() {
    let place = Place::new();
    let listener = place.listen();
    let (side, daemon) = place.side(&listener, Duration::from_secs(5));
    side.running();
    drop(listener);
    daemon.end();
    side.hear_lost();
    let Heard::AttemptFailed(reason) = side.hear() else { panic!() };
    assert!(reason.contains("no daemon listens on"), "{reason}");
    thread::sleep(SHORT);
    side.stopped();
    side.start();
    // One that dies at once, and then a good one.
    let listener = place.listen();
    drop(listener.accept().unwrap());
    let daemon = serve(&listener, recording());
    loop {
        match side.hear() {
            Heard::AttemptFailed(_) => {}
            heard => break assert_eq!(heard, Heard::Reconnected(0)),
        }
    }
    assert_eq!(side.hear(), Heard::Started);
    assert!(daemon.last(Request::SetInflightFd).is_some());
}

#[test]
fn a_daemon_that_hangs_is_found_and_not_replaced_before_it_lets_go() {
    let place = Place::new();
    let listener = place.listen();
    let (side, daemon) = place.side(&listener, SHORT);
    side.running();
    daemon.hold();
    side.move_to(3, 1);
    let reason = side.hear_lost();
    assert!(reason.contains("did not answer within 0.5 s, and its rings"), "{reason}");
    listener.set_nonblocking(true).unwrap();
    thread::sleep(SHORT);
    assert!(listener.accept().is_err(), "it may still be writing");
    listener.set_nonblocking(false).unwrap();
    side.move_to(3, 2);
    daemon.end();
    let successor = serve(&listener, recording());
    assert_eq!(side.hear(), Heard::Reconnected(0));
    assert_eq!(base(&successor), 2);
}
