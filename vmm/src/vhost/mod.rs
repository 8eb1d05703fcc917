//! The vhost-user frontend: one session a device, each with a thread that owns the socket.
//!
//! ```text
//!   connect()        Negotiated::spawn()               Mailbox::start()
//!   ────────> Negotiated ─────────> session thread: Negotiated ⇄ Running
//!                                              ^       Mailbox::stop()
//!                                              │
//!       the way back, without end ─────────── Lost <── any error, deadline or hang-up
//! ```
//!
//! Invariants: only the session's thread touches the socket; whoever uses the device leaves a note in its mailbox and
//! never waits; every exchange ends by a deadline; addresses on the wire are never ours, see [`MemoryTable`]; a request
//! that a lost daemon had is done again once, or the driver is told that the device needs a reset.

mod backend;
mod connect;
mod error;
#[cfg(test)]
pub(crate) mod fake;
mod inflight;
mod lost;
mod mailbox;
mod memory;
mod recovery;
mod ring;
mod running;
mod session;
mod watch;
mod wire;

pub use connect::{Endpoint, Negotiated, Patience, Target, connect, is_no_socket};
pub use error::{ConnectError, SessionError};
pub use lost::CannotResume;
pub use mailbox::{Mailbox, Start, Successor};
pub use memory::MemoryTable;
#[cfg(test)]
pub use memory::Region;
pub use ring::{Ring, RingAddresses, RingError};
pub use session::{Observer, SessionThread};

use std::time::Duration;

/// Time for a whole handshake, a start, a stop or the config writes that wait, unless the target says otherwise. A stop waits until
/// the daemon has drained what is in flight.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(5);

/// Most virtqueues of one device: a vring's index has 8 bits in SET_VRING_KICK and SET_VRING_CALL.
pub const MAX_QUEUES: u16 = 256;

/// Longest config space asked for (vhost-user, VHOST_USER_MAX_CONFIG_SIZE).
pub const MAX_CONFIG_LEN: usize = 256;

#[cfg(test)]
mod tests;
