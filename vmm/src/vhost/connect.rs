//! From a socket's path, or a socket, to a session whose features, queues and config space are known.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{Channel, Config, FrontendRequest, Message, Payload};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_socket, socket_with,
};

use super::backend::BackendChannel;
use super::wire::{Limit, Wire};
use super::{ConnectError, DEFAULT_DEADLINE, MAX_CONFIG_LEN, MAX_QUEUES, SessionError};

/// What the virtio-pci transport, the VMM and this session can do, besides the bits of the device type (0 to 23 and 50
/// on). Left out on purpose: packed rings, an IOMMU in front of the device, ring reset, notification data.
const UNDERSTOOD: u64 = DEVICE_BITS
    | virtio::RING_INDIRECT_DESC
    | virtio::RING_EVENT_IDX
    | virtio::VERSION_1
    | virtio::IN_ORDER
    | virtio::ORDER_PLATFORM;
const DEVICE_BITS: u64 = !(((1 << 26) - 1) << 24);

const PROTOCOL_UNDERSTOOD: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE;

/// Pauses between two tries to connect: short at first, because a daemon of ours is up in milliseconds.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Where a daemon is.
#[derive(Debug)]
pub enum Endpoint {
    /// It listens there, or will within `wait`. Once it is lost, its successor is looked for there.
    Path { path: PathBuf, wait: Duration },
    /// It has the other end of this. Once it is lost, [`super::Mailbox::reconnect`] brings its successor's.
    Socket(UnixStream),
}

/// Whom to talk to and how.
#[derive(Debug)]
pub struct Target {
    /// For messages and the thread's name: "disk0".
    pub device: String,
    pub endpoint: Endpoint,
    /// How many queues the device has, for a daemon that cannot say (no VHOST_USER_PROTOCOL_F_MQ); 1 if absent.
    pub queues: Option<u16>,
    pub patience: Patience,
}

/// How long a daemon may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For one operation: a handshake, a start, a stop, the config writes that wait. A stop waits until the daemon has
    /// drained what is in flight.
    pub deadline: Duration,
    /// For the first answer of a daemon at the other end of a socketpair, which is only just being started.
    pub first_answer: Duration,
    /// Time between two looks at whether a running daemon gets on.
    pub look: Duration,
    /// How long a daemon may complete nothing of a queue that has work. `None`: without end, for disks may be that slow.
    pub io: Option<Duration>,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            deadline: DEFAULT_DEADLINE,
            first_answer: Duration::from_secs(30),
            look: Duration::from_secs(3),
            io: None,
        }
    }
}

/// What a daemon has to offer to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Features that the daemon offers and the VMM understands.
    pub features: u64,
    /// 1 to [`MAX_QUEUES`].
    pub num_queues: u16,
    /// Its whole config space; empty if it has none.
    pub config: Vec<u8>,
}

impl Offer {
    /// Whether a guest that has seen `first` can have this instead.
    pub(super) fn replaces(&self, first: &Self) -> Result<(), SessionError> {
        let missing = first.features & !self.features;
        if missing != 0 {
            return Err(SessionError::FewerFeatures { missing });
        }
        let (has, had) = (self.num_queues, first.num_queues);
        if has < had { Err(SessionError::FewerQueues { has, had }) } else { Ok(()) }
    }
}

/// What stays the same through all connections of one session.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) device: String,
    pub(super) queues: Option<u16>,
    pub(super) patience: Patience,
    /// Where the daemon listens; `None` if its sockets are brought.
    pub(super) path: Option<PathBuf>,
}

/// A session after its handshake, with all rings stopped.
#[derive(Debug)]
pub struct Negotiated {
    pub(super) wire: Wire,
    pub(super) peer: Arc<Peer>,
    /// The daemon understands VHOST_USER_F_PROTOCOL_FEATURES; its rings start disabled then.
    pub(super) rings_start_disabled: bool,
    pub(super) backend: Option<BackendChannel>,
    pub(super) offer: Offer,
}

impl Negotiated {
    pub fn offer(&self) -> &Offer {
        &self.offer
    }
}

/// Connects and shakes hands. With a path, the whole of it is tried again until `wait` is over; it blocks as long.
///
/// # Errors
/// When nobody listens, or whoever does is no vhost-user daemon for a virtio 1.x device.
pub fn connect(target: Target) -> Result<Negotiated, ConnectError> {
    let Target { device, endpoint, queues, patience } = target;
    let name = device.clone();
    let peer = |path| Arc::new(Peer { device, queues, patience, path });
    let result = match endpoint {
        Endpoint::Socket(socket) => {
            let peer = peer(None);
            Greeting::send(socket, patience.first_answer).and_then(|greeting| greeting.finish(&peer))
        }
        Endpoint::Path { path, wait } => {
            let peer = peer(Some(path.clone()));
            retry(Instant::now() + wait, || Greeting::send(open(&path)?, patience.deadline)?.finish(&peer))
        }
    };
    result.map_err(|source| ConnectError { device: name, source })
}

fn retry<T>(end: Instant, mut attempt: impl FnMut() -> Result<T, SessionError>) -> Result<T, SessionError> {
    let mut pause = FIRST_PAUSE;
    loop {
        match attempt() {
            Err(error) if error.may_pass() && Instant::now() + pause < end => {
                tracing::trace!("trying again in {pause:?}: {error}");
                thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            result => return result,
        }
    }
}

/// A connect that does not wait: a daemon that serves somebody else may have a full backlog for ever.
pub(super) fn open(path: &Path) -> Result<UnixStream, SessionError> {
    let connect = || -> Result<UnixStream, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect_socket(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    };
    connect().map_err(|errno| {
        let (path, source) = (path.to_owned(), io::Error::from(errno));
        match errno {
            // The answer that a file of another kind gives, too: no daemon will ever listen on that.
            Errno::CONNREFUSED if is_no_socket(&path) => SessionError::NotASocket(path),
            Errno::PROTOTYPE => SessionError::OtherKind(path),
            Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN => SessionError::NobodyListens { path, source },
            _ => SessionError::Connect { path, source },
        }
    })
}

/// Whether something is at `path` that is no socket.
pub fn is_no_socket(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| !found.file_type().is_socket())
}

/// A connection on which we have spoken and the daemon has not answered yet: one that is just being started may take
/// its time. Readable once it answers, or is gone.
#[derive(Debug)]
pub(super) struct Greeting {
    wire: Wire,
    limit: Limit,
}

impl Greeting {
    /// Sends what needs no answer to be sent. The daemon has `span` to answer.
    pub(super) fn send(socket: UnixStream, span: Duration) -> Result<Self, SessionError> {
        let limit = Limit::new(span);
        let mut wire = Wire::new(Channel::new(socket));
        wire.tell(FrontendRequest::SetOwner, &(), &[], limit)?;
        wire.ask_later(FrontendRequest::GetFeatures, &(), limit)?;
        Ok(Self { wire, limit })
    }

    /// When it is too late for an answer.
    pub(super) fn end(&self) -> Instant {
        self.limit.end()
    }

    pub(super) fn too_late(&self) -> SessionError {
        self.limit.passed(FrontendRequest::GetFeatures)
    }

    /// Takes the first answer, some of which is there, and does the rest of the handshake.
    pub(super) fn go_on(mut self, peer: &Arc<Peer>) -> Result<Negotiated, SessionError> {
        self.limit = Limit::new(peer.patience.deadline);
        self.finish(peer)
    }

    /// Waits for the first answer and does the rest of the handshake.
    fn finish(self, peer: &Arc<Peer>) -> Result<Negotiated, SessionError> {
        let Self { mut wire, limit } = self;
        let answer = wire.receive(FrontendRequest::GetFeatures, limit)?;
        let features: u64 = answer
            .payload()
            .map_err(|source| SessionError::Malformed { request: FrontendRequest::GetFeatures, source })?;
        if features & virtio::VERSION_1 == 0 {
            return Err(SessionError::NoVersion1 { features });
        }
        let limit = Limit::new(peer.patience.deadline);
        let rings_start_disabled = features & virtio::PROTOCOL_FEATURES != 0;
        if rings_start_disabled {
            let offered: u64 = wire.ask(FrontendRequest::GetProtocolFeatures, &(), limit)?;
            let accepted = offered & PROTOCOL_UNDERSTOOD;
            wire.tell(FrontendRequest::SetProtocolFeatures, &accepted, &[], limit)?;
            wire.negotiated(accepted);
        }
        let offer = Offer {
            features: features & UNDERSTOOD,
            num_queues: count_queues(&mut wire, peer.queues, limit)?,
            config: if wire.has(protocol::CONFIG) { read_config(&mut wire, limit)? } else { Vec::new() },
        };
        let backend = match wire.has(protocol::BACKEND_REQ) {
            true => Some(BackendChannel::open(&mut wire, limit)?),
            false => None,
        };
        tracing::debug!("device {}: {offer:x?}", peer.device);
        Ok(Negotiated { wire, peer: Arc::clone(peer), rings_start_disabled, backend, offer })
    }
}

impl AsFd for Greeting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }
}

/// A daemon without MQ cannot say how many queues it has, and the VMM knows no device type that would tell: then it is
/// as many as the user says, or one.
fn count_queues(wire: &mut Wire, queues: Option<u16>, limit: Limit) -> Result<u16, SessionError> {
    let count = if wire.has(protocol::MQ) {
        wire.ask(FrontendRequest::GetQueueNum, &(), limit)?
    } else {
        u64::from(queues.unwrap_or(1))
    };
    match count {
        0 => Err(SessionError::NoQueues),
        count => Ok(u16::try_from(count).unwrap_or(MAX_QUEUES).min(MAX_QUEUES)),
    }
}

/// The whole config space. The protocol has no way to ask for its length, and daemons answer a request for more than
/// they have with all of it, with a part, or with an error: so the longest that works is searched for.
fn read_config(wire: &mut Wire, limit: Limit) -> Result<Vec<u8>, SessionError> {
    let mut longest = get_config(wire, MAX_CONFIG_LEN, limit)?;
    let (mut works, mut fails) = (longest.len(), MAX_CONFIG_LEN);
    if works == 0 {
        while fails - works > 1 {
            let len = works.midpoint(fails);
            let config = get_config(wire, len, limit)?;
            if config.is_empty() {
                fails = len;
            } else {
                works = len;
                longest = config;
            }
        }
    }
    Ok(longest)
}

/// The first `len` bytes of config space, fewer if the daemon has fewer, none if it refuses.
pub(super) fn get_config(wire: &mut Wire, len: usize, limit: Limit) -> Result<Vec<u8>, SessionError> {
    const REQUEST: FrontendRequest = FrontendRequest::GetConfig;
    let asked = Config { offset: 0, flags: 0, data: vec![0; len] };
    let answer: Message = wire.ask_raw(REQUEST, &asked, limit)?;
    if answer.body.is_empty() {
        return Ok(Vec::new());
    }
    let config = Config::decode(&answer.body)
        .map_err(|source| SessionError::Malformed { request: REQUEST, source })?;
    let mut data = config.data;
    data.truncate(len);
    Ok(data)
}
