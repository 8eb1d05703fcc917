//! cleave-block: a virtio-blk device (virtio 1.2, 5.2) as a vhost-user daemon.

mod config_space;
mod device;
mod disk;
mod queue;
mod request;
mod sandbox;

use std::io::Write;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use cleave_common::exit::{ExitCode, Failure};
use cleave_common::logging;
use cleave_runtime::{CommonArgs, Sandbox, Signals, capabilities_json};
use cleave_storage::{CacheMode, Image, ImageOptions};

use device::{Block, BlockError, BlockOptions};

/// Serve a disk image or a block device to a virtual machine, as virtio-blk over vhost-user
#[derive(Debug, Parser)]
#[command(name = "cleave-block", version, after_help = EXIT_CODES)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// The disk: a raw image file or a block device
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

    /// Entries of the largest queue a frontend may set up: a power of two
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = queue_size)]
    queue_size: u16,

    /// What the guest reads as the disk's serial number: up to 20 bytes of ASCII
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = serial)]
    serial: String,
}

const EXIT_CODES: &str = "Exit codes: 0 asked to end, or the frontend of --fd went; 2 command line or disk wrong; \
3 the host lacks something (permission, lock, io_uring); 135 memory that the frontend shares was cut off; 159 the sandbox forbids a \
system call. SIGHUP looks at the disk again. CLEAVE_LOG=debug says more.";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Raw,
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

impl From<Cache> for CacheMode {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::None => Self::None,
            Cache::Writeback => Self::Writeback,
            Cache::Writethrough => Self::Writethrough,
        }
    }
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (2..=32768).contains(&size) => Ok(size),
        _ => Err("a power of two from 2 to 32768 is needed".to_owned()),
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() <= request::ID_LEN && text.is_ascii() {
        Ok(text.to_owned())
    } else {
        Err(format!("up to {} bytes of ASCII are possible", request::ID_LEN))
    }
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    logging::init();
    match run(args) {
        Ok(()) => ExitCode::Success.into(),
        Err(failure) => {
            eprintln!("cleave-block: {failure}");
            failure.code.into()
        }
    }
}

fn run(args: Args) -> Result<(), Failure> {
    let (Some(path), false) = (args.blk_file, args.common.print_capabilities) else {
        let json = capabilities_json("block", &["read-only", "blk-file"]);
        return writeln!(std::io::stdout(), "{json}").map_err(Failure::host);
    };
    let mode = args.common.sandbox;
    let socket = args.common.claim_socket()?;
    let signals = Signals::new().map_err(Failure::host)?;
    let Format::Raw = args.format;
    let options = ImageOptions { path, read_only: args.read_only, cache: args.cache.into() };
    let image = Image::open(&options).map_err(BlockError::from)?;
    let endpoint = socket.open()?;
    let sandbox = Sandbox { mode, syscalls: sandbox::SYSCALLS, ioctls: sandbox::IOCTLS };
    let confined = sandbox.enter(&endpoint)?;
    let mut block = Block::new(
        image,
        BlockOptions { num_queues: args.num_queues, max_queue_size: args.queue_size, serial: args.serial },
    )?;
    cleave_runtime::run(&mut block, endpoint, &signals, &confined)
}
