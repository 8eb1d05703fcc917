use super::*;

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
    let side = Side::of(target(ours));
    kept.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(side.hear_lost(), "the daemon closed the connection");
    daemon.thread.join().unwrap();
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
