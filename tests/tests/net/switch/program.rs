//! The switch as an administrator sees it.

use std::process::{Command, Stdio};

use cleave_tests::driver::binary;
use rustix::process::Signal;

use super::*;

/// It ends with this code and says these words.
fn refuses(args: &[&str], words: &str) {
    let output =
        Command::new(binary("cleave-net").unwrap()).stdin(Stdio::null()).args(args).output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    assert!(said.contains(words), "{args:?}: {said}");
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path().to_str().unwrap();
    refuses(&["--switch", here], "--ports N, or --port NAME");
    refuses(&["--switch", here, "--ports", "65"], "1..=64");
    refuses(&["--switch", here, "--ports", "0"], "1..=64");
    refuses(&["--switch", here, "--ports", "2", "--port", "a"], "cannot be used with");
    refuses(&["--switch", here, "--ports", "2", "--socket-path", "/tmp/x"], "leave --socket-path out");
    refuses(&["--switch", here, "--ports", "2", "--mac", "52:54:00:00:00:01"], "--port NAME,mac=ADDRESS");
    refuses(&["--switch", here, "--ports", "2", "--throttle", "bps-rx=1M"], "leave --throttle out");
    refuses(&["--switch", here, "--ports", "2", "--pcap", "/tmp/x"], "leave --pcap out");
    refuses(&["--switch", here, "--ports", "2", "--user"], "cannot be used with");
    refuses(
        &["--switch", here, "--port", "a", "--port", "b", "--port", "./a", "--port", "a"],
        "two ports are at",
    );
    refuses(&["--switch", here, "--port", "a,mak=1"], "did you mean 'mac'?");
    refuses(&["--switch", "/no/where", "--ports", "1"], "cannot make the directory /no/where");
    refuses(&["--ports", "2", "--tap", "tap0", "--socket-path", "/tmp/x"], "--switch");
    refuses(&["--isolate", "--tap", "tap0", "--socket-path", "/tmp/x"], "--switch");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn it_says_how_each_port_is_and_leaves_nothing_behind() {
    let mut bridge = bridge(3, &[]);
    let (mut a, mut b) = (bridge.driver(0), bridge.driver(1));
    meet((&mut a, 0), (&mut b, 1));
    bridge.daemon.signal(Signal::USR1).unwrap();
    for words in [
        "p0: a frontend is connected, 3 of 3 queues run; the link is up; ",
        "p1: a frontend is connected",
        "socket: no frontend is connected; the link is up; ",
        "3 ports, 2 addresses; no uplink",
    ] {
        bridge.daemon.wait_for_log(words).unwrap();
    }
    // SIGHUP asks for nothing that it has.
    bridge.daemon.signal(Signal::HUP).unwrap();
    bridge.daemon.wait_for_log("device{p1}: reloaded: nothing has changed").unwrap();
    meet((&mut b, 1), (&mut a, 0));
    bridge.daemon.signal(Signal::TERM).unwrap();
    assert_eq!(bridge.daemon.wait().unwrap().code(), Some(0));
    assert!(bridge.sockets.iter().all(|socket| !socket.exists()));
}

#[test]
fn each_port_has_an_address_of_its_own_that_stays() {
    let directory = tempfile::tempdir().unwrap();
    let start = || {
        Daemon::start_other(&binary("cleave-net").unwrap(), |socket| {
            let here = directory.path().display().to_string();
            let last = socket.display().to_string();
            ["--switch", &here, "--port", "a", "--port", "b", "--port", &last].map(str::to_owned).to_vec()
        })
        .unwrap()
    };
    let addresses = || {
        let _daemon = start();
        ["a", "b"].map(|name| {
            let mut driver = NetDriver::connect(&directory.path().join(name)).unwrap();
            driver.frontend.config(0, 6).unwrap()
        })
    };
    let [a, b] = addresses();
    assert_eq!((a[0] & 3, b[0] & 3), (2, 2), "local ones");
    assert_ne!(a, b);
    assert_eq!(addresses(), [a, b]);
}
