//! Why a session could not begin, or ended.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use cleave_common::vhost_user::{ChannelError, FrontendRequest, Malformed};

use super::inflight::InflightError;

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("no daemon listens on {}: start it, or wait longer for it with wait=", path.display())]
    NobodyListens { path: PathBuf, source: io::Error },
    #[error("cannot connect to {}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("{} is not a socket: name the one that the daemon listens on", .0.display())]
    NotASocket(PathBuf),
    #[error("{} is a socket of another kind (datagram or seqpacket): name the one that the daemon listens on", .0.display())]
    OtherKind(PathBuf),
    #[error("the daemon did not answer {request} within {} s{}", limit.as_secs_f64(), who_hangs(*request))]
    Timeout { request: FrontendRequest, limit: Duration },
    #[error("the daemon did not answer within {} s, and its rings stand still", .0.as_secs_f64())]
    Hangs(Duration),
    #[error("the daemon answers, but has completed nothing of queue {queue} for {} s (io-timeout=)", still.as_secs())]
    CompletesNothing { queue: usize, still: Duration },
    #[error("the daemon closed the connection at {request}{}", who_closes(*request))]
    Closed { request: FrontendRequest },
    #[error("the daemon closed the connection")]
    HungUp,
    #[error("the daemon refused {request} (answer {code})")]
    Refused { request: FrontendRequest, code: u64 },
    #[error("the daemon's answer to {request} makes no sense")]
    Malformed { request: FrontendRequest, source: Malformed },
    #[error("the daemon answered message {got} where {request} was asked: it does not speak vhost-user")]
    WrongAnswer { request: FrontendRequest, got: u32 },
    #[error("the daemon sent message {0}, which nobody asked for")]
    Unasked(u32),
    #[error("the daemon sent something that is no message")]
    Garbage(#[source] Malformed),
    #[error(
        "the daemon offers no VIRTIO_F_VERSION_1 (its features are {features:#x}): only virtio 1.x devices can be attached"
    )]
    NoVersion1 { features: u64 },
    #[error("the daemon says that it has no queue")]
    NoQueues,
    #[error("the daemon makes no sense: {0}")]
    Inflight(#[from] InflightError),
    #[error(
        "the daemon that is there now does not offer all features that the guest has seen ({missing:#x} are missing): start it as the first one was"
    )]
    FewerFeatures { missing: u64 },
    #[error(
        "the daemon that is there now has {has} queues and the guest has seen {had}: start it as the first one was"
    )]
    FewerQueues { has: u16, had: u16 },
    #[error("vhost-user socket")]
    Io(#[from] io::Error),
}

impl SessionError {
    /// From a channel's error while `request` was sent or answered.
    pub(super) fn during(request: FrontendRequest, limit: Duration, error: ChannelError) -> Self {
        match error {
            ChannelError::Timeout => Self::Timeout { request, limit },
            ChannelError::Disconnected => Self::Closed { request },
            ChannelError::Malformed(source) => Self::Malformed { request, source },
            ChannelError::Io(source) => Self::Io(source),
        }
    }

    /// Whether the daemon's end of the socket is closed: it is gone, or has let go of this session.
    pub(super) fn is_hang_up(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::HungUp)
    }

    /// Whether there simply is no daemon: the ordinary reason for which a lost device stays lost.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::NobodyListens { .. })
    }

    /// Whether another try may find a daemon that is up by then.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Self::NobodyListens { .. } | Self::Timeout { .. } | Self::Closed { .. })
    }
}

/// A daemon that understood the first requests is one; before that it may be anything.
fn is_first_contact(request: FrontendRequest) -> bool {
    use FrontendRequest::{GetFeatures, GetProtocolFeatures, SetOwner};
    matches!(request, SetOwner | GetFeatures | GetProtocolFeatures)
}

fn who_hangs(request: FrontendRequest) -> &'static str {
    if is_first_contact(request) {
        ": it hangs, serves another frontend, or is no vhost-user daemon"
    } else {
        ""
    }
}

fn who_closes(request: FrontendRequest) -> &'static str {
    if is_first_contact(request) { ": it is no vhost-user daemon, or it serves another frontend" } else { "" }
}

/// A session that could not begin, and whose it was.
#[derive(Debug, thiserror::Error)]
#[error("device {device}: {source}")]
pub struct ConnectError {
    pub device: String,
    pub source: SessionError,
}
