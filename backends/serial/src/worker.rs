//! The thread that serves all ports: it has the queues, the lines and what is kept, and waits in one place.
//!
//! ```text
//!   epoll ──> marks: a queue kicked, an end ready ──> ports with marks are served, some each turn ──> epoll
//!   device ──commands──┘
//! ```
//!
//! One thread, for a port moves as many bytes as its other end takes, and none of its calls waits: 31 ports would be 31
//! stacks. A port that always has work gets a share of each turn, so that the others get theirs.
//!
//! Invariants: of a data queue one chain is in flight at most, and [`Kept`] has its record; it is fetched when there is
//! somewhere for it to go; the record is gone before the next one is fetched.

mod control;
mod data;
mod handle;
mod queue;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use cleave_common::port::{MAX_PORTS, PortSpec};
use cleave_common::sandbox::{drop_memory_lock, name_thread};
use cleave_runtime::{QueueIndex, Vring};
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use crate::kept::Kept;
use crate::line::{Line, Opened, Part, Watch};
use crate::ports::{Nature, NoPlace, Ports, Size, SizeOrder};
use handle::Announced;
pub(crate) use handle::{Command, Handle};
use queue::Queue;

/// VIRTIO_CONSOLE_F_MULTIPORT (virtio 1.2, 5.3.3).
pub(crate) const MULTIPORT: u64 = 1 << 1;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Receive(u32),
    Transmit(u32),
    ControlReceive,
    ControlTransmit,
}

pub(crate) struct Worker {
    epoll: OwnedFd,
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
    announced: Arc<Announced>,
    order: SizeOrder,
    features: u64,
    kept: Kept,
    ports: Ports,
    /// By port.
    lines: Vec<Option<Line>>,
    /// Whether there may be something to do.
    marks: Vec<bool>,
    control_mark: bool,
    /// By index.
    queues: Vec<Option<Queue>>,
    /// Bytes from and to the guest, by port.
    moved: Vec<[u64; 2]>,
}

/// Kinds of tokens, in the topmost byte.
const WAKE: u64 = 0;
const KICK: u64 = 1;
const LISTENER: u64 = 2;
const INPUT: u64 = 3;
const OUTPUT: u64 = 4;
const TERMINAL: u64 = 5;

fn token(port: u32, part: Part) -> u64 {
    let (kind, client) = match part {
        Part::Listener => (LISTENER, 0),
        Part::Input(client) => (INPUT, client),
        Part::Output(client) => (OUTPUT, client),
        Part::Terminal => (TERMINAL, 0),
    };
    kind << 56 | u64::from(port) << 32 | u64::from(client)
}

fn part(token: u64) -> (u32, Part) {
    let (port, client) = ((token >> 32) as u32 & 0xff, token as u32);
    let part = match token >> 56 {
        LISTENER => Part::Listener,
        INPUT => Part::Input(client),
        OUTPUT => Part::Output(client),
        _ => Part::Terminal,
    };
    (port, part)
}

impl Worker {
    /// For up to `max_ports` ports. Nothing is served before [`Worker::spawn`].
    pub(crate) fn new(max_ports: u32, order: SizeOrder) -> io::Result<(Self, Handle)> {
        let (sender, commands) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let announced = Arc::new(Announced::new()?);
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE << 56), EventFlags::IN)?;
        let handle = Handle { commands: sender, wake: wake.clone(), announced: announced.clone() };
        let count = max_ports as usize;
        let worker = Self {
            epoll,
            commands,
            wake,
            announced,
            order,
            features: 0,
            kept: Kept::private()?,
            ports: Ports::new(max_ports),
            lines: (0..count).map(|_| None).collect(),
            marks: vec![false; count],
            control_mark: false,
            queues: (0..2 * (count + 1)).map(|_| None).collect(),
            moved: vec![[0; 2]; count],
        };
        Ok((worker, handle))
    }

    /// Adds a port with its other end, and says which it is.
    pub(crate) fn add(&mut self, spec: PortSpec, opened: Opened) -> Result<u32, AddError> {
        let id = self.ports.add(Nature { name: spec.name, is_console: spec.is_console })?;
        let watch = Watch { epoll: self.epoll.as_fd(), token, port: id };
        match Line::new(opened, spec.shared, &watch) {
            Ok(line) => {
                self.lines[id as usize] = Some(line);
                self.marks[id as usize] = true;
                self.moved[id as usize] = [0; 2];
                Ok(id)
            }
            Err(error) => {
                self.ports.remove(id);
                Err(error.into())
            }
        }
    }

    /// Its clients are gone with it; what the guest has sent and nobody has got stays in its queue until the driver takes
    /// that back.
    pub(crate) fn remove(&mut self, id: u32) {
        self.ports.remove(id);
        self.lines[id as usize] = None;
        self.control_mark = true;
    }

    /// Gives up all lines: their clients, files and terminals.
    pub(crate) fn close(&mut self) {
        self.lines.iter_mut().for_each(|line| *line = None);
    }

    pub(crate) fn ports(&self) -> &Ports {
        &self.ports
    }

    pub(crate) fn line(&mut self, id: u32) -> Option<&mut Line> {
        // Whoever asks may change it.
        self.marks[id as usize] = true;
        self.lines[id as usize].as_mut()
    }

    /// Bytes from the guest, and to it.
    pub(crate) fn moved(&self, id: u32) -> [u64; 2] {
        self.moved[id as usize]
    }

    /// Serves on a thread of its own until the process ends.
    pub(crate) fn spawn(self) -> io::Result<()> {
        const STACK: usize = 256 << 10;
        let (ready, begun) = mpsc::channel();
        let serve = move || {
            let mut worker = self;
            name_thread("queue");
            // The filter of system calls, which takes all threads at once, is not to meet one that still begins.
            let _ = ready.send(drop_memory_lock());
            if let Err(error) = worker.run() {
                tracing::error!("the ports cannot be served: {error}");
                std::process::exit(cleave_common::exit::ExitCode::Host as i32);
            }
        };
        thread::Builder::new().name("ports".to_owned()).stack_size(STACK).spawn(serve)?;
        begun.recv().map_err(io::Error::other)?
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            self.wait()?;
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command);
            }
            for id in 0..self.ports.max() {
                self.attend(id);
            }
            if std::mem::take(&mut self.control_mark) {
                self.serve_control();
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let busy = self.control_mark || self.marks.contains(&true);
        let now = Instant::now();
        let due = self.lines.iter().flatten().filter_map(Line::deadline).min();
        let timeout = match due {
            _ if busy => Some(Timespec::default()),
            Some(at) => Timespec::try_from(at.saturating_duration_since(now)).ok(),
            None => None,
        };
        let mut room = [MaybeUninit::<Event>::uninit(); 32];
        let (events, _) = match epoll::wait(&self.epoll, &mut room, timeout.as_ref()) {
            Err(Errno::INTR) => return Ok(()),
            taken => taken?,
        };
        for event in events {
            let (token, flags) = (event.data.u64(), event.flags);
            match token >> 56 {
                WAKE => {
                    let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
                }
                KICK => self.kicked(QueueIndex(token as u16)),
                _ => {
                    let (port, part) = part(token);
                    self.marks[port as usize] = true;
                    if let Some(line) = &mut self.lines[port as usize] {
                        line.hear(part, flags);
                    }
                }
            }
        }
        if due.is_some_and(|due| due <= Instant::now()) {
            self.marks.fill(true);
        }
        Ok(())
    }

    fn kicked(&mut self, index: QueueIndex) {
        if let Some(queue) = &mut self.queues[usize::from(index.0)] {
            queue.vring.start();
        }
        self.mark(index);
    }

    /// What queue `index` is for, to the driver whose features these are.
    fn role(&self, QueueIndex(index): QueueIndex) -> Option<Role> {
        let multiport = self.features & MULTIPORT != 0;
        let port = match index {
            0 | 1 => 0,
            2 if multiport => return Some(Role::ControlReceive),
            3 if multiport => return Some(Role::ControlTransmit),
            index if multiport => u32::from(index) / 2 - 1,
            _ => return None,
        };
        let role = if index % 2 == 0 { Role::Receive(port) } else { Role::Transmit(port) };
        (port < self.ports.max()).then_some(role)
    }

    fn mark(&mut self, index: QueueIndex) {
        match self.role(index) {
            Some(Role::Receive(port) | Role::Transmit(port)) => self.marks[port as usize] = true,
            Some(Role::ControlReceive | Role::ControlTransmit) => self.control_mark = true,
            None => {}
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start(vring) => self.start(vring),
            Command::Stop(index, reply) => {
                let queue = self.queues.get_mut(usize::from(index.0)).and_then(Option::take);
                let vring = queue.map(|queue| {
                    let _ = epoll::delete(&self.epoll, queue.vring.kick_fd());
                    queue.end()
                });
                let _ = reply.send(vring);
            }
            Command::Features(features) => self.features = features,
            Command::Kept(kept, reply) => {
                let _ = reply.send(self.adopt(&kept));
            }
            Command::Reset => {
                self.features = 0;
                self.forget_driver();
            }
            Command::Print(byte) => {
                if let Some(line) = self.line(0) {
                    line.print_byte(byte);
                }
            }
            Command::Ask(question) => {
                question(self);
                self.control_mark = true;
            }
        }
    }

    /// All queues are stopped.
    fn adopt(&mut self, kept: &cleave_runtime::Kept) -> io::Result<()> {
        let lines = &self.lines;
        let length = |QueueIndex(index): QueueIndex| {
            let port = if index < 2 { 0 } else { usize::from(index) / 2 - 1 };
            lines.get(port)?.as_ref()?.file_len()
        };
        self.kept.adopt(kept, length)?;
        let mut bits = self.kept.bits();
        let (max, driver) = (self.ports.max() as usize, bits.pop());
        self.ports.restore(bits.into_iter().take(max).chain(driver));
        for id in 0..self.ports.max() {
            if self.ports.is_told_open(id)
                && let Some(line) = &mut self.lines[id as usize]
            {
                line.linger();
            }
        }
        self.marks.fill(true);
        Ok(())
    }

    fn start(&mut self, vring: Vring) {
        let index = vring.index();
        let role = self.role(index);
        if role == Some(Role::ControlTransmit) && vring.is_fresh() {
            self.forget_driver();
        }
        let data = EventData::new_u64(KICK << 56 | u64::from(index.0));
        let flags = EventFlags::IN | EventFlags::ET;
        if let Err(errno) = epoll::add(&self.epoll, vring.kick_fd(), data, flags) {
            // What cannot be waited for was refused before (SET_VRING_KICK).
            tracing::warn!("{index}: its kick descriptor cannot be waited for: {errno}");
        }
        self.queues[usize::from(index.0)] = Some(Queue::new(vring, &self.kept));
        self.mark(index);
    }

    /// There is another driver, or none.
    fn forget_driver(&mut self) {
        self.ports.reset();
        self.keep_bits();
        self.control_mark = true;
    }

    /// The driver's flag comes after those of as many ports as there may ever be.
    fn keep_bits(&self) {
        let mut bits: Vec<u32> = self.ports.bits().collect();
        let driver = bits.pop();
        bits.resize(MAX_PORTS as usize, 0);
        self.kept.set_bits(bits.into_iter().chain(driver));
    }

    fn tell_size(&mut self, id: u32, size: Size) {
        self.ports.set_size(id, size);
        if id == 0 {
            self.announced.set_size(size);
        }
        self.control_mark = true;
    }
}

/// Why a port cannot be added.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AddError {
    #[error(transparent)]
    NoPlace(#[from] NoPlace),
    #[error("its other end cannot be waited for")]
    Line(#[from] io::Error),
}
