use super::*;

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
    assert!(requests.ends_with(&[Request::ResetDevice, Request::GetConfig]), "{requests:?}");
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
        let read = |seen: &Seen| (VringFd::decode(&seen.body).unwrap().no_fd, seen.fds.len());
        fixture.daemon.wait_for(Request::SetVringCall, count, read)
    };
    assert_eq!(call(1), (true, 0));
    fixture.mailbox.set_call(0, Some(Arc::new(Event::new().unwrap())));
    fixture.mailbox.set_call(9, None);
    assert_eq!(call(2), (false, 1));
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
