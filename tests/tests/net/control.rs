//! The control queue (virtio 1.2, 5.1.6.5), and config space.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use cleave_common::vhost_user::FrontendRequest as Request;
use rustix::process::Signal;

use super::*;

/// Config space: address, status, pairs, MTU.
fn config(driver: &mut NetDriver) -> ([u8; 6], u16, u16, u16) {
    let bytes = driver.frontend.config(0, 12).unwrap();
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (bytes[..6].try_into().unwrap(), word(6), word(8), word(10))
}

fn wait_for_status(driver: &mut NetDriver, status: u16) {
    let deadline = Instant::now() + SOON;
    while config(driver).1 != status {
        assert!(Instant::now() < deadline, "the status is {}, not {status}", config(driver).1);
    }
}

/// Which of frames to us, to somebody else, to a group and to everybody come.
fn coming(net: &Net, driver: &mut NetDriver) -> [bool; 4] {
    [OURS, WORLDS, GROUP, EVERYBODY].map(|to| comes(net, driver, &frame(to, WORLDS, 3, 80)))
}

fn comes(net: &Net, driver: &mut NetDriver, sent: &[u8]) -> bool {
    net.wire.send(&WIRE_PLAIN, sent).unwrap();
    // This one always does: what was sent before has come, or will not. Its tag tells it.
    let last = frame(if driver_is_deaf(driver) { EVERYBODY } else { OURS }, WORLDS, 4, 81);
    net.wire.send(&WIRE_PLAIN, &last).unwrap();
    let first = driver.receive(0).unwrap().bytes;
    if first == last {
        return false;
    }
    assert_eq!((first.as_slice(), driver.receive(0).unwrap().bytes), (sent, last));
    true
}

/// Frames to its own address do not come: NOUNI.
fn driver_is_deaf(driver: &mut NetDriver) -> bool {
    driver.ram.read_byte(DEAF).unwrap() == 1
}

/// A byte of guest memory that nobody else uses.
const DEAF: u64 = 0x800;

fn mode(driver: &mut NetDriver, command: u8, on: bool) {
    assert_eq!(driver.control(0, command, &[on.into()]).unwrap(), 0, "mode {command}");
    if command == 4 {
        driver.ram.write(DEAF, &[on.into()]).unwrap();
    }
}

#[test]
fn modes_let_frames_through_as_they_say() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    assert_eq!(coming(&net, &mut driver), [true; 4]);
    mode(&mut driver, 0, false);
    assert_eq!(coming(&net, &mut driver), [true, false, false, true]);
    for (command, expected) in [
        (0, [true; 4]),
        (1, [true, false, true, true]),
        (2, [true, true, false, true]),
        (3, [true, false, false, true]),
        (4, [false, false, false, true]),
        (5, [true, false, false, false]),
    ] {
        mode(&mut driver, command, true);
        assert_eq!(coming(&net, &mut driver), expected, "mode {command}");
        mode(&mut driver, command, false);
    }
    assert_eq!(coming(&net, &mut driver), [true, false, false, true]);
    works(&net, &mut driver);
}

#[test]
fn tables_let_their_addresses_through() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    mode(&mut driver, 0, false);
    let table =
        |addresses: &[[u8; 6]]| [&(addresses.len() as u32).to_le_bytes()[..], &addresses.concat()].concat();
    let mut set = |unicast: &[[u8; 6]], multicast: &[[u8; 6]]| {
        assert_eq!(driver.control(1, 0, &[table(unicast), table(multicast)].concat()).unwrap(), 0);
        coming(&net, &mut driver)
    };
    assert_eq!(set(&[WORLDS], &[]), [true, true, false, true]);
    assert_eq!(set(&[], &[GROUP]), [true, false, true, true]);
    assert_eq!(set(&vec![[2; 6]; 65], &vec![[3; 6]; 64]), [true, true, false, true], "too many to know");
    assert_eq!(set(&[], &[]), [true, false, false, true]);
    assert_eq!(driver.control(1, 0, &[9; 9]).unwrap(), 1);
    assert_eq!(driver.control(1, 0, &vec![0; 19 << 10]).unwrap(), 1, "longer than any command");
}

#[test]
fn the_driver_may_change_its_address() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    mode(&mut driver, 0, false);
    assert_eq!(config(&mut driver).0, OURS);
    let new = [0x52, 0x54, 0, 0, 0, 9];
    assert_eq!(driver.control(1, 1, &new).unwrap(), 0);
    assert_eq!(config(&mut driver).0, new);
    net.wire.send(&WIRE_PLAIN, &frame(OURS, WORLDS, 1, 80)).unwrap();
    let sent = frame(new, WORLDS, 2, 80);
    reaches_the_guest(&net, &mut driver, &sent);
    assert_eq!(driver.control(1, 1, &GROUP).unwrap(), 1);
    assert_eq!(driver.control(1, 1, &[0; 6]).unwrap(), 1);
    assert_eq!(config(&mut driver).0, new);
    // A driver that starts over finds what was there at first.
    let socket = net.daemon.socket.clone();
    driver.reconnect(&socket, u64::MAX).unwrap();
    assert_eq!(config(&mut driver).0, OURS);
    driver.offer_many(0, 8, 2048).unwrap();
    assert_eq!(coming(&net, &mut driver), [true; 4]);
}

#[test]
fn vlans_come_when_they_were_added() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    mode(&mut driver, 0, false);
    let tagged = |vlan: u16| {
        let mut frame = frame(OURS, WORLDS, 3, 80);
        frame.splice(12..12, [[0x81, 0], (vlan | 0xe000).to_be_bytes()].concat());
        frame
    };
    assert!(!comes(&net, &mut driver, &tagged(7)) && comes(&net, &mut driver, &frame(OURS, WORLDS, 5, 80)));
    for vlan in [0u16, 7, 4095] {
        assert_eq!(driver.control(2, 0, &vlan.to_le_bytes()).unwrap(), 0);
        assert!(comes(&net, &mut driver, &tagged(vlan)), "{vlan}");
        assert_eq!(driver.control(2, 1, &vlan.to_le_bytes()).unwrap(), 0);
        assert!(!comes(&net, &mut driver, &tagged(vlan)), "{vlan}");
    }
    assert_eq!(driver.control(2, 0, &4096u16.to_le_bytes()).unwrap(), 1);
}

#[test]
fn a_driver_without_a_control_queue_gets_everything() {
    let Some(net) = start(&[]) else { return };
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    mode(&mut driver, 0, false);
    let socket = net.daemon.socket.clone();
    let _ = driver.frontend.channel.socket().shutdown(std::net::Shutdown::Both);
    driver.queues.pop();
    driver.reconnect(&socket, !feature::CTRL_VQ).unwrap();
    driver.offer_many(0, 8, 2048).unwrap();
    assert_eq!(coming(&net, &mut driver), [true; 4]);
}

#[test]
fn config_space_says_what_the_tap_device_is() {
    let Some((mut net, mut driver)) = start_with_driver(&["--mtu", "1400", "--queues", "3"]) else { return };
    assert_eq!(config(&mut driver), (OURS, 1, 3, 1400));
    assert!(network::ip("link show tap0").contains("mtu 1400"));
    network::ip("link set tap0 down");
    wait_for_status(&mut driver, 0);
    network::ip("link set tap0 up");
    wait_for_status(&mut driver, 1);
    net.wire = Wire::open("tap0").unwrap();
    works(&net, &mut driver);
    assert!(driver.frontend.set_config(0, &[2; 6]).is_err(), "it is the device's to write");
}

#[test]
fn commands_of_no_sense_are_answered_and_the_next_one_is_done() {
    let Some((_net, mut driver)) = start_with_driver(&[]) else { return };
    for (class, command, data) in
        [(9, 0, &[][..]), (0, 0, &[]), (0, 0, &[2]), (0, 9, &[1]), (3, 1, &[]), (255, 255, &[1; 99])]
    {
        assert_eq!(driver.control(class, command, data).unwrap(), 1, "{class}.{command}");
    }
    assert_eq!(
        driver.control(3, 0, &[]).unwrap(),
        0,
        "nobody has asked for an announcement, and none is too many"
    );
    assert_eq!(driver.control(0, 0, &[0]).unwrap(), 0);
}

#[test]
fn the_frontend_is_told_when_config_space_changes() {
    let Some((_net, mut driver)) = start_with_driver(&[]) else { return };
    let (ours, theirs) = UnixStream::pair().unwrap();
    driver.frontend.tell(Request::SetBackendReqFd, &(), &[theirs.as_fd()]).unwrap();
    ours.set_read_timeout(Some(SOON)).unwrap();
    let told = |what: &str| {
        let mut header = [0; 12];
        (&ours).read_exact(&mut header).expect(what);
        // BACKEND_CONFIG_CHANGE_MSG, version 1, no payload.
        assert_eq!(header, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "{what}");
    };
    network::ip("link set tap0 down");
    told("the link went down");
    assert_eq!(config(&mut driver).1, 0);
    network::ip("link set tap0 up");
    told("the link came up");
    assert_eq!(config(&mut driver).1, 1);
    assert_eq!(driver.control(1, 1, &[2, 0, 0, 0, 0, 9]).unwrap(), 0);
    told("another address");
    // Other interfaces are nothing to it, and neither are commands that change nothing that can be read.
    network::ip("link add br7 type bridge");
    assert_eq!(driver.control(0, 0, &[0]).unwrap(), 0);
    ours.set_read_timeout(Some(A_WHILE)).unwrap();
    assert!((&ours).read(&mut [0; 12]).is_err());
}

#[test]
fn what_the_driver_said_outlives_changes_under_its_rings() {
    let Some((net, mut driver)) = start_with_driver(&["--queues", "2"]) else { return };
    driver.offer_many(1, 64, 2048).unwrap();
    let new = [0x52, 0x54, 0, 0, 0, 9];
    mode(&mut driver, 0, false);
    assert_eq!(driver.control(1, 1, &new).unwrap(), 0);
    assert_eq!(driver.control(4, 0, &[2, 0]).unwrap(), 0);
    let before = config(&mut driver);
    // No frame has come yet: the receive queues are where a new driver's would be.
    driver.frontend.set_mem_table(&driver.ram).unwrap();
    assert_eq!(config(&mut driver), before);
    let features = driver.negotiated.acked;
    for logged in [features | LOG_ALL, features] {
        driver.frontend.tell(Request::SetFeatures, &logged, &[]).unwrap();
        assert_eq!(config(&mut driver), before);
    }
    assert!(!comes_to(&net, &mut driver, OURS, new));
}

/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;

/// Whether a frame to `to` comes before one to `known`, on whichever pair.
fn comes_to(net: &Net, driver: &mut NetDriver, to: [u8; 6], known: [u8; 6]) -> bool {
    for (seed, to) in [(1, to), (2, known)] {
        net.wire.send(&WIRE_PLAIN, &frame(to, WORLDS, seed, 90)).unwrap();
    }
    let deadline = Instant::now() + SOON;
    loop {
        for pair in 0..driver.pairs() {
            if let Some(came) = driver.receive_within(pair, A_WHILE).unwrap() {
                return came.bytes == frame(to, WORLDS, 1, 90);
            }
        }
        assert!(Instant::now() < deadline, "no frame comes");
    }
}

#[test]
fn a_report_does_not_swallow_a_change_of_the_link() {
    let Some((net, mut driver)) = start_with_driver(&[]) else { return };
    net.daemon.signal(Signal::STOP).unwrap();
    network::ip("link set tap0 down");
    net.daemon.signal(Signal::USR1).unwrap();
    net.daemon.signal(Signal::CONT).unwrap();
    wait_for_status(&mut driver, 0);
    net.daemon.wait_for_log("queues run; the link is").unwrap();
}

#[test]
fn a_renamed_tap_device_is_still_the_link() {
    let Some((_net, mut driver)) = start_with_driver(&[]) else { return };
    network::ip("link set tap0 down");
    network::ip("link set tap0 name tap9");
    network::ip("link set tap9 up");
    wait_for_status(&mut driver, 1);
    network::ip("link set tap9 down");
    wait_for_status(&mut driver, 0);
}
