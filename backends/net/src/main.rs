//! cleave-net: a virtio-net device (virtio 1.2, 5.1) as a vhost-user daemon.

mod buffers;
mod checkpoint;
mod config_space;
mod control;
mod counters;
mod device;
mod filter;
mod limits;
mod pcap;
mod port;
mod queue;
mod sandbox;
mod shared;
mod switch;
mod tap;
mod user;

use std::fs;
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgGroup, Parser};
use cleave_common::cli;
use cleave_common::cpus::CpuList;
use cleave_common::exit::Failure;
use cleave_common::forward::PortForward;
use cleave_common::interface::{self, NotAnInterfaceName};
use cleave_common::mac::MacAddress;
use cleave_common::options;
use cleave_common::passt::{self, PasstOptions};
use cleave_common::throttle::NetThrottleConfig;
use cleave_runtime::{CommonArgs, Sandbox, Signals, capabilities_json, claim_descriptors, cpus};
use tracing::info;

use device::{MAX_PAIRS, Net, NetError, NetOptions};
use pcap::{MAX_SNAPLEN, Output};
use port::Port;
use switch::SwitchArgs;
use tap::{Tap, TapError, TapSource};
use user::{UserNetwork, UserOptions};

/// Connect a virtual machine to a network, as virtio-net over vhost-user
#[derive(Debug, Parser)]
#[command(name = "cleave-net", version, after_help = EXIT_CODES, after_long_help = LONG_HELP)]
#[command(group = ArgGroup::new("way").args(["tap", "tap_fd", "user", "switch", "print_capabilities"]).required(true).multiple(true))]
#[command(mut_arg("socket_path", |arg| arg.required_unless_present("switch")))]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    #[command(flatten)]
    switch: SwitchArgs,

    /// The tap device: opened if there is one of this name, else made, and removed in the end. A switch can do without
    #[arg(long, value_name = "NAME", conflicts_with = "tap_fd", value_parser = interface_name)]
    tap: Option<String>,

    /// A tap device that is open already, as this inherited descriptor; once for each pair of queues
    #[arg(long, value_name = "N")]
    tap_fd: Vec<RawFd>,

    /// No device of the host's, and no privilege: passt connects the guest, as a program of this user's
    #[arg(long, conflicts_with_all = ["tap", "tap_fd", "bridge", "queues", "switch"])]
    user: bool,

    /// Forward a port of the host's to the guest: tcp|udp:[ADDRESS:]HOSTPORT:GUESTPORT, such as tcp:2222:22; many times.
    /// It is listened on at 127.0.0.1 unless ADDRESS says where else
    #[arg(long, value_name = "SPEC", requires = "user", conflicts_with_all = ["tap", "tap_fd"])]
    hostfwd: Vec<PortForward>,

    /// Let the guest reach the host's own services, those on its loopback too, at the address of its gateway
    #[arg(long, value_name = "on|off", requires = "user", conflicts_with_all = ["tap", "tap_fd"], value_parser = on_or_off)]
    host: Option<bool>,

    /// The program passt, if it is not the one in PATH
    #[arg(long, value_name = "PATH", requires = "user", conflicts_with_all = ["tap", "tap_fd"], default_value = passt::PROGRAM)]
    passt: PathBuf,

    /// Make the tap device a port of this bridge
    #[arg(long, value_name = "NAME", value_parser = interface_name)]
    bridge: Option<String>,

    /// The guest's Ethernet address; one that follows from this host and the tap device's name unless given; with --user
    /// always the same one
    #[arg(long, value_name = "ADDRESS")]
    mac: Option<MacAddress>,

    /// Set the tap device's MTU, which is the guest's too; with --user the guest's alone, 65520 unless given
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..=65521))]
    mtu: Option<u16>,

    /// Pairs of queues (of each port of a switch), each queue served by a thread of its own
    #[arg(long, value_name = "N", conflicts_with = "tap_fd", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_PAIRS)))]
    queues: Option<u16>,

    /// Let a queue's thread look for work this many microseconds before it sleeps, while that pays: quicker answers for
    /// CPU time
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    poll_us: u32,

    /// Run the queues' threads on these CPUs, in turn: 2,3 or 0-3
    #[arg(long, value_name = "LIST")]
    cpus: Option<CpuList>,

    /// Limit the guest's rates: bps-rx=SIZE,pps-tx=N,... for what it receives (rx) and sends (tx)
    ///
    /// A rate is bps- (bytes a second) or pps- (packets a second) and rx or tx. With -max behind it, it is the rate of a
    /// burst, which lasts -max-length seconds at most (1 unless given). A frame that is to be segmented counts as the
    /// packets that it becomes. What is over the limit waits where it is, and is dropped there when there is too much of it.
    #[arg(long, value_name = "KEYS", value_parser = throttle_config)]
    throttle: Option<NetThrottleConfig>,

    /// Write all frames to this file, or to this named pipe, for tcpdump and Wireshark
    ///
    /// They may read it while it grows. A file that is such a capture already is gone on with. A pipe is fed while somebody
    /// reads it. The network never waits for either: what cannot be written in time is counted, and a disk that is full ends
    /// the capture.
    #[arg(long, value_name = "PATH")]
    pcap: Option<PathBuf>,

    /// Bytes of each frame that --pcap keeps
    #[arg(long, value_name = "BYTES", requires = "pcap", default_value_t = MAX_SNAPLEN, hide_default_value = true, value_parser = clap::value_parser!(u32).range(14..=i64::from(MAX_SNAPLEN)))]
    pcap_snaplen: u32,
}

const EXIT_CODES: &str = "Exit codes: 0 asked to end, or the frontend of --fd went; 1 a bug, or the sandbox stopped a \
system call; 2 command line wrong, or a device it names; 3 the host lacks something (permission, /dev/net/tun, passt), or the \
tap device is in use or has gone; 135 memory that the frontend shares was cut off. SIGUSR1 says how it is. CLEAVE_LOG=debug says more.";

const LONG_HELP: &str = "\
Examples:
  A tap device on a bridge, made and removed by the daemon (as root):
    ip link add br0 type bridge && ip link set br0 up
    cleave-net --socket-path /run/vm/net.sock --tap tap0 --bridge br0
  A tap device that root has made for a user, who runs the daemon:
    ip tuntap add dev tap0 mode tap multi_queue user alice && ip link set tap0 up
    cleave-net --socket-path /run/vm/net.sock --tap tap0 --queues 2
  A tap device from whoever starts the daemon (opened with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR):
    cleave-net --fd 3 --tap-fd 4
  A switch between guests, which listens on /run/net/port0 to port3; tap0 is the way to the world:
    cleave-net --switch /run/net --ports 4 --tap tap0 --bridge br0
  No tap device, and no privilege; the host's port 2222 leads to the guest's ssh:
    cleave-net --socket-path /run/vm/net.sock --user --hostfwd tcp:2222:22

A tap device that was made here stays when the daemon is killed, with its addresses and its bridge, and the next daemon
of the same --tap goes on with it; it is removed when the daemon ends in order (SIGTERM, or the frontend of --fd goes).

Exit codes:
  0    asked to end, or the frontend of --fd went
  1    a bug, or the sandbox stopped a system call
  2    the command line is wrong, or a device that it names
  3    the host lacks something (permission, /dev/net/tun, passt), or the tap device is in use or has gone
  135  memory that the frontend shares was cut off
SIGUSR1 says how it is: whether a frontend is connected, the link, and what was received, sent and dropped.
CLEAVE_LOG=debug says more.";

fn interface_name(text: &str) -> Result<String, NotAnInterfaceName> {
    interface::check(text).map(|()| text.to_owned())
}

fn throttle_config(text: &str) -> Result<NetThrottleConfig, String> {
    let config: NetThrottleConfig = options::parse(text, None).map_err(|error| error.to_string())?;
    if config == NetThrottleConfig::default() {
        return Err("nothing is limited: give a limit, as bps-rx=10M, or leave --throttle out".to_owned());
    }
    config.validate().map_err(|error| error.to_string())?;
    Ok(config)
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(args: Args) -> Result<(), Failure> {
    if args.common.print_capabilities {
        let json = capabilities_json("net", &[]);
        return writeln!(std::io::stdout(), "{json}").map_err(Failure::host);
    }
    if let Some(directory) = args.switch.switch.clone() {
        return run_switch(args, &directory);
    }
    let (mode, max_queue_size) = (args.common.sandbox, args.common.queue_size);
    let (socket, inherited) = args.common.claim_socket_and(&args.tap_fd)?;
    args.cpus.as_ref().map_or(Ok(()), cpus::check).map_err(NetError::from)?;
    let connection = Connection { mac: args.mac, mtu: args.mtu };
    // passt first: it would inherit blocked signals.
    let user = args.user.then(|| connection.to_user(args.passt, args.hostfwd, args.host.unwrap_or(false)));
    let user = user.transpose()?;
    let signals = Signals::new().map_err(Failure::host)?;
    let snaplen = args.pcap_snaplen;
    let capture = args.pcap.map(|path| Output::open(&path, snaplen)).transpose()?;
    let Ports { port, pairs, mac, ioctls } = match (user, args.tap) {
        (Some(user), _) => user,
        (None, Some(name)) => {
            let source = TapSource::Name(name, args.queues.unwrap_or(1));
            connection.to_tap(source, args.bridge.as_deref())?
        }
        (None, None) => connection
            .to_tap(TapSource::Inherited(all_open(&args.tap_fd, inherited)?), args.bridge.as_deref())?,
    };
    let endpoint = socket.open()?;
    let sandbox =
        Sandbox { program: "cleave-net", mode, syscalls: sandbox::SYSCALLS, ioctls, ..Sandbox::default() };
    let confined = sandbox.enter(&endpoint)?;
    let options = NetOptions {
        mac,
        pairs,
        max_queue_size,
        poll: Duration::from_micros(args.poll_us.into()),
        cpus: args.cpus,
        throttle: args.throttle.unwrap_or_default(),
        capture: capture.map(|output| (output, snaplen)),
    };
    let mut net = Net::new(port, options)?;
    cleave_runtime::run(&mut net, endpoint, &signals, &confined)
}

fn run_switch(args: Args, directory: &Path) -> Result<(), Failure> {
    switch::refuse([
        ("--socket-path", args.common.socket_path.is_some()),
        ("--fd", args.common.fd.is_some()),
        ("--mac (a port's is --port NAME,mac=ADDRESS)", args.mac.is_some()),
    ])?;
    switch::refuse_for_now([("--throttle", args.throttle.is_some()), ("--pcap", args.pcap.is_some())])?;
    let inherited = claim_descriptors(&args.tap_fd, None);
    let signals = Signals::new().map_err(Failure::host)?;
    args.cpus.as_ref().map_or(Ok(()), cpus::check).map_err(NetError::from)?;
    let source = match args.tap {
        Some(name) => Some(TapSource::Name(name, 1)),
        None if args.tap_fd.is_empty() => None,
        None => Some(TapSource::Inherited(all_open(&args.tap_fd, inherited)?)),
    };
    let tap = source.map(|source| Tap::open(source, args.bridge.as_deref(), args.mtu)).transpose()?;
    let common = switch::Common {
        mode: args.common.sandbox,
        pairs: args.queues.unwrap_or(1),
        max_queue_size: args.common.queue_size,
        mtu: args.mtu,
        poll: Duration::from_micros(args.poll_us.into()),
        cpus: args.cpus,
    };
    switch::serve(&args.switch, directory, tap, common, &signals)
}

/// What is asked of any port.
struct Connection {
    mac: Option<MacAddress>,
    mtu: Option<u16>,
}

/// A port, and what follows from it.
struct Ports {
    port: Arc<dyn Port>,
    pairs: u16,
    mac: MacAddress,
    ioctls: &'static [u64],
}

impl Connection {
    fn to_tap(&self, source: TapSource, bridge: Option<&str>) -> Result<Ports, Failure> {
        let pairs = match &source {
            TapSource::Name(_, pairs) => *pairs,
            TapSource::Inherited(queues) => queues.len() as u16,
        };
        let tap = Tap::open(source, bridge, self.mtu)?;
        let mac = self.mac.unwrap_or_else(|| derived_address(tap.name()));
        info!("{}: {pairs} pairs of queues, guest address {mac}", tap.name());
        let ioctls = if tap.is_ours() { sandbox::IOCTLS_OF_OURS } else { sandbox::IOCTLS };
        Ok(Ports { port: Arc::new(tap), pairs, mac, ioctls })
    }

    fn to_user(&self, program: PathBuf, forwards: Vec<PortForward>, host: bool) -> Result<Ports, Failure> {
        // Nobody but passt sees it.
        let mac = self.mac.unwrap_or_else(|| MacAddress::derived_from([b"user".as_slice()]));
        let mtu = self.mtu.unwrap_or(user::DEFAULT_MTU);
        if mtu > user::DEFAULT_MTU {
            return Err(Failure::usage(format!(
                "--mtu {mtu}: with --user it is at most {}",
                user::DEFAULT_MTU
            )));
        }
        let passt = PasstOptions { forwards, host, mtu: Some(mtu) };
        let port = UserNetwork::open(&UserOptions { program, passt, mtu }, mac)?;
        info!("passt: guest address {mac}");
        Ok(Ports { port: Arc::new(port), pairs: 1, mac, ioctls: &[] })
    }
}

fn on_or_off(text: &str) -> Result<bool, String> {
    options::switch(text).ok_or_else(|| "it is on or off".to_owned())
}

fn all_open(numbers: &[RawFd], descriptors: Vec<Option<OwnedFd>>) -> Result<Vec<OwnedFd>, TapError> {
    if numbers.len() > usize::from(MAX_PAIRS) {
        return Err(TapError::Inherited(format!(
            "{} pairs of queues are too many: {MAX_PAIRS} are possible",
            numbers.len()
        )));
    }
    let open = numbers.iter().zip(descriptors).map(|(number, descriptor)| {
        descriptor
            .ok_or_else(|| TapError::Inherited(format!("descriptor {number} is not open, or is given twice")))
    });
    open.collect()
}

/// The same each time on one host, another one on another host: both may be on one network.
fn derived_address(tap: &str) -> MacAddress {
    let host = fs::read("/etc/machine-id").unwrap_or_default();
    MacAddress::derived_from([host.as_slice(), tap.as_bytes()])
}
