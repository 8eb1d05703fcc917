//! Why a request is not done.

use cleave_common::vhost_user::{ChannelError, FrontendRequest, Malformed, UnknownRequest};

use crate::memory::MemoryError;
use crate::shared::SharedError;
use crate::vring::{InflightError, RingError};

/// Why a request is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("{request}: {source}")]
    Refused { request: FrontendRequest, source: Refusal },
    #[error(transparent)]
    Unknown(#[from] UnknownRequest),
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// What is wrong with one request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error("the dirty log: {0}")]
    Log(#[from] SharedError),
    #[error("this backend does not implement it")]
    NotOffered,
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("queue {index} does not exist: the device has {num_queues}")]
    NoSuchQueue { index: u32, num_queues: u16 },
    #[error("{num} is no size for a queue: a power of two up to {max} is")]
    QueueSize { num: u32, max: u16 },
    #[error("a vring part is misaligned or outside guest memory")]
    VringOutsideMemory,
    #[error("not before queue {0} is stopped")]
    Running(u16),
    #[error(
        "queue {0} needs a kick descriptor that can be waited for, an eventfd: this backend does not poll its rings"
    )]
    NoKick(u8),
    #[error("the descriptor is no socket")]
    NoSocket,
    #[error("bytes {offset} to {end} are outside config space")]
    ConfigRange { offset: u64, end: u64 },
    #[error("{0}")]
    Device(Box<dyn std::error::Error + Send + Sync>),
}
