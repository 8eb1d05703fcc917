//! The session against a daemon by script. Here is what the tests stand on; they are in files by subject.

mod config;
mod handshake;
mod hung;
mod loss;
mod recovery;
mod running;

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{
    Config, FrontendRequest as Request, MemoryTable as WireTable, Payload, VringAddr, VringFd, VringState,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;

use super::connect::Offer;
use super::fake::{Daemon, Fault, RECORD, Script, Seen};
use super::*;
use crate::bus::Event;

const SHORT: Duration = Duration::from_millis(500);
/// For what happens at once, on a machine that is busy.
const SOON: Duration = Duration::from_secs(10);
const ACKED: u64 = virtio::VERSION_1 | 1;

/// Where the rings of [`ring`] are in the file of [`memory`].
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x10_0000 + 0x3000;

fn patience(deadline: Duration) -> Patience {
    Patience { deadline, first_answer: deadline, ..Patience::default() }
}

fn target(socket: UnixStream) -> Target {
    Target {
        device: "test0".into(),
        endpoint: Endpoint::Socket(socket),
        queues: None,
        patience: patience(Duration::from_secs(5)),
    }
}

fn memory_file() -> Arc<OwnedFd> {
    let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x20_0000).unwrap();
    Arc::new(file)
}

fn table(file: &Arc<OwnedFd>) -> Arc<MemoryTable> {
    let region = |start, len, offset| Region { start, len, file: Arc::clone(file), offset };
    let regions = vec![region(0, 0x10_0000, 0), region(1 << 32, 0x10_0000, 0x10_0000)];
    Arc::new(MemoryTable::new(regions).unwrap())
}

fn memory() -> Arc<MemoryTable> {
    table(&memory_file())
}

fn ring(index: u8) -> Ring {
    let addresses = RingAddresses { descriptor: 0x1000, available: AVAILABLE, used: (1 << 32) + 0x3000 };
    let event = || Arc::new(Event::new().unwrap());
    Ring::new(&memory(), index, 256, addresses, event(), Some(event())).unwrap()
}

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Started,
    Stopped,
    Config(Vec<u8>),
    Lost(String),
    Reconnected(u64),
    AttemptFailed(String),
    NeedsReset(CannotResume),
}

struct Ear {
    heard: Sender<Heard>,
    /// The daemons of which a loss or a failure was told.
    serials: Mutex<Vec<u32>>,
}

impl Ear {
    fn tell(&self, heard: Heard) {
        // The test may have heard enough.
        let _ = self.heard.send(heard);
    }
}

impl Observer for Ear {
    fn started(&self) {
        self.tell(Heard::Started);
    }
    fn stopped(&self) {
        self.tell(Heard::Stopped);
    }
    fn config(&self, config: &[u8]) {
        self.tell(Heard::Config(config.to_vec()));
    }
    fn lost(&self, serial: u32, reason: &SessionError) {
        self.serials.lock().unwrap().push(serial);
        self.tell(Heard::Lost(reason.to_string()));
    }
    fn reconnected(&self, after: Duration, replayed: u64) {
        assert!(after < SOON);
        self.tell(Heard::Reconnected(replayed));
    }
    fn attempt_failed(&self, serial: u32, reason: &SessionError) {
        self.serials.lock().unwrap().push(serial);
        self.tell(Heard::AttemptFailed(reason.to_string()));
    }
    fn needs_reset(&self, reason: CannotResume) {
        self.tell(Heard::NeedsReset(reason));
    }
}

/// A session as its device has it.
struct Side {
    mailbox: Arc<Mailbox>,
    heard: Receiver<Heard>,
    memory: Arc<OwnedFd>,
    ear: Arc<Ear>,
    thread: SessionThread,
}

impl Side {
    fn of(target: Target) -> Self {
        let session = connect(target).unwrap();
        let (sender, heard) = channel();
        let ear = Arc::new(Ear { heard: sender, serials: Mutex::default() });
        let observer: Weak<dyn Observer> = Arc::downgrade(&(Arc::clone(&ear) as Arc<dyn Observer>));
        let mailbox = Mailbox::new().unwrap();
        let memory = memory_file();
        let thread = session.spawn(Arc::clone(&mailbox), table(&memory), observer).unwrap();
        Self { mailbox, heard, memory, ear, thread }
    }

    fn start(&self) {
        self.start_with(ACKED);
    }

    fn start_with(&self, features: u64) {
        self.mailbox.start(Start { features, rings: vec![ring(0), ring(1)] });
    }

    fn running(&self) {
        self.start();
        assert_eq!(self.hear(), Heard::Started);
    }

    fn stopped(&self) {
        self.mailbox.stop();
        loop {
            match self.heard.recv_timeout(SOON).expect("nothing is heard") {
                Heard::Stopped => return,
                Heard::Config(_) | Heard::AttemptFailed(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// What is heard next, but for config space.
    fn hear(&self) -> Heard {
        loop {
            match self.heard.recv_timeout(SOON).expect("nothing is heard") {
                Heard::Config(_) => {}
                heard => return heard,
            }
        }
    }

    fn hear_config(&self) -> Vec<u8> {
        match self.heard.recv_timeout(SOON).expect("nothing is heard") {
            Heard::Config(config) => config,
            other => panic!("{other:?}"),
        }
    }

    fn hear_lost(&self) -> String {
        match self.hear() {
            Heard::Lost(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    fn hears_nothing(&self) {
        let heard = self.heard.recv_timeout(SHORT / 5);
        assert_eq!(heard, Err(RecvTimeoutError::Timeout));
    }

    /// Moves `idx` of both rings, whose two queues share their memory here.
    fn move_to(&self, available: u16, used: u16) {
        pwrite(&*self.memory, &available.to_le_bytes(), AVAILABLE + 2).unwrap();
        pwrite(&*self.memory, &used.to_le_bytes(), USED + 2).unwrap();
    }
}

/// A session and the daemon at the other end of its socketpair.
struct Fixture {
    daemon: Daemon,
    side: Side,
    serial: u32,
}

impl std::ops::Deref for Fixture {
    type Target = Side;

    fn deref(&self) -> &Side {
        &self.side
    }
}

fn session(script: Script) -> Fixture {
    session_within(script, Duration::from_secs(5))
}

fn session_within(script: Script, deadline: Duration) -> Fixture {
    let (daemon, socket) = Daemon::pair(script);
    let side = Side::of(Target { patience: patience(deadline), ..target(socket) });
    Fixture { daemon, side, serial: 0 }
}

impl Fixture {
    /// Puts another daemon in the place of the one that is lost.
    fn replace(&mut self, script: Script) {
        let (daemon, socket) = Daemon::pair(script);
        self.daemon = daemon;
        self.serial += 1;
        self.side.mailbox.reconnect(Successor { socket, serial: self.serial });
    }
}

/// A daemon that keeps a record of what is in flight.
fn recording() -> Script {
    let script = Script::default();
    Script { protocol_features: script.protocol_features | protocol::INFLIGHT_SHMFD, ..script }
}
