//! cleave-block: a virtio-blk device (virtio 1.2, 5.2) as a vhost-user daemon.

mod config_space;
mod device;
mod disk;
mod queue;
mod request;
mod sandbox;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use cleave_common::cli;
use cleave_common::cpus::CpuList;
use cleave_common::exit::Failure;
use cleave_common::options;
use cleave_common::throttle::ThrottleConfig;
use cleave_runtime::{CommonArgs, Sandbox, Signals, print_capabilities};
use cleave_storage::{CacheMode, Image, ImageFormat, ImageOptions, Throttle};

use device::{Block, BlockError, BlockOptions};
use disk::OnFull;

/// Serve a disk image or a block device to a virtual machine, as virtio-blk over vhost-user
#[derive(Debug, Parser)]
#[command(name = "cleave-block", version, after_help = EXIT_CODES)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// The disk: an image file or a block device
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    blk_file: Option<PathBuf>,

    /// Refuse writes
    #[arg(long)]
    read_only: bool,

    /// Format of the disk
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,

    /// Where written data is when a write completes
    #[arg(long, value_enum, default_value_t = Cache::Writeback)]
    cache: Cache,

    /// Queues, each served by a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,

    /// What the guest reads as the disk's serial number: up to 20 bytes of ASCII
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = serial)]
    serial: String,

    /// What to do with a write that finds no room on the host's disk
    #[arg(long, value_enum, default_value_t = WhenFull::Error)]
    on_full: WhenFull,

    /// Let a queue's thread look for work this many microseconds before it sleeps, while that pays: quicker answers for
    /// CPU time
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    poll_us: u32,

    /// Run the queues' threads on these CPUs, in turn: 2,3 or 0-3
    #[arg(long, value_name = "LIST")]
    cpus: Option<CpuList>,

    /// Limit the disk's rates: iops-total=N,bps-write=SIZE,... as in QEMU's throttling
    ///
    /// A rate is iops- (requests a second) or bps- (bytes a second) and total, read or write. With -max behind it, it is
    /// the rate of a burst, which lasts -max-length seconds at most (1 unless given). iops-size=SIZE: a larger request
    /// counts as several. Flushes are not limited.
    #[arg(long, value_name = "KEYS", value_parser = throttle_config)]
    throttle: Option<ThrottleConfig>,
}

const EXIT_CODES: &str = "Exit codes: 0 asked to end, or the frontend of --fd went; 1 a bug, or the sandbox \
stopped a system call; 2 command line or disk wrong; 3 the host lacks something (permission, lock, io_uring); 135 memory that the \
frontend shares was cut off. SIGHUP looks at the disk again, SIGUSR1 says how it is. CLEAVE_LOG=debug says more.";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// The bytes of the file, or of the block device, are those of the disk
    Raw,
    /// An image of QEMU's, with the backing files it names: these are only read
    Qcow2,
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Cache {
    /// In the disk, or its own cache: past the host's page cache (O_DIRECT)
    None,
    /// In the host's page cache, until the guest flushes
    Writeback,
    /// On the disk; reads use the host's page cache
    Writethrough,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WhenFull {
    /// Tell the guest that the write failed
    Error,
    /// Keep it until there is room: tried again every second, and at SIGHUP
    Pause,
}

impl From<WhenFull> for OnFull {
    fn from(when: WhenFull) -> Self {
        match when {
            WhenFull::Error => Self::Error,
            WhenFull::Pause => Self::Pause,
        }
    }
}

impl From<Cache> for CacheMode {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::None => Self::None,
            Cache::Writeback => Self::Writeback,
            Cache::Writethrough => Self::Writethrough,
        }
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() <= request::ID_LEN && text.is_ascii() {
        Ok(text.to_owned())
    } else {
        Err(format!("up to {} bytes of ASCII are possible", request::ID_LEN))
    }
}

fn throttle_config(text: &str) -> Result<ThrottleConfig, String> {
    let config: ThrottleConfig = options::parse(text, None).map_err(|error| error.to_string())?;
    if config == ThrottleConfig::default() {
        return Err("nothing is limited: give a limit, as iops-total=500, or leave --throttle out".to_owned());
    }
    config.validate().map_err(|error| error.to_string())?;
    Ok(config)
}

fn main() -> std::process::ExitCode {
    cli::main(run)
}

fn run(args: Args) -> Result<(), Failure> {
    let (Some(path), false) = (args.blk_file, args.common.print_capabilities) else {
        return print_capabilities("block", &["read-only", "blk-file"]);
    };
    let (mode, max_queue_size) = (args.common.sandbox, args.common.queue_size);
    let socket = args.common.claim_socket()?;
    let signals = Signals::new().map_err(Failure::host)?;
    let (format, cache) = (args.format.into(), args.cache.into());
    let options = ImageOptions { path, format, read_only: args.read_only, cache };
    let image = Image::open(&options).map_err(BlockError::from)?;
    args.cpus.as_ref().map_or(Ok(()), cleave_runtime::cpus::check).map_err(BlockError::from)?;
    let endpoint = socket.open()?;
    let sandbox =
        Sandbox { program: "cleave-block", mode, syscalls: sandbox::SYSCALLS, ..Sandbox::default() };
    let confined = sandbox.enter(&endpoint)?;
    let options = BlockOptions {
        num_queues: args.num_queues,
        max_queue_size,
        serial: args.serial,
        on_full: args.on_full.into(),
        poll: Duration::from_micros(args.poll_us.into()),
        throttle: args.throttle.as_ref().and_then(Throttle::new),
        cpus: args.cpus,
    };
    let mut block = Block::new(image, options)?;
    cleave_runtime::run(&mut block, endpoint, &signals, &confined)
}
