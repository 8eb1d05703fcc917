//! `--net`: a network device (virtio 1.2, 5.1). With `tap=` it is a daemon that we start, with `socket=` one that someone
//! else runs.

use std::path::PathBuf;

use cleave_common::interface::{self, NotAnInterfaceName};
use cleave_common::mac::MacAddress;
use cleave_common::throttle::{NetThrottleConfig, ThrottleError};
use serde::Deserialize;

use super::device::{DeviceConfig, Restart, RestartLimitError, TimeSpan};

/// `--net tap=NAME[,bridge=NAME][,mac=ADDRESS][,mtu=BYTES][,queues=N][,poll-us=N][,cpus=LIST][,throttle.KEY=N...]`
/// `[,pcap=PATH[,pcap-snaplen=BYTES]][,restart=...]`,
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetKind {
    /// No network: also none of those that were asked for before.
    None,
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
    /// A daemon that someone else runs.
    Socket { socket: PathBuf, wait: TimeSpan, queues: Option<u16> },
}

impl NetDevice {
    pub fn tap(&self) -> Option<&String> {
        match &self.peer {
            NetPeer::Tap { tap, .. } => Some(tap),
            NetPeer::Socket { .. } => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    #[error("it takes one of: tap=NAME, socket=PATH, none")]
    NoPeer,
    #[error("'none' stands alone: it takes nothing else")]
    NotAlone,
    #[error(
        "{0}= is for a daemon that cleave starts (tap=), and not for one that someone else runs (socket=)"
    )]
    OfTap(&'static str),
    #[error(
        "wait= is for a daemon that someone else runs (socket=), and not for one that cleave starts (tap=)"
    )]
    OfSocket,
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
        let peer = match (self.tap.clone(), self.socket.clone()) {
            (Some(tap), None) => self.with_tap(tap)?,
            (None, Some(socket)) => self.with_socket(socket)?,
            _ => return Err(NetError::NoPeer),
        };
        Ok(NetDevice { name, peer })
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
        self.throttle.validate()?;
        if let Some(len) =
            self.pcap_snaplen.filter(|len| self.pcap.is_none() || !(14..=262_144).contains(len))
        {
            return Err(NetError::Snaplen(len));
        }
        Ok(NetPeer::Tap { tap, settings: Box::new(self) })
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
        match given.iter().find(|(_, given)| *given) {
            Some((key, _)) => Err(NetError::OfTap(key)),
            None => {
                if let Some(queues) = self.queues.filter(|n| !(1..=DeviceConfig::MAX_QUEUES).contains(n)) {
                    return Err(NetError::SocketQueues { queues });
                }
                let wait = self.wait.unwrap_or_else(DeviceConfig::default_wait);
                Ok(NetPeer::Socket { socket, wait, queues: self.queues })
            }
        }
    }

    /// Whether more is said than `none`.
    pub fn says_more(&self) -> bool {
        Self { kind: None, ..self.clone() } != Self::default()
    }
}
