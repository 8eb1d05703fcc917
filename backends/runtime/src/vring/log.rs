//! What a ring writes to guest memory, for the log.

use std::sync::Arc;

use vm_memory::GuestAddress;

use super::{Chain, Notifier, SplitRing};
use crate::dirty_log::DirtyLog;
use crate::memory::GuestMemory;

/// Where a ring logs while the frontend wants it (VHOST_F_LOG_ALL).
#[derive(Debug)]
pub(crate) struct RingLog {
    log: Arc<DirtyLog>,
    /// Where the log has the used ring, if its writes are wanted too (VHOST_VRING_F_LOG).
    used: Option<GuestAddress>,
    /// Who wants to know of new bits.
    call: Notifier,
    chain: Chain,
}

impl RingLog {
    pub(crate) fn new(log: Arc<DirtyLog>, used: Option<GuestAddress>, call: Notifier) -> Self {
        Self { log, used, call, chain: Chain::default() }
    }

    /// A request is over: its buffers have been written, by whomever and up to wherever. They are looked up again, for
    /// they are the driver's until it gets the chain back, and so no device has to remember them.
    pub(super) fn chain_written(&mut self, memory: &GuestMemory, ring: &SplitRing, head: u16) {
        // A chain that cannot be read was not served.
        if self.chain.read(memory, ring.descriptor_table(), ring.size(), head).is_ok() {
            for segment in self.chain.writable() {
                self.log.mark(segment.addr, segment.len.into());
            }
        }
    }

    /// `len` bytes of the used ring from `offset` have been written.
    pub(super) fn used_ring_written(&self, offset: u64, len: u64) {
        if let Some(used) = self.used {
            self.log.mark(GuestAddress(used.0.saturating_add(offset)), len);
        }
    }

    pub(super) fn call(&self) -> Notifier {
        self.call.clone()
    }

    pub(super) fn signal(&self) {
        self.call.signal();
    }
}
