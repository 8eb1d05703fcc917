//! cleave-net --user with the passt that is installed, in a network of the test's own. Without one the tests say so.

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;

use cleave_tests::network::ip;
use rustix::process::Signal;

use super::*;

const GATEWAY: [u8; 4] = [192, 0, 2, 1];
const ADDRESS: [u8; 4] = [192, 0, 2, 2];

/// A network that passt takes for a host's, and that leads nowhere.
fn enter() -> Option<()> {
    let there = Command::new("passt").arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if there.is_err() {
        eprintln!("SKIPPED: passt is not installed: apt install passt");
        return None;
    }
    network::enter()?;
    ip("link set lo up");
    ip("link add out type bridge");
    ip("address add 192.0.2.2/24 dev out");
    ip("link set out up");
    ip("route add default via 192.0.2.1");
    Some(())
}

fn daemon(args: &[&str]) -> Daemon {
    Daemon::start("cleave-net", &[&["--user", "--mac", "52:54:00:00:00:01"], args].concat()).unwrap()
}

fn driver(daemon: &Daemon) -> NetDriver {
    let mut driver = NetDriver::connect(&daemon.socket).unwrap();
    driver.offer_many(0, 128, 2048).unwrap();
    driver
}

/// An IPv4 packet with UDP behind an Ethernet header; its checksum is left out (RFC 768).
fn udp(from: ([u8; 4], u16), to: ([u8; 4], u16), payload: &[u8]) -> Vec<u8> {
    let len = 8 + payload.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend((20 + len).to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    packet.extend([from.0, to.0].concat());
    let checksum = !fold(sum(&packet));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    for field in [from.1, to.1, len, 0] {
        packet.extend(field.to_be_bytes());
    }
    [&EVERYBODY[..], &OURS, &[8, 0], &packet, payload].concat()
}

/// A request for an address (RFC 2131, table 1).
fn dhcp_discover() -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78];
    message.resize(28, 0);
    message.extend(OURS);
    message.resize(236, 0);
    // The cookie; DHCPDISCOVER; the end.
    message.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
    message.resize(300, 0);
    udp(([0; 4], 68), ([255; 4], 67), &message)
}

/// The next frame that `is` what is waited for; passt has things to say by itself.
fn wait_for(driver: &mut NetDriver, is: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    loop {
        let frame = driver.receive(0).unwrap().bytes;
        if is(&frame) {
            return frame;
        }
    }
}

fn is_udp_from(frame: &[u8], port: u16) -> bool {
    frame.len() >= 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[34..36] == port.to_be_bytes()
}

fn gets_an_address(driver: &mut NetDriver) {
    driver.send(0, &PLAIN, &dhcp_discover()).unwrap();
    let offer = wait_for(driver, |frame| is_udp_from(frame, 67));
    assert_eq!(offer[42 + 16..42 + 20], ADDRESS, "the guest is given the host's own address");
    let option = |code: u8, value: &[u8]| [&[code, value.len() as u8], value].concat();
    for wanted in [option(3, &GATEWAY), option(26, &65520u16.to_be_bytes())] {
        assert!(offer.windows(wanted.len()).any(|options| options == wanted), "{wanted:?} is offered");
    }
}

#[test]
fn the_guest_gets_an_address_and_forwarded_ports_lead_to_it() {
    if enter().is_none() {
        return;
    }
    let daemon = daemon(&["--hostfwd", "tcp:2222:22", "--hostfwd", "udp:5353:53", "--host", "on"]);
    let mut driver = driver(&daemon);
    gets_an_address(&mut driver);
    // Somebody connects: the guest sees a SYN for its port.
    let connection = TcpStream::connect(("127.0.0.1", 2222)).unwrap();
    let syn = wait_for(&mut driver, |frame| frame.len() >= 54 && frame[23] == 6);
    assert_eq!((&syn[36..38], syn[47] & 0x12), (&22u16.to_be_bytes()[..], 2));
    drop(connection);
    // Datagrams of all sizes, there and back.
    let host = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
    host.set_read_timeout(Some(SOON)).unwrap();
    host.connect(("127.0.0.1", 5353)).unwrap();
    for len in [1, 1400, 30_000, 60_000] {
        let payload = frame(OURS, WORLDS, len, len as usize + 42).split_off(42);
        host.send(&payload).unwrap();
        let datagram =
            wait_for(&mut driver, |frame| frame.len() >= 42 && frame[23] == 17 && frame[36..38] == [0, 53]);
        assert!(datagram[42..] == payload, "a datagram of {len} bytes is damaged");
        let peer = (datagram[26..30].try_into().unwrap(), u16::from_be_bytes([datagram[34], datagram[35]]));
        driver.send(0, &PLAIN, &udp((ADDRESS, 53), peer, &payload)).unwrap();
        let mut back = vec![0; 65536];
        let count = host.recv(&mut back).unwrap();
        assert!(back[..count] == payload, "a datagram of {len} bytes comes back damaged");
    }
}

#[test]
fn the_hosts_own_services_are_its_own_unless_they_are_given() {
    if enter().is_none() {
        return;
    }
    let service = UdpSocket::bind(("127.0.0.1", 9999)).unwrap();
    service.set_read_timeout(Some(SOON)).unwrap();
    let asks = |driver: &mut NetDriver| {
        driver.send(0, &PLAIN, &udp((ADDRESS, 5000), (GATEWAY, 9999), b"hello")).unwrap()
    };
    let closed = daemon(&[]);
    let mut guest = driver(&closed);
    gets_an_address(&mut guest);
    asks(&mut guest);
    let open = daemon(&["--host", "on"]);
    let mut favoured = driver(&open);
    gets_an_address(&mut favoured);
    favoured.send(0, &PLAIN, &udp((ADDRESS, 5000), (GATEWAY, 9999), b"welcome")).unwrap();
    let mut said = [0; 100];
    let (count, _) = service.recv_from(&mut said).unwrap();
    assert_eq!(&said[..count], b"welcome", "what the other one said did not come");
}

#[test]
fn one_that_is_killed_has_a_successor_with_the_same_ports() {
    if enter().is_none() {
        return;
    }
    let mut daemon = daemon(&["--hostfwd", "tcp:2222:22"]);
    let mut driver = driver(&daemon);
    for kill in 1..=5 {
        gets_an_address(&mut driver);
        let log = daemon.log();
        let pid = log.lines().rev().find_map(|line| line.split_once("as process ")).unwrap().1;
        let pid: i32 = pid.split(';').next().unwrap().parse().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        daemon
            .wait_for_log(&format!("passt (process {pid}) was killed by signal 9; it is started again"))
            .unwrap();
        let again = |log: &str| log.matches("passt serves again").count();
        let deadline = std::time::Instant::now() + SOON;
        while again(&daemon.log()) < kill {
            assert!(std::time::Instant::now() < deadline, "{}", daemon.log());
            thread::sleep(Duration::from_millis(2));
        }
    }
    // The daemon, too: its successor finds the ports free soon enough.
    for _ in 0..3 {
        daemon.kill_and_restart().unwrap();
        driver.resume(&daemon.socket, None).unwrap();
        gets_an_address(&mut driver);
        TcpStream::connect(("127.0.0.1", 2222)).unwrap();
    }
}

#[test]
fn a_port_that_is_taken_is_passts_word() {
    if enter().is_none() {
        return;
    }
    let _taken = TcpListener::bind(("127.0.0.1", 2222)).unwrap();
    let Err(error) = Daemon::start("cleave-net", &["--user", "--hostfwd", "tcp:2222:22"]) else {
        panic!("it is served")
    };
    let said = error.to_string();
    assert!(
        said.contains("exit status: 3") && said.contains("passt does not serve: it ended with exit code 1: "),
        "{said}"
    );
    assert!(said.contains("127.0.0.1/2222:22"), "{said}");
}
