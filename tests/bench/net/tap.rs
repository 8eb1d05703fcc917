//! What is at the other end of a tap device: a source of frames for it, and the plain program that others are compared with.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cleave_tests::driver::{DriverError, HEADER_LEN, Process};
use cleave_tests::network::{self, PACKET_HEADER_LEN, Wire};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Pid;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::args::{Plain, Size, Way, word};
use crate::frame::{Frame, PIECE, RECEIVER, SENDER};
use crate::guest::{self, Passed};
use crate::lane::Tally;
use crate::{BenchError, Result};

/// The tap device of all that are measured, in a network of this program's own.
pub const NAME: &str = "bench0";

/// Room for any frame with its header.
const ROOM: usize = 68 << 10;

const PATIENCE: Duration = Duration::from_secs(10);

/// Sends frames into the tap device for as long as it is there.
pub struct Source {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    pub fn start(size: Size) -> Result<Self> {
        let wire = Wire::open(NAME).map_err(BenchError::io(format!("a packet socket on {NAME}")))?;
        wire.bypass_queue().map_err(BenchError::io("PACKET_QDISC_BYPASS"))?;
        let frame = Frame::new(size, RECEIVER, SENDER);
        let bytes = [&frame.header[..PACKET_HEADER_LEN], &frame.bytes].concat();
        let ends = Arc::new(AtomicBool::new(false));
        let told = ends.clone();
        let thread = std::thread::Builder::new().name("source".to_owned()).spawn(move || {
            let burst = vec![&bytes[..]; if size == Size::Segment { 4 } else { 64 }];
            while !told.load(Ordering::Relaxed) {
                // A device that has no room drops, and one that goes away is seen by whoever waits for frames.
                if wire.send_all(&burst).is_err() {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        });
        let thread = thread.map_err(BenchError::io("start a thread"))?;
        Ok(Self { ends, thread: Some(thread) })
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The plain program under way.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has another process read or write `NAME` for `seconds`: what passed, and the seconds of CPU time.
///
/// # Errors
/// It could not, with what it said.
pub fn measure(
    way: Way,
    size: Size,
    seconds: f64,
    pin: impl Fn(Process) -> Result<()>,
) -> Result<(Passed, f64)> {
    let this = std::env::current_exe().map_err(BenchError::io("find this program"))?;
    let mut command = Command::new(this);
    command.args(["plain", "--tap", NAME, "--way", &word(way), "--size", &size.word()]);
    command.arg("--runtime").arg(seconds.to_string());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn();
    let mut child = Running(child.map_err(BenchError::io("start the plain program"))?);
    let mut said = BufReader::new(child.0.stdout.take().ok_or(DriverError::Missing("standard output"))?);
    let mut line = String::new();
    let read = |line: &mut String, said: &mut BufReader<_>| {
        line.clear();
        said.read_line(line).map_err(BenchError::io("read what the plain program says"))
    };
    read(&mut line, &mut said)?;
    if line.trim() != "ready" {
        return Err(failure(&mut child));
    }
    if let Some(pid) = Pid::from_raw(child.0.id() as i32) {
        pin(Process(pid))?;
    }
    let source = if way == Way::Receive { Some(Source::start(size)?) } else { None };
    read(&mut line, &mut said)?;
    drop(source);
    let Ok(answer) = serde_json::from_str::<Value>(&line) else { return Err(failure(&mut child)) };
    let number = |key: &str| answer[key].as_f64().unwrap_or(0.0);
    let tally = Tally { frames: number("frames") as u64, bytes: number("bytes") as u64 };
    Ok((Passed { tally, seconds: number("seconds"), ..Passed::default() }, number("cpu")))
}

fn failure(child: &mut Running) -> BenchError {
    let mut said = String::new();
    let _ = child.0.kill();
    if let Some(errors) = &mut child.0.stderr {
        let _ = errors.read_to_string(&mut said);
    }
    BenchError::Stalled(format!("the plain program failed: {}", said.trim()))
}

/// The plain program.
///
/// # Errors
/// There is no tap device for it, or no frame.
pub fn plain(args: &Plain) -> Result<()> {
    let failed = |error| BenchError::Io { what: format!("the tap device {}", args.tap), source: error };
    let tap = network::open_tap(&args.tap, true).map_err(failed)?;
    network::offload_all(&tap).map_err(failed)?;
    let flags = fcntl_getfl(&tap).map_err(|errno| failed(errno.into()))?;
    fcntl_setfl(&tap, flags | OFlags::NONBLOCK).map_err(|errno| failed(errno.into()))?;
    network::ip(&format!("link set {} up", args.tap));
    let mut out = std::io::stdout();
    let _ = writeln!(out, "ready").and_then(|()| out.flush());
    let mut end = End::new(tap, args.size);
    end.run(args.way, PATIENCE, true).map_err(failed)?;
    if end.passed.frames == 0 {
        return Err(BenchError::Stalled(format!("no frame has passed in {} s", PATIENCE.as_secs())));
    }
    end.run(args.way, Duration::from_secs_f64(args.runtime / 10.0), false).map_err(failed)?;
    end.passed = Tally::default();
    let (begun, cpu) = (Instant::now(), cpu_time());
    end.run(args.way, Duration::from_secs_f64(args.runtime), false).map_err(failed)?;
    let answer = json!({
        "frames": end.passed.frames, "bytes": end.passed.bytes,
        "seconds": begun.elapsed().as_secs_f64(), "cpu": cpu_time() - cpu,
    });
    let _ = writeln!(out, "{answer}").and_then(|()| out.flush());
    Ok(())
}

/// Seconds that this process has used.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// An open tap device, and memory for its frames: as much, in as many places, as the others have in their rings.
struct End {
    tap: File,
    /// For sending.
    frames: Vec<Vec<u8>>,
    /// For receiving.
    rooms: Vec<u8>,
    room: usize,
    passed: Tally,
}

impl End {
    fn new(tap: OwnedFd, size: Size) -> Self {
        let frame = Frame::new(size, RECEIVER, SENDER).with_header();
        Self {
            tap: tap.into(),
            frames: vec![frame; guest::QUEUE_SIZE.into()],
            rooms: vec![0; guest::room(size)],
            room: if size == Size::Segment { ROOM } else { 2048 },
            passed: Tally::default(),
        }
    }

    /// Until `time` has passed, or, if only one is wanted, a frame.
    fn run(&mut self, way: Way, time: Duration, one: bool) -> std::io::Result<()> {
        let end = Instant::now() + time;
        // In pages, as a guest's memory is.
        let frames: Vec<Vec<_>> = self
            .frames
            .iter()
            .map(|frame| frame.chunks(PIECE).map(std::io::IoSlice::new).collect())
            .collect();
        let mut rooms: Vec<&mut [u8]> = self.rooms.chunks_exact_mut(self.room).collect();
        let count = rooms.len();
        for at in 0.. {
            let moved = match way {
                Way::Receive => (&self.tap).read(rooms[at % count]),
                _ => (&self.tap).write_vectored(&frames[at % frames.len()]),
            };
            match moved {
                Ok(len) => {
                    self.passed.frames += 1;
                    self.passed.bytes += len.saturating_sub(HEADER_LEN) as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait(&self.tap, way)?,
                Err(error) => return Err(error),
            }
            if at % 16 == 15 && Instant::now() >= end || one && self.passed.frames != 0 {
                break;
            }
        }
        Ok(())
    }
}

fn wait(tap: &File, way: Way) -> std::io::Result<()> {
    const NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    let flags = if way == Way::Receive { PollFlags::IN } else { PollFlags::OUT };
    poll(&mut [PollFd::from_borrowed_fd(tap.as_fd(), flags)], Some(&NAP))?;
    Ok(())
}

/// Goes where only this program speaks, for tap devices.
///
/// # Errors
/// This user may not.
pub fn enter() -> Result<()> {
    network::enter().ok_or_else(|| {
        BenchError::Usage(
            "a tap device takes a network of this program's own: run this as root where there is /dev/net/tun, or measure \
             --way forward"
                .to_owned(),
        )
    })
}
