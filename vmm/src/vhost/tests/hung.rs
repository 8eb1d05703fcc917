use super::*;

fn watched(script: Script, deadline: Duration) -> Fixture {
    watched_within(script, deadline, None)
}

fn watched_within(script: Script, deadline: Duration, io: Option<Duration>) -> Fixture {
    let (daemon, socket) = Daemon::pair(script);
    let patience = Patience { look: SHORT / 10, io, ..patience(deadline) };
    let side = Side::of(Target { patience, ..target(socket) });
    Fixture { daemon, side, serial: 0 }
}

fn asked(fixture: &Fixture) -> usize {
    fixture.daemon.requests().iter().filter(|request| **request == Request::GetFeatures).count()
}

#[test]
fn a_daemon_that_gets_on_or_has_nothing_to_do_is_not_asked() {
    let fixture = watched(Script::default(), Duration::from_secs(5));
    fixture.running();
    thread::sleep(SHORT);
    assert_eq!(asked(&fixture), 1, "in the handshake");
    fixture.move_to(5, 1);
    fixture.daemon.wait_for(Request::GetFeatures, 3, |_| ());
    fixture.stopped();
}

#[test]
fn one_of_ours_that_hangs_is_replaced_once_it_has_been_ended() {
    let mut fixture = watched(recording(), SHORT);
    fixture.running();
    fixture.daemon.hold();
    fixture.move_to(5, 1);
    fixture.hear_lost();
    // Killed, its socket closes before anyone can bring another.
    fixture.daemon.end();
    fixture.replace(recording());
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
}

#[test]
fn a_reset_waits_for_the_end_of_one_of_ours_that_hangs() {
    let fixture = watched(recording(), SHORT * 4);
    fixture.running();
    fixture.daemon.hold();
    fixture.move_to(5, 1);
    fixture.hear_lost();
    fixture.mailbox.stop();
    fixture.hears_nothing();
    fixture.daemon.end();
    assert_eq!(fixture.hear(), Heard::Stopped);
}

/// Its session answers: only an end to patience, which somebody has to set, tells it from a slow disk.
#[test]
fn one_of_ours_that_completes_nothing_is_replaced_where_patience_has_an_end() {
    let patient = watched(recording(), Duration::from_secs(5));
    patient.running();
    patient.move_to(5, 1);
    let mut fixture = watched_within(recording(), Duration::from_secs(5), Some(SHORT));
    fixture.running();
    fixture.move_to(5, 1);
    let reason = fixture.hear_lost();
    assert!(reason.starts_with("the daemon answers, but has completed nothing of queue 0"), "{reason}");
    fixture.daemon.end();
    fixture.replace(recording());
    assert_eq!(fixture.hear(), Heard::Reconnected(0));
    patient.hears_nothing();
    patient.stopped();
}
