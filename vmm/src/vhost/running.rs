//! What is said to a daemon whose features are known: start, stop, reset, calls, config space.

use std::os::fd::AsFd;

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{Config, FrontendRequest, VringAddr, VringFd, VringState};

use super::SessionError;
use super::connect::{Negotiated, get_config};
use super::inflight::Inflight;
use super::mailbox::{ConfigWrite, Start};
use super::memory::MemoryTable;
use super::ring::{Indices, Ring};
use super::wire::Limit;

/// What a driver wants to run, and what its daemon left behind: all that a successor must be given.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) start: Start,
    /// `None` if the daemon keeps no record.
    pub(super) inflight: Option<Inflight>,
    /// A daemon has, or had, a ring of it: the next one goes on where the used ring ends, not at 0.
    pub(super) begun: bool,
}

impl Active {
    pub(super) fn new(start: Start) -> Self {
        Self { start, inflight: None, begun: false }
    }

    /// By ring.
    pub(super) fn indices(&self, memory: &MemoryTable) -> Vec<Option<Indices>> {
        self.start.rings.iter().map(|ring| ring.indices(memory)).collect()
    }

    /// How many requests a daemon that gets the record now will do again.
    pub(super) fn count_in_flight(&self, memory: &MemoryTable) -> u64 {
        let Some(inflight) = &self.inflight else { return 0 };
        let count = |ring: &Ring| Some(inflight.count(ring.index, ring.indices(memory)?.used));
        self.start.rings.iter().filter_map(count).sum()
    }
}

/// What the driver wrote to config space since the last reset, in order. A daemon may refuse it before it knows the driver's
/// features, and a successor starts without it, so it is told at each start: a disk whose guest chose write-through must
/// not be served write-back.
#[derive(Debug, Default)]
pub(super) struct Written(Vec<ConfigWrite>);

impl Written {
    /// A write voids those whose bytes it replaces, so a guest that goes on writing does not let this grow.
    pub(super) fn note(&mut self, write: ConfigWrite) {
        let bytes = |write: &ConfigWrite| (write.offset as usize, write.offset as usize + write.data.len());
        let (start, end) = bytes(&write);
        self.0.retain(|old| bytes(old).0 < start || bytes(old).1 > end);
        self.0.push(write);
    }

    pub(super) fn forget(&mut self) {
        self.0.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn writes(&self) -> &[ConfigWrite] {
        &self.0
    }
}

impl Negotiated {
    pub(super) fn limit(&self) -> Limit {
        Limit::new(self.peer.patience.deadline)
    }

    /// Gives the daemon everything it needs, in the specification's order; what the driver wrote to config space goes after
    /// the features, without which it may be refused, and before the first request. What the daemon has got of it so far is
    /// in `active` also when this fails. `queues` is what the first daemon has: its record of requests in flight must do
    /// for every successor.
    pub(super) fn start(
        &mut self,
        memory: &MemoryTable,
        active: &mut Active,
        written: &mut Written,
        queues: u16,
    ) -> Result<(), SessionError> {
        let limit = self.limit();
        let resumes = active.begun;
        let protocol_features = if self.rings_start_disabled { virtio::PROTOCOL_FEATURES } else { 0 };
        let features = active.start.features | protocol_features;
        self.wire.tell(FrontendRequest::SetFeatures, &features, &[], limit)?;
        self.give_written(written, limit)?;
        let files: Vec<_> = memory.regions().iter().map(|region| region.file.as_fd()).collect();
        self.wire.tell(FrontendRequest::SetMemTable, &memory.payload(), &files, limit)?;
        self.share_inflight(active, queues, limit)?;
        active.begun = true;
        for ring in &active.start.rings {
            // What was in flight at the end of the last daemon comes out of the record, not out of the ring.
            let base = match resumes {
                false => 0,
                true => ring.indices(memory).map_or(0, |indices| indices.used),
            };
            self.start_ring(ring, base, limit)?;
        }
        // A kick that the daemon takes from a ring which is not enabled yet is lost: unless it has acknowledged the last
        // request, an answer to another one says that it has got so far.
        if !self.wire.has(protocol::REPLY_ACK) {
            self.wire.ask::<u64>(FrontendRequest::GetFeatures, &(), limit)?;
        }
        // What the driver added before the daemon had the ring, or before the kick was its ioeventfd.
        for ring in &active.start.rings {
            ring.kick.signal();
        }
        Ok(())
    }

    /// What the daemon refuses although it knows the features is forgotten.
    fn give_written(&mut self, written: &mut Written, limit: Limit) -> Result<(), SessionError> {
        let mut next = 0;
        while let Some(write) = written.0.get(next) {
            if self.write_config(write, limit)? {
                next += 1;
            } else {
                written.0.remove(next);
            }
        }
        Ok(())
    }

    /// A region that is there goes to the successor; a fresh start gets a fresh one.
    fn share_inflight(&mut self, active: &mut Active, queues: u16, limit: Limit) -> Result<(), SessionError> {
        if !active.begun {
            let queue_size = active.start.rings.iter().map(|ring| ring.size).max().unwrap_or(0);
            active.inflight = Inflight::obtain(&mut self.wire, queues, queue_size, limit)?;
        }
        match &active.inflight {
            Some(inflight) => inflight.give(&mut self.wire, limit),
            None => Ok(()),
        }
    }

    fn start_ring(&mut self, ring: &Ring, base: u16, limit: Limit) -> Result<(), SessionError> {
        let index = u32::from(ring.index);
        let state = |num| VringState { index, num };
        let addresses = VringAddr {
            index,
            flags: 0,
            descriptor: ring.addresses.descriptor,
            used: ring.addresses.used,
            available: ring.addresses.available,
            log: 0,
        };
        self.wire.tell(FrontendRequest::SetVringNum, &state(u32::from(ring.size)), &[], limit)?;
        self.wire.tell(FrontendRequest::SetVringBase, &state(u32::from(base)), &[], limit)?;
        self.wire.tell(FrontendRequest::SetVringAddr, &addresses, &[], limit)?;
        // The kick comes last: a daemon may start the ring with it.
        self.give_call(ring, limit)?;
        let kick = VringFd { index: ring.index, no_fd: false };
        self.wire.tell(FrontendRequest::SetVringKick, &kick, &[ring.kick.as_fd()], limit)?;
        if self.rings_start_disabled {
            self.wire.tell(FrontendRequest::SetVringEnable, &state(1), &[], limit)?;
        }
        Ok(())
    }

    pub(super) fn give_call(&mut self, ring: &Ring, limit: Limit) -> Result<(), SessionError> {
        let call = VringFd { index: ring.index, no_fd: ring.call.is_none() };
        let fds: Vec<_> = ring.call.iter().map(|event| event.as_fd()).collect();
        self.wire.tell(FrontendRequest::SetVringCall, &call, &fds, limit)
    }

    /// A ring stops at GET_VRING_BASE, whose answer says that nothing of it is in flight any more.
    pub(super) fn stop(&mut self, rings: &[Ring], limit: Limit) -> Result<(), SessionError> {
        for ring in rings {
            let state = VringState { index: u32::from(ring.index), num: 0 };
            let base: VringState = self.wire.ask(FrontendRequest::GetVringBase, &state, limit)?;
            tracing::trace!("device {}: queue {} stopped at {}", self.peer.device, ring.index, base.num);
            if self.rings_start_disabled {
                self.wire.tell(FrontendRequest::SetVringEnable, &state, &[], limit)?;
            }
        }
        Ok(())
    }

    pub(super) fn reset(&mut self, limit: Limit) -> Result<(), SessionError> {
        if !self.wire.has(protocol::RESET_DEVICE) {
            return Ok(());
        }
        self.wire.tell(FrontendRequest::ResetDevice, &(), &[], limit)
    }

    /// Any request with an answer will do, as long as every daemon answers it at any time.
    pub(super) fn are_you_there(&mut self) -> Result<(), SessionError> {
        let limit = self.limit();
        match self.wire.ask::<u64>(FrontendRequest::GetFeatures, &(), limit) {
            Ok(_) => Ok(()),
            Err(SessionError::Timeout { limit, .. }) => Err(SessionError::Hangs(limit)),
            Err(SessionError::Closed { .. }) => Err(SessionError::HungUp),
            Err(error) => Err(error),
        }
    }

    /// Passes a driver's write on; false if the daemon refuses it.
    pub(super) fn write_config(&mut self, write: &ConfigWrite, limit: Limit) -> Result<bool, SessionError> {
        if !self.wire.has(protocol::CONFIG) {
            return Ok(false);
        }
        let offset = write.offset;
        let payload = Config { offset, flags: 0, data: write.data.clone() };
        match self.wire.tell(FrontendRequest::SetConfig, &payload, &[], limit) {
            Err(SessionError::Refused { code, .. }) => {
                tracing::debug!("device {}: config write at {offset} refused ({code})", self.peer.device);
                Ok(false)
            }
            result => result.map(|()| true),
        }
    }

    /// Config space as it is now; `None` if the daemon has none.
    pub(super) fn config(&mut self, limit: Limit) -> Result<Option<Vec<u8>>, SessionError> {
        let len = self.offer.config.len();
        if len == 0 {
            return Ok(None);
        }
        let config = get_config(&mut self.wire, len, limit)?;
        Ok((!config.is_empty()).then_some(config))
    }
}
