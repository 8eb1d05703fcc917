//! cleave-net as an administrator or a service manager sees it: flags, tap devices and bridges, signals, exit codes.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use cleave_tests::driver::binary;
use cleave_tests::network::ip;
use command_fds::{CommandFdExt, FdMapping};
use rustix::process::Signal;

use super::*;

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(binary("cleave-net").unwrap());
    command.stdin(Stdio::null()).args(args);
    command
}

/// Runs it to its end: the exit code and what it said.
fn outcome(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

/// It ends with this code and says these words.
fn refuses(args: &[&str], code: i32, words: &str) {
    let socket = std::env::temp_dir().join(format!("never-{}", std::process::id()));
    let (ended, said) = outcome(program(&["--socket-path", socket.to_str().unwrap()]).args(args));
    assert_eq!(ended, Some(code), "{args:?}: {said}");
    assert!(said.contains(words), "{args:?}: {said}");
    assert!(!socket.exists(), "it leaves no socket behind");
}

fn exists(interface: &str) -> bool {
    ip("-o link").contains(&format!(": {interface}:"))
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    if network::enter().is_none() {
        return;
    }
    refuses(&[], 2, "--tap");
    refuses(&["--tap", "tap0", "--tap-fd", "5"], 2, "cannot be used with");
    refuses(&["--tap", "a-name-of-16-byt"], 2, "1 to 15 bytes");
    refuses(&["--tap", "tap%d"], 2, "1 to 15 bytes");
    refuses(&["--tap", "tap0", "--mac", "01:00:5e:00:00:01"], 2, "no address of one interface");
    refuses(&["--tap", "tap0", "--mac", "52:54"], 2, "write it as 52:54:00:12:34:56");
    refuses(&["--tap", "tap0", "--mtu", "67"], 2, "68");
    refuses(&["--tap", "tap0", "--mtu", "65522"], 2, "65521");
    refuses(&["--tap", "tap0", "--queues", "0"], 2, "1..=64");
    refuses(
        &["--tap", "tap0", "--bridge", "br9"],
        2,
        "there is no bridge br9: make it first: ip link add br9 type bridge",
    );
    refuses(&["--tap-fd", "77"], 2, "descriptor 77 is not open");
    refuses(&["--tap", "lo"], 2, "no tap device that this can use");
    ip("link add dummy9 type bridge");
    refuses(&["--tap", "dummy9"], 2, "no tap device that this can use");
    ip("tuntap add dev one mode tap");
    refuses(&["--tap", "one", "--queues", "2"], 2, "multi_queue");
    assert!(!exists("tap0"), "what could not be served was not left behind");
}

#[test]
fn who_may_not_make_one_is_told_how_it_is_made() {
    if network::enter().is_none() {
        return;
    }
    // The device file may be root's alone, and the program where nobody else may look.
    let program = std::env::temp_dir().join(format!("cleave-net-{}", std::process::id()));
    std::fs::copy(binary("cleave-net").unwrap(), &program).unwrap();
    let mut command = Command::new(&program);
    command.args(["--socket-path", "/tmp/never", "--tap", "tap0"]).uid(65534).gid(65534);
    let (code, said) = outcome(&mut command);
    std::fs::remove_file(&program).unwrap();
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("CAP_NET_ADMIN") && said.contains("ip tuntap add") || said.contains("/dev/net/tun"),
        "{said}"
    );
}

#[test]
fn a_tap_device_is_made_joins_its_bridge_and_is_removed_in_the_end() {
    if network::enter().is_none() {
        return;
    }
    ip("link add br0 type bridge");
    let mut net = start_here(&["--bridge", "br0"]);
    let shown = ip("-d link show tap0");
    for words in
        ["master br0", "state ", ",UP", "multi_queue", "vnet_hdr", "persist on", "alias made by cleave-net"]
    {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    // Killed, it leaves everything for its successor, which removes it.
    ip("addr add 10.1.1.1/24 dev tap0");
    net.daemon.signal(Signal::KILL).unwrap();
    net.daemon.wait().unwrap();
    assert!(exists("tap0"));
    net.daemon.kill_and_restart().unwrap();
    let shown = ip("addr show tap0");
    assert!(shown.contains("10.1.1.1/24") && shown.contains("master br0"), "{shown}");
    net.daemon.signal(Signal::TERM).unwrap();
    assert_eq!(net.daemon.wait().unwrap().code(), Some(0));
    assert!(!exists("tap0"));
}

#[test]
fn a_tap_device_of_somebody_elses_stays_as_it_was() {
    if network::enter().is_none() {
        return;
    }
    for (kind, args) in [("multi_queue", &["--queues", "2"][..]), ("", &[])] {
        ip(&format!("tuntap add dev tap0 mode tap {kind}"));
        let mut net = start_here(args);
        net.daemon.wait_for_log("tap0 is down").unwrap();
        ip("link set tap0 up");
        net.wire = Wire::open("tap0").unwrap();
        let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
        driver.offer_many(0, 64, 2048).unwrap();
        works(&net, &mut driver);
        net.daemon.signal(Signal::TERM).unwrap();
        assert_eq!(net.daemon.wait().unwrap().code(), Some(0));
        assert!(exists("tap0"));
        ip("link del tap0");
    }
}

#[test]
fn one_tap_device_serves_one_daemon() {
    let Some(net) = start(&[]) else { return };
    refuses(&["--tap", "tap0"], 3, "tap0 is in use by another program");
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    driver.offer_many(0, 64, 2048).unwrap();
    works(&net, &mut driver);
    // One bridge is enough for it.
    ip("link add br0 type bridge");
    ip("link add br1 type bridge");
    drop(net);
    ip("link set tap0 master br1");
    refuses(&["--tap", "tap0", "--bridge", "br0"], 2, "is a port of another bridge than br0");
}

#[test]
fn a_tap_device_that_is_removed_ends_the_daemon() {
    let Some((mut net, mut driver)) = start_with_driver(&[]) else { return };
    works(&net, &mut driver);
    ip("link del tap0");
    assert_eq!(net.daemon.wait().unwrap().code(), Some(3));
    assert!(net.daemon.log().contains("the tap device is gone"), "{}", net.daemon.log());
    // The next one makes another.
    net.daemon.kill_and_restart().unwrap();
    assert!(exists("tap0"));
}

#[test]
fn an_inherited_tap_device_is_served_as_it_is() {
    if network::enter().is_none() {
        return;
    }
    let queues: Vec<_> = (0..2).map(|_| network::open_tap("tap7", true).unwrap()).collect();
    ip("link set tap7 up");
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut command = program(&["--fd", "3", "--tap-fd", "5", "--tap-fd", "4", "--mac", "52:54:00:00:00:01"]);
    let mut child_fd = 3;
    let mut map = |parent_fd| {
        child_fd += 1;
        FdMapping { parent_fd, child_fd: child_fd - 1 }
    };
    let mappings = std::iter::once(theirs.into()).chain(queues).map(&mut map).collect();
    let mut child = command.fd_mappings(mappings).unwrap().spawn().unwrap();
    // The descriptors are the daemon's alone now.
    drop(command);
    let mut driver = NetDriver::start(cleave_tests::driver::Frontend::over(ours), u64::MAX, 64).unwrap();
    assert_eq!(driver.pairs(), 2);
    driver.offer_many(0, 32, 2048).unwrap();
    let wire = Wire::open("tap7").unwrap();
    wire.send(&WIRE_PLAIN, &frame(OURS, WORLDS, 1, 99)).unwrap();
    assert_eq!(driver.receive(0).unwrap().bytes, frame(OURS, WORLDS, 1, 99));
    driver.send(1, &PLAIN, &frame(WORLDS, OURS, 2, 99)).unwrap();
    assert_eq!(wire.receive(SOON).expect("a frame").1, frame(WORLDS, OURS, 2, 99));
    drop(driver);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_tap_device_without_headers_is_refused() {
    if network::enter().is_none() {
        return;
    }
    let queue = network::open_tap("tap7", false).unwrap();
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut command = program(&["--fd", "3", "--tap-fd", "4"]);
    let fds = vec![
        FdMapping { parent_fd: theirs.into(), child_fd: 3 },
        FdMapping { parent_fd: queue, child_fd: 4 },
    ];
    let (code, said) = outcome(command.fd_mappings(fds).unwrap());
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("tap7 has to be opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"), "{said}");
}

#[test]
fn addresses_differ_by_tap_device_and_stay() {
    if network::enter().is_none() {
        return;
    }
    let address = |tap: &str| {
        let daemon = Daemon::start("cleave-net", &["--tap", tap]).unwrap();
        let mut driver = NetDriver::connect(&daemon.socket).unwrap();
        driver.frontend.config(0, 6).unwrap()
    };
    let first = address("tap0");
    assert_eq!(first[0] & 3, 2, "a local one");
    assert_eq!(address("tap0"), first);
    assert_ne!(address("tap1"), first);
}

#[test]
fn it_says_what_it_can_do() {
    let (code, said) = outcome(&mut program(&["--print-capabilities"]));
    assert_eq!((code, said.trim()), (Some(0), r#"{"type": "net", "features": []}"#));
}
