use super::*;

fn slow_config_writes(pause: Duration) -> Script {
    Script { slow: Some((Request::SetConfig, pause)), ..Script::default() }
}

#[test]
fn a_config_write_goes_out_and_what_became_of_it_comes_back() {
    let fixture = session(Script::default());
    assert!(fixture.mailbox.write_config(4, &[0xaa, 0xbb]));
    let config = fixture.hear_config();
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
fn config_writes_before_the_start_are_repeated_once_the_features_are_known() {
    let fixture = session(slow_config_writes(SHORT));
    fixture.mailbox.write_config(0, &[1]);
    fixture.daemon.wait_for(Request::SetConfig, 1, |_| ());
    fixture.mailbox.write_config(1, &[2]);
    fixture.start();
    fixture.mailbox.write_config(0, &[3]);
    fixture.daemon.wait_for(Request::SetConfig, 5, |_| ());
    let mut order = fixture.daemon.requests();
    order.retain(|request| {
        matches!(request, Request::SetConfig | Request::SetFeatures | Request::SetMemTable)
    });
    let write = Request::SetConfig;
    assert_eq!(order, [write, write, Request::SetFeatures, write, write, Request::SetMemTable, write]);
}

#[test]
fn config_writes_that_wait_have_one_deadline() {
    let fixture = session_within(slow_config_writes(SHORT), SHORT * 4);
    (0..20).for_each(|_| assert!(fixture.mailbox.write_config(0, &[1])));
    assert!(fixture.hear_lost().contains("within 2 s"));
    assert!(fixture.daemon.requests().iter().filter(|seen| **seen == Request::SetConfig).count() < 10);
}

#[test]
fn a_stop_or_the_end_does_not_wait_for_config_writes() {
    let fixture = session(slow_config_writes(SHORT));
    let sent = || fixture.daemon.requests().iter().filter(|seen| **seen == Request::SetConfig).count();
    (0..20).for_each(|_| assert!(fixture.mailbox.write_config(0, &[1])));
    fixture.daemon.wait_for(Request::SetConfig, 3, |_| ());
    fixture.stopped();
    assert!(sent() < 10, "{}", sent());

    let Fixture { daemon, side: Side { mailbox, heard: _heard, memory: _memory, ear: _ear, thread }, .. } =
        session(slow_config_writes(SHORT));
    (0..20).for_each(|_| assert!(mailbox.write_config(0, &[1])));
    daemon.wait_for(Request::SetConfig, 3, |_| ());
    let ended = Instant::now();
    drop(thread);
    daemon.thread.join().unwrap();
    assert!(ended.elapsed() < SHORT * 8, "{:?}", ended.elapsed());
}

#[test]
fn a_reset_brings_config_space_back_and_voids_the_writes_that_wait() {
    let fixture = session(slow_config_writes(SHORT / 5));
    fixture.mailbox.write_config(0, &[1]);
    fixture.daemon.wait_for(Request::SetConfig, 1, |_| ());
    fixture.mailbox.write_config(1, &[2]);
    fixture.mailbox.refresh();
    assert_eq!(fixture.hear_config()[..2], [1, 1], "the first write was on its way");
    assert_eq!(fixture.hear_config()[..2], [1, 1], "after the reset");
    fixture.hears_nothing();
    let requests = fixture.daemon.requests();
    assert!(requests.ends_with(&[Request::ResetDevice, Request::GetConfig]), "{requests:?}");
    assert_eq!(requests.iter().filter(|request| **request == Request::SetConfig).count(), 1);
    fixture.running();
    fixture.mailbox.stop();
    assert_eq!(fixture.hear_config().len(), 60, "before the driver is told that the reset is complete");
    assert_eq!(fixture.hear(), Heard::Stopped);
}

/// The daemon's own channel.
mod backend {
    use cleave_common::vhost_user::{BackendRequest, Channel, Flags};

    use super::*;

    fn talkative() -> Script {
        let script = Script::default();
        Script { protocol_features: script.protocol_features | protocol::BACKEND_REQ, ..script }
    }

    fn fixture() -> (Fixture, Channel) {
        let fixture = session(talkative());
        let fd =
            fixture.daemon.wait_for(Request::SetBackendReqFd, 1, |seen| seen.fds[0].try_clone().unwrap());
        (fixture, Channel::new(fd.into()))
    }

    const CHANGED: BackendRequest = BackendRequest::ConfigChangeMsg;

    #[test]
    fn a_change_of_config_space_is_read_and_answered() {
        let (fixture, mut channel) = fixture();
        channel.send(CHANGED, Flags::REQUEST, &[], &[], None).unwrap();
        assert_eq!(fixture.hear_config().len(), 60);
        fixture.running();
        channel.send(CHANGED, Flags::NEED_REPLY, &[], &[], None).unwrap();
        let answer = channel.recv(Some(Instant::now() + SOON)).unwrap().unwrap();
        assert_eq!((answer.request, answer.payload::<u64>()), (CHANGED.into(), Ok(0)));
        assert_eq!(fixture.hear_config().len(), 60);
    }

    #[test]
    fn however_much_it_says_config_space_is_read_now_and_then() {
        let (fixture, mut channel) = fixture();
        for _ in 0..1000 {
            // A socket that takes no more is what is wanted, too.
            let _ = channel.send(CHANGED, Flags::REQUEST, &[], &[], Some(Instant::now() + SOON));
        }
        assert_eq!(fixture.hear_config().len(), 60);
        fixture.stopped();
        let reads = fixture.daemon.requests().iter().filter(|seen| **seen == Request::GetConfig).count();
        assert!(reads < 100, "{reads}");
    }

    #[test]
    fn what_it_may_not_say_closes_the_channel_and_nothing_else() {
        let says: [&dyn Fn(&mut Channel); 4] = [
            &|channel| channel.send(BackendRequest::VringCall, Flags::REQUEST, &[0; 8], &[], None).unwrap(),
            &|channel| channel.send(77u32, Flags::REQUEST, &[], &[], None).unwrap(),
            &|channel| channel.send(CHANGED, Flags::REQUEST, &[0; 8], &[], None).unwrap(),
            &|channel| {
                std::io::Write::write_all(&mut channel.socket(), b"GET / HTTP/1.1").unwrap();
            },
        ];
        for say in says {
            let (fixture, mut channel) = fixture();
            say(&mut channel);
            let end = channel.recv(Some(Instant::now() + SOON));
            assert!(matches!(end, Ok(None) | Err(cleave_common::vhost_user::ChannelError::Disconnected)));
            fixture.running();
        }
        let (fixture, channel) = fixture();
        drop(channel);
        fixture.running();
    }
}
