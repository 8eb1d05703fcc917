//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use cleave_common::size::ByteSize;

/// Measure vhost-user block daemons beside fio's io_uring on the same file, in turns, without a virtual machine
#[derive(Debug, Parser)]
#[command(name = "block-bench", args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,

    #[command(flatten)]
    pub measure: Measure,
}

const EXAMPLES: &str = "Examples:
  block-bench --scratch /var/tmp --rw randread --depth 32      fio, qemu-storage-daemon and cleave-block on a new file
  block-bench --socket /run/disk.sock --rw read --bs 128k      whatever listens there
  block-bench --preset issue                                   every row of the project's table, with its targets
  block-bench conformance --socket /run/disk.sock --overwrite  what it does right and wrong
  block-bench kill --kills 1000                                cleave-block is killed under verified load

Exit codes: 0 all is well; 1 something failed, a check did, or a measurement is missing (a target that is missed is
shown, not an error: machines differ); 2 the command line is wrong.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check what any vhost-user block backend has to do
    Conformance(Conformance),
    /// Kill cleave-block at random moments under verified load, and look what is lost
    Kill(Kill),
}

#[derive(Debug, clap::Args)]
pub struct Measure {
    #[command(flatten)]
    pub disk: Disk,

    /// Measure whatever listens on this vhost-user socket, too; alone, if no file is given
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// A set of rows at once, in place of --rw, --bs, --depth and --queues
    #[arg(long, value_enum, conflicts_with_all = ["file", "socket", "format", "peers", "rw", "rwmixread", "bs", "depth", "queues"])]
    pub preset: Option<Preset>,

    /// Where --preset makes its files in memory
    #[arg(long, value_name = "DIR", default_value = "/dev/shm", requires = "preset")]
    pub tmpfs: PathBuf,

    /// Only the rows of --preset with this in their names (repeat it for more)
    #[arg(long, value_name = "TEXT", requires = "preset")]
    pub only: Vec<String>,

    /// Who is measured; the first is what the others are compared with
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Peer::Fio, Peer::Qsd, Peer::Cleave])]
    pub peers: Vec<Peer>,

    #[arg(long, value_enum, default_value_t = Pattern::Randread)]
    pub rw: Pattern,

    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    #[arg(help = "Of a hundred requests of randrw, so many are reads [default: 70]")]
    pub rwmixread: Option<u8>,

    /// Bytes a request
    #[arg(long, default_value = "4k", value_parser = block_size)]
    pub bs: ByteSize,

    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub depth: u16,

    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// Seconds each turn lasts
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = seconds)]
    pub runtime: f64,

    /// Turns of each peer; the medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    pub rounds: u16,

    /// Write into each block where it belongs and which write it came from, and check every block that is read. fio is
    /// left out, and the figures are those of a slower driver
    #[arg(long)]
    pub verify: bool,

    /// How the driver learns of completions; if not given, it polls where there are more CPUs than queues: elsewhere a
    /// thread that polls would take the time of those that are measured
    #[arg(long, value_enum)]
    pub driver: Option<Driver>,

    /// Threads that share the queues when the driver polls: half of the CPUs if not given, so that the daemon has the
    /// others
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub driver_threads: Option<u16>,

    /// Run fio and the daemons on this CPU and the driver on the others. Which CPU takes the disk's interrupts makes more
    /// difference than anything else on a small machine, so that it is to be the same for all
    #[arg(long, value_name = "CPU")]
    pub pin: Option<usize>,

    #[arg(long, value_name = "MICROSECONDS")]
    #[arg(help = "What the peer cleave-poll is given as --poll-us [default: 50]")]
    pub poll_us: Option<u32>,

    /// One JSON document in place of the table
    #[arg(long)]
    pub json: bool,
}

/// What the peers that this program starts serve.
#[derive(Debug, clap::Args)]
pub struct Disk {
    /// The file that all of them read or write
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,

    /// Format of --file, or of what is made
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub format: Format,

    /// Make a file in this directory, full of random bytes, and remove it at the end
    #[arg(long, value_name = "DIR", conflicts_with = "file")]
    pub scratch: Option<PathBuf>,

    /// Size of a file that is made
    #[arg(long, default_value = "1G", conflicts_with = "file", value_parser = disk_size)]
    pub size: ByteSize,

    /// Yes, write to --file, or to the disk behind --socket: what is on it is lost
    #[arg(long)]
    pub overwrite: bool,
}

#[derive(Debug, clap::Args)]
pub struct Conformance {
    #[command(flatten)]
    pub disk: Disk,

    /// Check whatever listens on this vhost-user socket; checks that write need --overwrite
    #[arg(long, value_name = "PATH", conflicts_with_all = ["file", "scratch", "size", "format"])]
    pub socket: Option<PathBuf>,

    /// Start this daemon
    #[arg(long, value_enum, default_value_t = Peer::Cleave, conflicts_with = "socket")]
    pub peer: Peer,

    /// Only checks with this in their names (repeat it for more)
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,

    /// One JSON document in place of the list
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
pub struct Kill {
    #[command(flatten)]
    pub disk: Disk,

    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub kills: u32,

    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub depth: u16,

    #[arg(long, default_value = "4k", value_parser = block_size)]
    pub bs: ByteSize,

    #[arg(long, value_enum, default_value_t = Cache::None)]
    pub cache: Cache,

    /// The moments of the kills follow from it; any if not given
    #[arg(long)]
    pub seed: Option<u64>,

    /// More words for cleave-block
    #[arg(last = true)]
    pub daemon: Vec<String>,

    /// One JSON document
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Random and sequential, on a disk and in memory, raw and qcow2, with the targets of the project
    Issue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// fio with io_uring and O_DIRECT
    Fio,
    /// qemu-storage-daemon with io_uring and O_DIRECT
    Qsd,
    /// cleave-block with --cache none
    Cleave,
    /// cleave-block with --cache none and --poll-us
    CleavePoll,
    /// cleave-scsi, with the image as a disk, cache=none
    CleaveScsi,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Raw,
    Qcow2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    None,
    Writeback,
    Writethrough,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// It looks all the time, as a busy guest does: measures the daemon
    Poll,
    /// It sleeps until it is interrupted, as an idle guest does: measures how fast this machine wakes threads, too
    Interrupt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    Randread,
    Randwrite,
    Randrw,
    Read,
    Write,
}

impl Pattern {
    pub fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite | Self::Randrw)
    }

    pub fn writes(self) -> bool {
        !matches!(self, Self::Randread | Self::Read)
    }
}

/// The word for a value on the command line.
pub fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn block_size(text: &str) -> std::result::Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}"))?;
    if size.bytes() == 0 || !size.bytes().is_multiple_of(512) || size.bytes() > 1 << 20 {
        return Err("a multiple of 512 up to 1M is needed".to_owned());
    }
    Ok(size)
}

fn disk_size(text: &str) -> std::result::Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}"))?;
    if size.bytes() < 1 << 20 || !size.bytes().is_multiple_of(4096) {
        return Err("a multiple of 4k from 1M on is needed".to_owned());
    }
    Ok(size)
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("seconds from 0.01 to 86400 are needed".to_owned()),
    }
}
