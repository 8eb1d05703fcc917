//! `--net`: a network device (virtio 1.2, 5.1). With `tap=` and `user` it is a daemon that we start, with `socket=` one that
//! someone else runs.

use std::path::PathBuf;

use cleave_common::forward::PortForward;
use cleave_common::interface::{self, NotAnInterfaceName};
use cleave_common::mac::MacAddress;
use cleave_common::passt::PasstOptions;
use cleave_common::throttle::{NetThrottleConfig, ThrottleError};
use serde::Deserialize;

use super::device::{DeviceConfig, Restart, RestartLimitError, TimeSpan};

/// `--net tap=NAME[,bridge=NAME][,mac=ADDRESS][,mtu=BYTES][,queues=N][,poll-us=N][,cpus=LIST][,throttle.KEY=N...]`
/// `[,pcap=PATH[,pcap-snaplen=BYTES]][,restart=...]`,
/// `--net user[,hostfwd=tcp:2222:22...][,host=on][,direct=on]` with those of these that fit,
/// `--net socket=PATH[,wait=30s][,queues=N]`, each with `[,id=ID]`; or `--net none`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NetConfig {
    /// The word in front, where there is one.
    pub kind: Option<NetKind>,
    pub tap: Option<String>,
    pub bridge: Option<String>,
    pub mac: Option<MacAddress>,
    /// Of the tap device: bytes of the largest frame, without its Ethernet header.
    pub mtu: Option<u16>,
    /// Pairs of virtqueues of a daemon that we start, virtqueues of one that cannot say how many it has.
    pub queues: Option<u16>,
    /// How long a queue's thread may look for work before it sleeps, in microseconds.
    pub poll_us: Option<u32>,
    pub cpus: Option<cleave_common::cpus::CpuList>,
    #[serde(default)]
    pub throttle: NetThrottleConfig,
    /// A file or a named pipe for all frames, and how many bytes of each.
    pub pcap: Option<PathBuf>,
    pub pcap_snaplen: Option<u32>,
    pub restart: Option<Restart>,
    pub restart_limit: Option<u32>,
    pub socket: Option<PathBuf>,
    pub wait: Option<TimeSpan>,
    pub id: Option<String>,
    /// Ports of the host's that lead to the guest.
    #[serde(default)]
    pub hostfwd: Vec<PortForward>,
    /// Whether the guest reaches the host's own services, those on its loopback too.
    pub host: Option<bool>,
    /// Whether passt serves the device itself, with no daemon of ours between.
    pub direct: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetKind {
    /// No network: also none of those that were asked for before.
    None,
    /// passt's: without privilege.
    User,
}

/// A network device that can be planned.
#[derive(Debug, Clone, PartialEq)]
pub struct NetDevice {
    pub name: String,
    pub peer: NetPeer,
}

/// Who serves it.
#[derive(Debug, Clone, PartialEq)]
pub enum NetPeer {
    /// A daemon that we start, on a tap device.
    Tap { tap: String, settings: Box<NetConfig> },
    /// A daemon that we start, which starts passt.
    User { passt: PasstOptions, settings: Box<NetConfig> },
    /// passt itself, started by us.
    Passt { passt: PasstOptions, settings: Box<NetConfig> },
    /// A daemon that someone else runs.
    Socket { socket: PathBuf, wait: TimeSpan, queues: Option<u16> },
}

impl NetDevice {
    pub fn tap(&self) -> Option<&String> {
        match &self.peer {
            NetPeer::Tap { tap, .. } => Some(tap),
            NetPeer::User { .. } | NetPeer::Passt { .. } | NetPeer::Socket { .. } => None,
        }
    }

    /// Whether it is passt's, with a daemon of ours between or not.
    pub fn is_user(&self) -> bool {
        matches!(self.peer, NetPeer::User { .. } | NetPeer::Passt { .. })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    #[error("it takes one of: tap=NAME, user, socket=PATH, none")]
    NoPeer,
    #[error("'none' stands alone: it takes nothing else")]
    NotAlone,
    #[error(
        "{0}= is for a daemon that cleave starts (tap=, user), and not for one that someone else runs (socket=)"
    )]
    OfTap(&'static str),
    #[error(
        "wait= is for a daemon that someone else runs (socket=), and not for one that cleave starts (tap=, user)"
    )]
    OfSocket,
    #[error("{0}= goes with user: the network that passt makes")]
    OfUser(&'static str),
    #[error("{0}= does not go with user: passt has no tap device, and one pair of queues")]
    NotOfUser(&'static str),
    #[error("{0}= does not go with direct=on: it is for cleave-net, and there is none between")]
    NotDirect(&'static str),
    #[error(transparent)]
    RestartLimit(#[from] RestartLimitError),
    #[error("queues={queues}: a network device has 1 to {} pairs of queues", NetConfig::MAX_PAIRS)]
    Queues { queues: u16 },
    #[error("queues={queues}: a device has 1 to {} queues", DeviceConfig::MAX_QUEUES)]
    SocketQueues { queues: u16 },
    #[error("{key}={name:?}: {NotAnInterfaceName}")]
    Name { key: &'static str, name: String },
    #[error("mtu={0}: it is 68 to 65521 bytes")]
    Mtu(u16),
    #[error("throttle: {0}")]
    Throttle(#[from] ThrottleError),
    #[error("pcap-snaplen={0}: it is 14 to 262144 bytes of the frames that pcap=PATH captures")]
    Snaplen(u32),
    #[error("mtu={0}: with user it is 68 to 65520 bytes")]
    UserMtu(u16),
}

impl NetConfig {
    pub const MAX_PAIRS: u16 = 64;

    /// What messages call the device; `at` is its place among the network devices.
    pub fn name(&self, at: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("net{at}"))
    }

    pub fn is_none(&self) -> bool {
        self.kind == Some(NetKind::None)
    }

    /// The device that is asked for, or what is wrong with it.
    pub fn validate(self, at: usize) -> Result<NetDevice, NetError> {
        let name = self.name(at);
        let is_user = self.kind == Some(NetKind::User);
        let of_user = [
            ("hostfwd", !self.hostfwd.is_empty()),
            ("host", self.host.is_some()),
            ("direct", self.direct.is_some()),
        ];
        if !is_user {
            refuse(of_user, NetError::OfUser)?;
        }
        let peer = match (self.tap.clone(), self.socket.clone()) {
            (None, None) if is_user => self.with_passt()?,
            (Some(tap), None) if !is_user => self.with_tap(tap)?,
            (None, Some(socket)) if !is_user => self.with_socket(socket)?,
            _ => return Err(NetError::NoPeer),
        };
        Ok(NetDevice { name, peer })
    }

    fn with_passt(self) -> Result<NetPeer, NetError> {
        refuse([("bridge", self.bridge.is_some()), ("queues", self.queues.is_some())], NetError::NotOfUser)?;
        if self.wait.is_some() {
            return Err(NetError::OfSocket);
        }
        self.restart.unwrap_or_default().check_limit(self.restart_limit)?;
        if let Some(mtu) = self.mtu.filter(|mtu| !(68..=65520).contains(mtu)) {
            return Err(NetError::UserMtu(mtu));
        }
        self.check_frames()?;
        let host = self.host.unwrap_or(false);
        let passt = PasstOptions { forwards: self.hostfwd.clone(), host, mtu: self.mtu };
        if !self.direct.unwrap_or(false) {
            return Ok(NetPeer::User { passt, settings: Box::new(self) });
        }
        let ours = [
            ("mac", self.mac.is_some()),
            ("poll-us", self.poll_us.is_some()),
            ("cpus", self.cpus.is_some()),
            ("throttle", !self.throttle.is_empty()),
            ("pcap", self.pcap.is_some()),
        ];
        refuse(ours, NetError::NotDirect)?;
        Ok(NetPeer::Passt { passt, settings: Box::new(self) })
    }

    fn with_tap(self, tap: String) -> Result<NetPeer, NetError> {
        let names = [("tap", Some(&tap)), ("bridge", self.bridge.as_ref())];
        for (key, name) in names {
            if let Some(name) = name.filter(|name| interface::check(name).is_err()) {
                return Err(NetError::Name { key, name: name.clone() });
            }
        }
        if self.wait.is_some() {
            return Err(NetError::OfSocket);
        }
        self.restart.unwrap_or_default().check_limit(self.restart_limit)?;
        if let Some(queues) = self.queues.filter(|queues| !(1..=Self::MAX_PAIRS).contains(queues)) {
            return Err(NetError::Queues { queues });
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !(68..=65521).contains(mtu)) {
            return Err(NetError::Mtu(mtu));
        }
        self.check_frames()?;
        Ok(NetPeer::Tap { tap, settings: Box::new(self) })
    }

    /// What is done with the frames that pass.
    fn check_frames(&self) -> Result<(), NetError> {
        self.throttle.validate()?;
        match self.pcap_snaplen.filter(|len| self.pcap.is_none() || !(14..=262_144).contains(len)) {
            Some(len) => Err(NetError::Snaplen(len)),
            None => Ok(()),
        }
    }

    fn with_socket(self, socket: PathBuf) -> Result<NetPeer, NetError> {
        let given = [
            ("bridge", self.bridge.is_some()),
            ("mac", self.mac.is_some()),
            ("mtu", self.mtu.is_some()),
            ("poll-us", self.poll_us.is_some()),
            ("cpus", self.cpus.is_some()),
            ("throttle", self.throttle != NetThrottleConfig::default()),
            ("pcap", self.pcap.is_some()),
            ("pcap-snaplen", self.pcap_snaplen.is_some()),
            ("restart", self.restart.is_some()),
            ("restart-limit", self.restart_limit.is_some()),
        ];
        refuse(given, NetError::OfTap)?;
        if let Some(queues) = self.queues.filter(|n| !(1..=DeviceConfig::MAX_QUEUES).contains(n)) {
            return Err(NetError::SocketQueues { queues });
        }
        let wait = self.wait.unwrap_or_else(DeviceConfig::default_wait);
        Ok(NetPeer::Socket { socket, wait, queues: self.queues })
    }

    /// Whether more is said than `none`.
    pub fn says_more(&self) -> bool {
        Self { kind: None, ..self.clone() } != Self::default()
    }
}

/// Refuses the first of these keys that is given.
fn refuse<const N: usize>(
    keys: [(&'static str, bool); N],
    error: fn(&'static str) -> NetError,
) -> Result<(), NetError> {
    match keys.into_iter().find(|(_, given)| *given) {
        Some((key, _)) => Err(error(key)),
        None => Ok(()),
    }
}
