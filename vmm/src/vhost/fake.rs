//! A vhost-user daemon by script, for faults that no real daemon can be made to have.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{
    Channel, Config, Flags, FrontendRequest as Request, Inflight, Message, Payload, VringState,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Bytes of one queue's record of requests in flight.
pub(crate) const RECORD: u64 = 8192;

/// What to do wrong at a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Never answer again, but keep the socket open.
    Mute,
    Close,
    /// Write these bytes and go on.
    Raw(Vec<u8>),
    /// Answer with this payload.
    Answer(Vec<u8>),
    /// Answer as if something else had been asked.
    OtherRequest,
}

#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) features: u64,
    pub(crate) protocol_features: u64,
    pub(crate) queues: u64,
    pub(crate) config: Vec<u8>,
    /// Refuses to read more config space than there is.
    pub(crate) strict_config: bool,
    /// Takes this long to answer a request of this kind.
    pub(crate) slow: Option<(Request, Duration)>,
    pub(crate) fault: Option<(Request, Fault)>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            features: virtio::VERSION_1 | virtio::RING_EVENT_IDX | virtio::PROTOCOL_FEATURES | 0b11,
            protocol_features: protocol::MQ
                | protocol::REPLY_ACK
                | protocol::CONFIG
                | protocol::RESET_DEVICE
                | protocol::LOG_SHMFD,
            queues: 2,
            config: (0..60).collect(),
            strict_config: false,
            slow: None,
            fault: None,
        }
    }
}

/// A request as it came.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) request: Request,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

#[derive(Default)]
struct Log {
    seen: Mutex<Vec<Seen>>,
    more: Condvar,
}

/// A daemon on a thread.
pub(crate) struct Daemon {
    log: Arc<Log>,
    socket: UnixStream,
    held: Arc<AtomicBool>,
    /// Dropped with the daemon, which lets one that is held go.
    _release: Sender<()>,
    pub(crate) thread: JoinHandle<()>,
}

impl Daemon {
    pub(crate) fn serve(script: Script, socket: UnixStream) -> Self {
        let log = Arc::new(Log::default());
        let held = Arc::new(AtomicBool::new(false));
        let kept = socket.try_clone().unwrap();
        let (release, released) = channel();
        let worker = Worker {
            script,
            channel: Channel::new(socket),
            log: Arc::clone(&log),
            held: Arc::clone(&held),
            acks: false,
        };
        let thread = thread::spawn({
            let (socket, held) = (kept.try_clone().unwrap(), Arc::clone(&held));
            move || {
                worker.run();
                if held.load(Ordering::SeqCst) {
                    let _ = released.recv();
                }
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
        });
        Self { log, socket: kept, held, _release: release, thread }
    }

    /// As if it were killed.
    pub(crate) fn end(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// From now on it answers nothing, and does not close its socket either.
    pub(crate) fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    /// A daemon and the frontend's end of its socket.
    pub(crate) fn pair(script: Script) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Self::serve(script, theirs), ours)
    }

    /// Waits until `count` requests of this kind have come, and gives what `read` makes of the last.
    pub(crate) fn wait_for<T>(&self, request: Request, count: usize, read: impl Fn(&Seen) -> T) -> T {
        let seen = self.log.seen.lock().unwrap();
        let enough =
            |seen: &mut Vec<Seen>| seen.iter().filter(|seen| seen.request == request).count() < count;
        let (seen, timeout) = self.log.more.wait_timeout_while(seen, Duration::from_secs(5), enough).unwrap();
        assert!(!timeout.timed_out(), "no {count} {request}; seen: {:?}", requests(&seen));
        read(seen.iter().rfind(|seen| seen.request == request).unwrap())
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        requests(&self.log.seen.lock().unwrap())
    }

    pub(crate) fn last(&self, request: Request) -> Option<Vec<u8>> {
        let seen = self.log.seen.lock().unwrap();
        seen.iter().rfind(|seen| seen.request == request).map(|seen| seen.body.clone())
    }
}

fn requests(seen: &[Seen]) -> Vec<Request> {
    seen.iter().map(|seen| seen.request).collect()
}

struct Worker {
    script: Script,
    channel: Channel,
    log: Arc<Log>,
    held: Arc<AtomicBool>,
    /// REPLY_ACK was negotiated.
    acks: bool,
}

impl Worker {
    fn run(mut self) {
        while let Ok(Some(message)) = self.channel.recv(None) {
            if self.held.load(Ordering::SeqCst) {
                continue;
            }
            let request = Request::try_from(message.request).unwrap();
            let fault = self.script.fault.clone().filter(|(at, _)| *at == request).map(|(_, fault)| fault);
            let Message { flags, body, fds, .. } = message;
            let answer = self.answer(request, flags, &body);
            let given = if request == Request::GetInflightFd { self.record() } else { None };
            let given: Vec<_> = given.iter().map(|file| file.as_fd()).collect();
            // Before the answer: whoever has that finds the request in the log.
            self.note(Seen { request, body, fds });
            if let Some((_, pause)) = self.script.slow.filter(|(at, _)| *at == request) {
                thread::sleep(pause);
            }
            let Ok(()) = (match fault {
                Some(Fault::Close) => return,
                Some(Fault::Mute) => {
                    while let Ok(Some(_)) = self.channel.recv(None) {}
                    return;
                }
                Some(Fault::Raw(bytes)) => {
                    use std::io::Write;
                    let _ = self.channel.socket().write_all(&bytes);
                    Ok(())
                }
                Some(Fault::Answer(body)) => self.channel.send(request, Flags::REPLY, &body, &[], None),
                Some(Fault::OtherRequest) => self.channel.send(99u32, Flags::REPLY, &[0; 8], &[], None),
                None => answer
                    .map_or(Ok(()), |body| self.channel.send(request, Flags::REPLY, &body, &given, None)),
            }) else {
                return;
            };
        }
    }

    fn note(&self, seen: Seen) {
        self.log.seen.lock().unwrap().push(seen);
        self.log.more.notify_all();
    }

    /// A fresh record of requests in flight.
    fn record(&self) -> Option<OwnedFd> {
        let file = memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, RECORD * self.script.queues).unwrap();
        Some(file)
    }

    fn answer(&mut self, request: Request, flags: Flags, body: &[u8]) -> Option<Vec<u8>> {
        match request {
            Request::GetFeatures => Some(self.script.features.encode()),
            Request::GetProtocolFeatures => Some(self.script.protocol_features.encode()),
            Request::GetQueueNum => Some(self.script.queues.encode()),
            Request::GetConfig => Some(self.read_config(body)),
            Request::GetVringBase => {
                let VringState { index, .. } = VringState::decode(body).unwrap();
                Some(VringState { index, num: 7 }.encode())
            }
            Request::GetInflightFd => {
                let asked = Inflight::decode(body).unwrap();
                Some(Inflight { mmap_size: RECORD * self.script.queues, ..asked }.encode())
            }
            Request::SetProtocolFeatures => {
                self.acks = u64::decode(body).unwrap() & protocol::REPLY_ACK != 0;
                None
            }
            Request::SetConfig => {
                let Config { offset, data, .. } = Config::decode(body).unwrap();
                self.script.config[offset as usize..][..data.len()].copy_from_slice(&data);
                self.ack(flags)
            }
            _ => self.ack(flags),
        }
    }

    fn ack(&self, flags: Flags) -> Option<Vec<u8>> {
        assert_eq!(flags.needs_reply(), self.acks);
        flags.needs_reply().then(|| 0u64.encode())
    }

    fn read_config(&self, body: &[u8]) -> Vec<u8> {
        let mut config = Config::decode(body).unwrap();
        let have = &self.script.config;
        if config.data.len() > have.len() && self.script.strict_config {
            return Config { data: Vec::new(), ..config }.encode();
        }
        config.data = have[..config.data.len().min(have.len())].to_vec();
        config.encode()
    }
}
