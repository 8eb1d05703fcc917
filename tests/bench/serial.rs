//! Moves bytes through a port of cleave-serial, without a virtual machine: how fast, for how much of a CPU, and whether all
//! of them arrive.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use cleave_tests::driver::console::CHUNK;
use cleave_tests::driver::{ConsoleDriver, Daemon, PATIENCE};

/// Measure cleave-serial: bytes through one port, from the guest and to it
#[derive(Debug, Parser)]
#[command(name = "serial-bench")]
struct Args {
    /// Megabytes (10^6 bytes) each way
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    megabytes: u64,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A byte that follows from its place.
fn pattern(place: usize, len: usize) -> Vec<u8> {
    (place..place + len).map(|at| (at.wrapping_mul(0x9e37_79b1) >> 13) as u8).collect()
}

/// Bytes after which the pattern begins again.
const PERIOD: usize = 8 << 20;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("serial-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Outcome<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("data");
    let daemon = Daemon::start("cleave-serial", &[&format!("--port=name=data,unix={}", path.display())])?;
    let mut driver = ConsoleDriver::connect(&daemon.socket)?;
    driver.come_up(1)?;
    driver.open(1, true)?;
    let mut client = UnixStream::connect(&path)?;
    client.set_read_timeout(Some(PATIENCE))?;
    let total = args.megabytes as usize * 1_000_000;
    let content = pattern(0, PERIOD);
    for (name, from_guest) in [("from the guest", true), ("to the guest", false)] {
        let (before, begun) = (daemon.process().cpu_time()?, Instant::now());
        match from_guest {
            true => send(&mut driver, &mut client, &content, total)?,
            false => receive(&mut driver, &mut client, &content, total)?,
        }
        let (took, cpu) = (begun.elapsed(), daemon.process().cpu_time()? - before);
        say(name, total, took, cpu);
    }
    println!("all {} MB arrived as they were sent, each way", args.megabytes);
    Ok(())
}

fn say(name: &str, total: usize, took: Duration, cpu: Duration) {
    let megabytes = total as f64 / 1e6;
    println!(
        "{name:>14}: {:>6.0} MB/s, {:>6.0} MB for each second of the daemon's CPU time",
        megabytes / took.as_secs_f64(),
        megabytes / cpu.as_secs_f64().max(0.01)
    );
}

/// The part of the content that is next, at most `len` bytes.
fn next(content: &[u8], place: usize, len: usize) -> &[u8] {
    let at = place % content.len();
    &content[at..content.len().min(at + len)]
}

fn send(driver: &mut ConsoleDriver, client: &mut UnixStream, content: &[u8], total: usize) -> Outcome<()> {
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| compare(client, content, total));
        let mut place = 0;
        while place < total {
            let chunk = next(content, place, CHUNK.min(total - place));
            match driver.write(1, chunk)? {
                true => place += chunk.len(),
                false => driver.wait_written(1)?,
            }
        }
        reader.join().map_err(|_| "the reader failed")?
    })
}

fn compare(client: &mut UnixStream, content: &[u8], total: usize) -> Outcome<()> {
    let (mut place, mut room) = (0, vec![0; 1 << 20]);
    while place < total {
        let count = client.read(&mut room)?;
        let mut at = 0;
        while at < count {
            let wanted = next(content, place, count - at);
            if room[at..at + wanted.len()] != *wanted {
                return Err(format!("other bytes than were sent, after {place}").into());
            }
            (at, place) = (at + wanted.len(), place + wanted.len());
        }
        if count == 0 {
            return Err(format!("it ended after {place} bytes").into());
        }
    }
    Ok(())
}

fn receive(driver: &mut ConsoleDriver, client: &mut UnixStream, content: &[u8], total: usize) -> Outcome<()> {
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || -> Outcome<()> {
            let mut place = 0;
            while place < total {
                let chunk = next(content, place, (1 << 20).min(total - place));
                client.write_all(chunk)?;
                place += chunk.len();
            }
            Ok(())
        });
        let mut place = 0;
        while place < total {
            let bytes = driver.read_exact(1, 1)?;
            let mut at = 0;
            while at < bytes.len() {
                let wanted = next(content, place, bytes.len() - at);
                if bytes[at..at + wanted.len()] != *wanted {
                    return Err(format!("other bytes than were sent, after {place}").into());
                }
                (at, place) = (at + wanted.len(), place + wanted.len());
            }
        }
        writer.join().map_err(|_| "the writer failed")?
    })
}
