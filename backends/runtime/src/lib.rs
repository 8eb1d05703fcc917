//! What every Cleave device daemon shares.
//!
//! A daemon is a [`Device`] that [`run`] serves: the runtime owns the socket, the vhost-user session, guest memory and
//! the life of each queue. It has no word for any device type.

mod args;
mod backend_channel;
mod complaints;
mod control;
pub mod cpus;
mod device;
mod dirty_log;
mod footprint;
mod many;
mod memory;
mod polling;
mod queue_thread;
mod sandbox;
mod server;
mod session;
mod shared;
mod signals;
mod socket;
mod vring;
mod waiter;
mod way;

pub use args::{CommonArgs, SocketClaim, capabilities_json, claim_descriptors, print_capabilities};
pub use complaints::Complaints;
pub use control::{
    Control, ControlArgs, ControlServer, ControlSocket, ControlSocketError, CtlArgs, DaemonCommand,
};
pub use device::{Device, Stop};
pub use many::{Member, run_all};
pub use memory::{GuestMemory, MemoryError};
pub use polling::Polling;
pub use queue_thread::{Command, Inbox, QueueThread};
pub use sandbox::{Confined, Sandbox, SandboxError, SandboxMode};
pub use server::run;
pub use shared::SharedError;
pub use signals::Signals;
pub use socket::{Endpoint, Listener, SocketError};
pub use vring::{
    Caller, Chain, ChainError, InflightError, Kept, MAX_SEGMENTS, QueueIndex, RingAddresses, RingError,
    Segment, Vring,
};
pub use waiter::{Ready, Waiter};
pub use way::Way;
