//! The driver's end of one socket: what a guest does that sends and receives as fast as it can.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use cleave_tests::driver::{DriverError, Frontend, GuestRam, Process};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::{Driver, Size};
use crate::frame::Frame;
use crate::lane::{Lane, Tally, Track};
use crate::{BenchError, Result};

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;

/// Of one to receive: the largest frames take 16 of them.
fn receive_size(size: Size) -> u16 {
    if size == Size::Segment { 4 * QUEUE_SIZE } else { QUEUE_SIZE }
}

/// What is more than any of them has.
const ALL: usize = u16::MAX as usize;

/// Bytes of memory below the hole.
const MEMORY: u64 = 256 << 20;

/// Chains that are offered at once.
const BURST: usize = 32;

/// How long to wait for the first frame, and for anything to move.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long to sleep at most between two looks at the clock.
const NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// What the driver wants of the device: everything of the kind that a Linux has, but no control queue, so that all pairs are
/// used at once.
mod feature {
    pub const CHECKSUMS: u64 = 1 << 0 | 1 << 1;
    pub const SEGMENTS: u64 = 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const MQ: u64 = 1 << 22;
    pub const RINGS: u64 = 1 << 28 | 1 << 29;
}

/// Bytes of a buffer to receive.
fn buffer_len(size: Size) -> u32 {
    if size == Size::Segment { 4096 } else { 2048 }
}

/// Bytes of all that wait to be filled.
pub fn room(size: Size) -> usize {
    usize::from(receive_size(size)) * buffer_len(size) as usize
}

/// A guest with its rings set up, and nothing offered yet.
pub struct Guest {
    /// The process that listens; none if it is in another container.
    pub process: Option<Process>,
    _frontend: Frontend,
    ram: GuestRam,
    /// Of each pair the queue to receive, then the one to send.
    tracks: Vec<Track>,
}

impl Guest {
    /// Connects to `socket`. What it sends is `frame`, over `pairs` pairs.
    pub fn connect(socket: &Path, pairs: u16, size: Size, frame: &Frame) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(BenchError::io(format!(
            "{}: does a vhost-user daemon listen there?",
            socket.display()
        )))?;
        let process = rustix::net::sockopt::socket_peercred(&stream).ok().map(|peer| Process(peer.pid));
        let mut frontend = Frontend::over(stream);
        let multi = if pairs > 1 { feature::MQ } else { 0 };
        let wanted = feature::CHECKSUMS | feature::SEGMENTS | feature::MRG_RXBUF | multi | feature::RINGS;
        let negotiated = frontend.negotiate(wanted)?;
        for (bits, name) in
            [(feature::MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF"), (feature::RINGS, "event indices")]
        {
            if negotiated.acked & bits != bits {
                return Err(DriverError::Missing(name).into());
            }
        }
        if size == Size::Segment && negotiated.acked & feature::SEGMENTS != feature::SEGMENTS {
            return Err(DriverError::Missing("segmentation offload").into());
        }
        if negotiated.num_queues < 2 * u64::from(pairs) || negotiated.acked & multi != multi {
            let queues = negotiated.num_queues;
            return Err(BenchError::Usage(format!(
                "the daemon has {queues} queues, and --queues is {pairs}"
            )));
        }
        let mut ram = GuestRam::new(MEMORY)?;
        let mut tracks = Vec::new();
        for _ in 0..pairs {
            tracks.push(Track::to_receive(&mut ram, receive_size(size), buffer_len(size))?);
            tracks.push(Track::to_send(&mut ram, QUEUE_SIZE, &frame.with_header())?);
        }
        frontend.set_mem_table(&ram)?;
        for (track, index) in tracks.iter_mut().zip(0..) {
            frontend.start_queue(index, &track.queue, 0)?;
            track.queue.kick_now()?;
        }
        Ok(Self { process, _frontend: frontend, ram, tracks })
    }

    fn lanes(&self, sending: bool) -> Result<Vec<Lane<'_>>> {
        let tracks = self.tracks.iter().skip(usize::from(sending)).step_by(2);
        tracks.map(|track| Lane::new(&self.ram, track)).collect()
    }
}

/// What passed in the time that was measured.
#[derive(Debug, Clone, Copy, Default)]
pub struct Passed {
    pub tally: Tally,
    pub seconds: f64,
    pub kicks: u64,
    pub calls: u64,
}

/// Where frames go in, and where they come out; one of them may be no guest at all.
pub struct Course<'g> {
    senders: Vec<Lane<'g>>,
    receivers: Vec<Lane<'g>>,
    /// Receivers that only keep their device going.
    others: Vec<Lane<'g>>,
    driver: Driver,
    calls: u64,
}

impl<'g> Course<'g> {
    /// From `from`, where there is one, to `to`, where there is one; what comes out there is counted, or else what goes in.
    pub fn new(from: Option<&'g Guest>, to: Option<&'g Guest>, driver: Driver) -> Result<Self> {
        let lanes =
            |guest: Option<&'g Guest>, sending| guest.map_or(Ok(Vec::new()), |guest| guest.lanes(sending));
        let mut course = Self {
            senders: lanes(from, true)?,
            receivers: lanes(to, false)?,
            others: lanes(from, false)?,
            driver,
            calls: 0,
        };
        for lane in course.receivers.iter_mut().chain(&mut course.others) {
            lane.offer(ALL)?;
        }
        // Where frames to a receiver are to go, a switch learns from a frame of its own.
        for lane in lanes(to, true)?.iter_mut().take(1) {
            lane.offer(1)?;
        }
        Ok(course)
    }

    /// Runs until `end`. `until_first`: or until a frame has passed.
    fn run(&mut self, end: Instant, until_first: bool) -> Result<Tally> {
        let mut total = Tally::default();
        let mut round = 0_u32;
        loop {
            let moved = self.round(&mut total)?;
            if until_first && total.frames != 0 {
                return Ok(total);
            }
            round = round.wrapping_add(1);
            if round.is_multiple_of(16) && Instant::now() >= end {
                return Ok(total);
            }
            match (moved, self.driver) {
                (true, _) => {}
                (false, Driver::Poll) => std::hint::spin_loop(),
                (false, Driver::Interrupt) => {
                    self.sleep()?;
                    if Instant::now() >= end {
                        return Ok(total);
                    }
                }
            }
        }
    }

    /// Offers what is free, and takes what came back. `false`: nothing did.
    fn round(&mut self, total: &mut Tally) -> Result<bool> {
        let mut moved = false;
        let counts_received = !self.receivers.is_empty();
        for lane in &mut self.senders {
            let sent = lane.reap()?;
            moved |= sent.frames != 0;
            if !counts_received {
                total.frames += sent.frames;
            }
            lane.offer(BURST)?;
        }
        for (lane, counted) in self
            .receivers
            .iter_mut()
            .map(|lane| (lane, true))
            .chain(self.others.iter_mut().map(|lane| (lane, false)))
        {
            let came = lane.reap()?;
            moved |= came.frames != 0;
            if counted {
                total.frames += came.frames;
                total.bytes += came.bytes;
            }
            lane.offer(ALL)?;
        }
        if self.driver == Driver::Poll {
            self.lanes().for_each(Lane::wants_no_call);
        }
        Ok(moved)
    }

    fn lanes(&self) -> impl Iterator<Item = &Lane<'g>> {
        self.senders.iter().chain(&self.receivers).chain(&self.others)
    }

    fn sleep(&mut self) -> Result<()> {
        // All of them are asked: each is to interrupt.
        let mut is_there = false;
        for lane in self.lanes() {
            is_there |= lane.wants_call();
        }
        if is_there {
            return Ok(());
        }
        let mut fds: Vec<PollFd<'_>> = self
            .lanes()
            .map(|lane| PollFd::from_borrowed_fd(lane.vring().call_fd(), PollFlags::IN))
            .collect();
        poll(&mut fds, Some(&NAP)).map_err(|errno| BenchError::io("wait for an interrupt")(errno.into()))?;
        let called: Vec<bool> = fds.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
        for (lane, _) in self.lanes().zip(&called).filter(|(_, called)| **called) {
            let _ = rustix::io::read(lane.vring().call_fd(), &mut [0; 8]);
        }
        self.calls += called.iter().filter(|called| **called).count() as u64;
        Ok(())
    }

    fn kicks(&self) -> u64 {
        self.lanes().map(|lane| lane.kicks).sum()
    }

    /// Has frames pass for `seconds`, after some to warm up; `mark` is called where that time begins and where it ends.
    pub fn measure(&mut self, seconds: f64, mut mark: impl FnMut()) -> Result<Passed> {
        if self.run(Instant::now() + PATIENCE, true)?.frames == 0 {
            return Err(BenchError::Stalled(format!("no frame has passed in {} s", PATIENCE.as_secs())));
        }
        self.run(Instant::now() + Duration::from_secs_f64(seconds / 10.0), false)?;
        let (kicks, calls) = (self.kicks(), self.calls);
        mark();
        let begun = Instant::now();
        let tally = self.run(begun + Duration::from_secs_f64(seconds), false)?;
        mark();
        if tally.frames == 0 {
            return Err(BenchError::Stalled("frames passed at first, then none any more".to_owned()));
        }
        Ok(Passed {
            tally,
            seconds: begun.elapsed().as_secs_f64(),
            kicks: self.kicks() - kicks,
            calls: self.calls - calls,
        })
    }
}
