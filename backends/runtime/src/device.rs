//! The contract between the runtime and a device.
//!
//! ```text
//!   stopped --start_queue(vring)--> running --stop_queue, which drains--> stopped
//! ```
//!
//! The runtime speaks vhost-user, maps guest memory and decides when each queue runs; the device knows its features,
//! its config space and what the buffers in its queues mean. A running queue's [`Vring`] belongs to the device, which
//! serves it on whatever thread it likes; a stopped one's belongs to the runtime. No lock is shared between them.

use std::error::Error;
use std::os::fd::BorrowedFd;

use cleave_common::virtio::DeviceType;

use crate::vring::{Kept, QueueIndex, Vring};

/// Why a queue is stopped, and so what becomes of requests that cannot be completed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The session goes on, and its frontend relies on it that nothing is left with the device: they are failed, unless
    /// the vring remembers them ([`Vring::remembers_in_flight`]), for then they come again with the ring's next start.
    Drain,
    /// The session is over: they stay unanswered. The frontend is gone, or finds that they are not done.
    SessionOver,
}

/// A virtio device behind a vhost-user socket. Called from the session's thread only; no call may wait for a guest.
pub trait Device {
    /// For messages to a person.
    fn device_type(&self) -> DeviceType;

    /// Feature bits of the device type (virtio 1.2, 5.x). The runtime adds what it implements for every device:
    /// VERSION_1, RING_INDIRECT_DESC, RING_EVENT_IDX.
    fn features(&self) -> u64;

    fn num_queues(&self) -> u16;

    /// Whether guest memory has to be in files that are sealed against shrinking: threads that serve other guests use it,
    /// too, and neither a file that is cut off nor one whose pages never come may end or stop these.
    fn needs_sealed_memory(&self) -> bool {
        false
    }

    /// Entries of the largest queue this device serves, a power of two.
    fn max_queue_size(&self) -> u16;

    /// What the guest acknowledged, a subset of [`Device::features`] and VERSION_1. All queues are stopped. The driver may
    /// be another one than before; where it goes on, its rings do.
    fn ack_features(&mut self, features: u64);

    /// The whole config space. Reads past its end are answered with zeros.
    fn config(&self) -> Vec<u8>;

    /// A guest's write at byte `offset`; `offset + data.len()` lies inside [`Device::config`]. Queues may be running.
    ///
    /// # Errors
    /// The field is not writable or the value makes no sense; nothing has changed then.
    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Serves `vring` from now on. The queue of its index is stopped.
    ///
    /// # Errors
    /// The queue cannot run; it stays stopped.
    fn start_queue(&mut self, vring: Vring) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// Fetches no more requests, completes those that it has, and gives the vring back. `None` if the queue is not running.
    /// [`Stop`] says what becomes of those that cannot be completed now.
    fn stop_queue(&mut self, index: QueueIndex, stop: Stop) -> Option<Vring>;

    /// SIGHUP: looks at what it serves again. `true` when config space has changed, of which the frontend is told. Queues
    /// may be running, and there may be no session.
    ///
    /// # Errors
    /// What it serves cannot be looked at, or has become something that cannot be served; nothing has changed then.
    fn reload(&mut self) -> Result<bool, Box<dyn Error + Send + Sync>> {
        Ok(false)
    }

    /// SIGUSR1: how it is, in one line for a person: what is in flight, what was served. Queues may be running.
    fn report(&self) -> String;

    /// Readable when config space may have changed by itself: then [`Device::take_change`] is called.
    fn change_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Empties what [`Device::change_fd`] reads from. `true` when config space has changed, of which the frontend is told.
    fn take_change(&mut self) -> bool {
        false
    }

    /// Bytes that this device wants to find as it left them when its process has been killed, at most a few pages.
    fn kept_len(&self) -> u64 {
        0
    }

    /// Where those bytes are from now on: beside the requests in flight, and as long as these are kept. All queues are stopped.
    ///
    /// # Errors
    /// They cannot be used. The device does without.
    fn set_kept(&mut self, _kept: Kept) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }

    /// Back to the state before the first session. All queues are stopped.
    fn reset(&mut self);
}
