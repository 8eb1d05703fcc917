//! cleave-net between a driver and a network of the test's own.
//!
//! Each test has a network namespace; where the user may not make one, it says so and is over.

mod control;
mod frames;
mod hostile;
mod kill;
mod limits;
mod pairs;
mod pcap;
mod program;
mod switch;
mod user;
mod user_real;

use std::time::Duration;

use cleave_tests::driver::{Daemon, HEADER_LEN, NetDriver};
use cleave_tests::network::{self, EXPERIMENT, PACKET_HEADER_LEN, Wire};

/// The guest, the world, and a group of both's.
const OURS: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const WORLDS: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
const EVERYBODY: [u8; 6] = [0xff; 6];

/// A header that says nothing.
const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];
const WIRE_PLAIN: [u8; PACKET_HEADER_LEN] = [0; PACKET_HEADER_LEN];

/// Long enough for a frame that would come to come.
const A_WHILE: Duration = Duration::from_millis(100);
const SOON: Duration = Duration::from_secs(10);

/// Feature bits (virtio 1.2, 5.1.3).
mod feature {
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const GUEST_GSO: u64 = 1 << 7 | 1 << 8 | 1 << 9 | 1 << 54 | 1 << 55;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
}

struct Net {
    daemon: Daemon,
    wire: Wire,
}

/// cleave-net on `tap0` in a network of this test's own; the guest has the address [`OURS`].
fn start(args: &[&str]) -> Option<Net> {
    network::enter()?;
    Some(start_here(args))
}

fn start_here(args: &[&str]) -> Net {
    let args: Vec<&str> =
        ["--tap", "tap0", "--mac", "52:54:00:00:00:01"].into_iter().chain(args.iter().copied()).collect();
    let daemon = Daemon::start("cleave-net", &args).unwrap();
    Net { daemon, wire: Wire::open("tap0").unwrap() }
}

/// As [`start`], with a driver that has every feature and buffers to receive.
fn start_with_driver(args: &[&str]) -> Option<(Net, NetDriver)> {
    let net = start(args)?;
    let mut driver = NetDriver::connect(&net.daemon.socket).unwrap();
    driver.offer_many(0, 64, 2048).unwrap();
    Some((net, driver))
}

/// A frame of `len` bytes whose content follows from `seed`.
fn frame(to: [u8; 6], from: [u8; 6], seed: u64, len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from, &EXPERIMENT].concat();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while frame.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        frame.push(state as u8);
    }
    frame
}

/// Sends a frame to the guest, and has it come.
fn reaches_the_guest(net: &Net, driver: &mut NetDriver, frame: &[u8]) {
    net.wire.send(&WIRE_PLAIN, frame).unwrap();
    let received = driver.receive(0).unwrap();
    assert_eq!(received.bytes, frame);
}

/// Sends a frame from the guest, and has it come.
fn reaches_the_world(net: &Net, driver: &mut NetDriver, frame: &[u8]) {
    driver.send(0, &PLAIN, frame).unwrap();
    assert_eq!(net.wire.receive(SOON).expect("a frame").1, frame);
}

/// Both directions still work.
fn works(net: &Net, driver: &mut NetDriver) {
    reaches_the_guest(net, driver, &frame(OURS, WORLDS, 7, 100));
    reaches_the_world(net, driver, &frame(WORLDS, OURS, 8, 100));
}

/// An IPv4 packet with TCP from one port to another, behind an Ethernet header; its checksums are left to others but for
/// the sum of the pseudo header.
fn tcp(to: [u8; 6], from: [u8; 6], ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let (source, target) = ([10, 0, 0, 2], [10, 0, 0, 1]);
    let tcp_len = 20 + payload.len();
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + tcp_len) as u16).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0]);
    ip.extend(source);
    ip.extend(target);
    let sum = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut segment = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    // Sequence numbers; 5 words of header; ACK; window; checksum; urgent pointer.
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [&source[..], &target, &[0, 6], &(tcp_len as u16).to_be_bytes()].concat();
    segment[16..18].copy_from_slice(&fold(self::sum(&pseudo)).to_be_bytes());
    [&to[..], &from, &[8, 0], &ip, &segment, payload].concat()
}

fn sum(bytes: &[u8]) -> u32 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    bytes.chunks(2).map(word).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Whether the TCP checksum of a whole frame is right.
fn tcp_sum_holds(frame: &[u8]) -> bool {
    let (addresses, segment) = (&frame[26..34], &frame[34..]);
    let pseudo = [addresses, &[0, 6], &(segment.len() as u16).to_be_bytes()].concat();
    fold(sum(&pseudo) + sum(segment)) == 0xffff
}
