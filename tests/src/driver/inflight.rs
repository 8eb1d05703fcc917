//! The region of requests in flight, which the frontend keeps from one backend to the next (vhost-user, "Inflight I/O
//! tracking").

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use cleave_common::vhost_user::{FrontendRequest as Request, Inflight};

use super::{BlockDriver, DriverError, Frontend, GuestRam, Negotiated, Result, SplitQueue, Vring};

/// Bytes before the states of a queue's descriptors, and of each state.
const HEADER_LEN: u64 = 16;
const STATE_LEN: u64 = 16;

/// A region, and what a backend said about it.
pub struct InflightRegion {
    pub description: Inflight,
    pub fd: OwnedFd,
}

impl Frontend {
    /// GET_INFLIGHT_FD: a fresh region.
    pub fn get_inflight(&mut self, num_queues: u16, queue_size: u16) -> Result<InflightRegion> {
        let wanted = Inflight { num_queues, queue_size, ..Inflight::default() };
        let (description, fd) = self.ask_for_file(Request::GetInflightFd, &wanted)?;
        Ok(InflightRegion { description, fd })
    }

    /// SET_INFLIGHT_FD.
    pub fn set_inflight(&mut self, region: &InflightRegion) -> Result<()> {
        self.tell(Request::SetInflightFd, &region.description, &[region.fd.as_fd()])
    }

    /// The handshake with a successor: it gets everything but the kicks.
    pub(super) fn resume(
        &mut self,
        acked: u64,
        ram: &GuestRam,
        vrings: &[Arc<Vring>],
        region: Option<&InflightRegion>,
    ) -> Result<Negotiated> {
        let negotiated = self.negotiate(acked)?;
        self.set_mem_table(ram)?;
        if let Some(region) = region {
            self.set_inflight(region)?;
        }
        for (index, vring) in (0..).zip(vrings) {
            self.start_queue(index, vring, vring.device_used_idx(ram)?)?;
        }
        Ok(negotiated)
    }
}

impl InflightRegion {
    /// Where the header of the queue's part is in the file, if the parts are one after the other in equal distance.
    pub fn queue(&self, queue: u16) -> u64 {
        self.description.mmap_size / u64::from(self.description.num_queues) * u64::from(queue)
    }

    /// Writes bytes of the file: what a hostile frontend, or another backend, may have put there.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        rustix::io::pwrite(&self.fd, bytes, at)
            .map(drop)
            .map_err(|errno| DriverError::io("write to the region")(errno.into()))
    }

    pub fn read(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        rustix::io::pread(&self.fd, &mut bytes, at)
            .map_err(|errno| DriverError::io("read the region")(errno.into()))?;
        Ok(bytes)
    }

    /// Marks `head` of `queue` as a backend does that fetches it.
    pub fn mark(&self, queue: u16, head: u16, counter: u64) -> Result<()> {
        let mut state = [0; STATE_LEN as usize];
        state[0] = 1;
        state[8..].copy_from_slice(&counter.to_le_bytes());
        self.write(self.queue(queue) + HEADER_LEN + STATE_LEN * u64::from(head), &state)
    }

    /// Heads of `queue` that are marked.
    pub fn marked(&self, queue: u16) -> Result<Vec<u16>> {
        let len = usize::from(self.description.queue_size) * STATE_LEN as usize;
        let states = self.read(self.queue(queue) + HEADER_LEN, len)?;
        let heads = states.chunks_exact(STATE_LEN as usize).zip(0u16..);
        Ok(heads.filter(|(state, _)| state[0] != 0).map(|(_, head)| head).collect())
    }
}

/// Has what is in flight on all queues kept in a fresh region from now on. The queues stop for that, and go on.
pub(super) fn track(frontend: &mut Frontend, queues: &[SplitQueue]) -> Result<InflightRegion> {
    let bases =
        (0..queues.len() as u16).map(|index| frontend.stop_queue(index)).collect::<Result<Vec<u16>>>()?;
    let region = frontend.get_inflight(bases.len() as u16, queues[0].size)?;
    frontend.set_inflight(&region)?;
    for (index, (queue, base)) in queues.iter().zip(bases).enumerate() {
        frontend.start_queue(index as u16, queue, base)?;
    }
    Ok(region)
}

impl BlockDriver {
    /// Has the requests of all queues kept in a fresh region from now on. Nothing may be in flight.
    pub fn track_inflight(&mut self) -> Result<InflightRegion> {
        track(&mut self.frontend, &self.queues)
    }

    /// Goes on with a successor of the backend, as frontends do that did not see the last one's end coming: the rings are as
    /// they are, their base is the used index, and each is kicked once.
    pub fn resume(&mut self, socket: &Path, region: Option<&InflightRegion>) -> Result<()> {
        self.frontend = Frontend::connect(socket)?;
        let vrings: Vec<_> = self.queues.iter().map(SplitQueue::vring).collect();
        self.negotiated = self.frontend.resume(self.negotiated.acked, &self.ram, &vrings, region)?;
        self.queues.iter_mut().try_for_each(SplitQueue::kick_now)
    }
}
