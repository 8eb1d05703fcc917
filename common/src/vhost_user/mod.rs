//! The vhost-user wire format: one codec for the VMM's frontend session and for the daemons' server.
//!
//! It follows the vhost-user specification (QEMU, docs/interop/vhost-user.rst), whose words are used throughout: a
//! *frontend* (the VMM) sends [`FrontendRequest`]s, a *backend* (the device daemon) answers, and may send
//! [`BackendRequest`]s on a second socket.
//!
//! Everything that arrives is hostile: sizes, counts and file descriptors are bounded here, and a payload decodes
//! only from exactly the bytes it should have. What the numbers *mean* is for the session and the server to check.
//!
//! The specification says "machine native byte order"; both ends run on one little-endian machine, so the codec
//! writes little-endian.

mod channel;
pub mod features;
mod message;
mod payload;

pub use channel::{Channel, ChannelError, Received};
pub use message::{BackendRequest, Flags, FrontendRequest, HEADER_LEN, Header, Message, UnknownRequest};
pub use payload::{
    Config, DeviceState, Inflight, LogBase, Malformed, MemoryRegion, MemoryTable, Payload, SingleRegion,
    VringAddr, VringArea, VringFd, VringState,
};

/// Longest payload either side may send: a whole 4 KiB config space behind its [`Config`] header.
pub const MAX_BODY_LEN: usize = 4096 + 12;

/// Most file descriptors one message may carry. The specification's largest need is one for each of 8 regions.
pub const MAX_FDS: usize = 32;

/// Most regions in one SET_MEM_TABLE (vhost-user, "Multiple Memory regions description").
pub const MAX_TABLE_REGIONS: usize = 8;

/// Most memory slots a backend offers with CONFIGURE_MEM_SLOTS; as many as KVM's usable memslots in QEMU.
pub const MAX_MEM_SLOTS: usize = 509;

#[cfg(test)]
mod tests;
