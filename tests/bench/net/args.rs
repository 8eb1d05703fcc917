//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

/// Measure vhost-user network daemons beside others in the same place, in turns, without a virtual machine
#[derive(Debug, Parser)]
#[command(name = "net-bench", args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,

    #[command(flatten)]
    pub measure: Measure,
}

const EXAMPLES: &str = "Examples:
  net-bench                                        cleave-net on a tap device beside a plain program on the same one
  net-bench --way forward --peers testpmd,switch   from one guest to another: cleave-net's switch beside DPDK's testpmd
  net-bench --socket /run/a.sock --socket /run/b.sock --peers testpmd   whatever connects these two, beside testpmd
  net-bench --socket /run/a.sock --way send        how fast whatever listens there takes frames
  net-bench --preset issue                         every row of the project's table, with its targets

Figures are frames a second, and frames a second of CPU time of the program that is measured: the kernel's work in its
name is part of it; what sends and receives at the other end is not. Frames of 64 and 1500 bytes are of a type that
nobody listens to; one of 64k is a TCP segment that is left to be cut.

Exit codes: 0 all is well; 1 something failed, or a measurement is missing (a target that is missed is shown, not an error:
machines differ); 2 the command line is wrong.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The plain program that the others are compared with
    #[command(hide = true)]
    Plain(Plain),
}

#[derive(Debug, clap::Args)]
pub struct Plain {
    #[arg(long)]
    pub tap: String,
    #[arg(long, value_enum)]
    pub way: Way,
    #[arg(long, value_parser = size)]
    pub size: Size,
    #[arg(long)]
    pub runtime: f64,
}

#[derive(Debug, clap::Args)]
pub struct Measure {
    /// Measure whatever listens on this vhost-user socket; twice: frames go in at the first and come out of the second
    #[arg(long, value_name = "PATH")]
    pub socket: Vec<PathBuf>,

    /// Which way frames go; all of its kind unless given
    #[arg(long, value_enum, value_delimiter = ',')]
    pub way: Vec<Way>,

    /// Bytes of a frame
    #[arg(long, value_delimiter = ',', default_values = ["64", "1500", "64k"], value_parser = size)]
    pub size: Vec<Size>,

    /// Pairs of queues
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=8))]
    pub queues: u16,

    /// Who is measured; the first is what the others are compared with. By default plain and cleave on a tap device,
    /// testpmd and switch from guest to guest
    #[arg(long, value_enum, value_delimiter = ',')]
    pub peers: Vec<Peer>,

    /// Seconds each turn lasts
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    pub runtime: f64,

    /// Turns of each peer; the medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    pub rounds: u16,

    /// How the driver learns of what is used; if not given, it polls when it sends or forwards, and there are CPUs for it
    #[arg(long, value_enum)]
    pub driver: Option<Driver>,

    /// Run what is measured on this CPU, and the driver and what else is needed on the others; the last one unless given
    #[arg(long, value_name = "CPU")]
    pub pin: Option<usize>,

    /// What the peers cleave-poll and switch-poll are given as --poll-us
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50)]
    pub poll_us: u32,

    /// All ways and sizes, on a tap device and from guest to guest, with the project's targets
    #[arg(long, value_enum, conflicts_with_all = ["socket", "way", "size", "peers", "queues"])]
    pub preset: Option<Preset>,

    /// One JSON document in place of the table
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    Issue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// From the guest into a tap device, or into whatever is behind one socket
    Send,
    /// From a tap device to the guest, or from whatever is behind one socket
    Receive,
    /// From one guest to another
    Forward,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// A program that does nothing but read or write, with the same offloads on the same tap device
    Plain,
    /// cleave-net --tap
    Cleave,
    /// cleave-net --tap and --poll-us
    CleavePoll,
    /// cleave-net with a switch of two ports
    Switch,
    /// The same with --poll-us
    SwitchPoll,
    /// DPDK's testpmd with vhost ports, which polls: without a tap device it makes or drops the frames itself
    Testpmd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// It looks all the time, as a busy guest does
    Poll,
    /// It sleeps until it is interrupted
    Interrupt,
}

/// Bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    Bytes(u16),
    /// The largest that is to be segmented.
    Segment,
}

impl Size {
    pub fn word(self) -> String {
        match self {
            Self::Bytes(bytes) => bytes.to_string(),
            Self::Segment => "64k".to_owned(),
        }
    }

    /// What a frame that nobody segments has; `None`: it is one to be segmented.
    pub fn bytes(self) -> Option<u16> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Segment => None,
        }
    }
}

/// The word for a value on the command line.
pub fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn size(text: &str) -> Result<Size, String> {
    match (text, text.parse::<u16>()) {
        ("64k", _) => Ok(Size::Segment),
        (_, Ok(bytes @ 60..=1514)) => Ok(Size::Bytes(bytes)),
        _ => Err("60 to 1514 bytes are needed, or 64k".to_owned()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("seconds from 0.05 to 3600 are needed".to_owned()),
    }
}
