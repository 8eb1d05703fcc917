//! The vring requests, and when a ring runs.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cleave_common::vhost_user::{Malformed, VringAddr, VringFd, VringState};
use rustix::event::epoll;
use tracing::{debug, warn};
use vm_memory::GuestAddress;

use super::{Answer, Refusal, Session};
use crate::device::Stop;
use crate::dirty_log::DirtyLog;
use crate::vring::{Found, InflightQueue, Notifier, QueueIndex, RingAddresses, RingLog, SplitRing, Vring};
use cleave_common::vhost_user::features::virtio;

/// VHOST_VRING_F_LOG.
const VRING_F_LOG: u32 = 1;

/// What the frontend has said about one ring.
#[derive(Debug, Default)]
pub(super) struct RingSlot {
    /// Entries; 0 until SET_VRING_NUM.
    size: u16,
    /// User addresses of descriptors, available ring, used ring.
    addresses: Option<[u64; 3]>,
    /// Where the log has the used ring, if its writes are logged.
    log_used: Option<GuestAddress>,
    /// The next entry of the available ring to fetch, while the device does not have the ring.
    next_avail: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Notifier,
    err: Notifier,
    enabled: bool,
    /// It has been kicked since its last SET_VRING_KICK.
    started: bool,
    running: bool,
    /// `next_avail` is where the device left the ring, and not where the frontend wants it to start.
    position_known: bool,
}

impl RingSlot {
    pub(super) fn enable(&mut self) {
        self.enabled = true;
    }

    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// The ring's next start is one as by a new backend.
    pub(super) fn forget_position(&mut self) {
        self.position_known = false;
    }

    /// Whether its parts are where a ring of its size may be, as far as that is known yet.
    fn check_addresses(&self, memory: &super::GuestMemory) -> Result<(), Refusal> {
        match self.addresses {
            Some(user) if self.size != 0 && !memory.is_empty() => {
                RingAddresses::translate(memory, user, self.size).map(drop).ok_or(Refusal::VringOutsideMemory)
            }
            _ => Ok(()),
        }
    }

    /// Makes the vring to hand to the device, once all there is to know about it is known.
    fn take_vring(&self, index: QueueIndex, around: Around<'_>) -> Result<Option<Vring>, Refusal> {
        let Around { memory, event_idx, mut inflight, log } = around;
        let (true, Some(user), Some(kick), false) =
            (self.enabled && self.size != 0, self.addresses, &self.kick, memory.is_empty())
        else {
            return Ok(None);
        };
        let addresses =
            RingAddresses::translate(memory, user, self.size).ok_or(Refusal::VringOutsideMemory)?;
        let mut ring = SplitRing::new(memory, addresses, self.size, self.next_avail, event_idx)?;
        let found =
            inflight.as_mut().map(|inflight| inflight.attach(self.size, ring.next_used())).transpose()?;
        let mut resubmit = VecDeque::new();
        // Without a record, a frontend that has its guest go on says where the ring was.
        let continues = self.position_known || self.next_avail != 0 || matches!(found, Some(Found::Used(_)));
        if let Some(Found::Used(heads)) = found {
            if !self.position_known {
                ring.skip(heads.len() as u16);
            }
            resubmit = heads.into();
        }
        Ok(Some(Vring {
            index,
            ring,
            memory: memory.clone(),
            kick: kick.clone(),
            call: self.call.clone(),
            err: self.err.clone(),
            started: self.started,
            continues,
            inflight,
            resubmit,
            log: log.map(|(log, call)| Box::new(RingLog::new(log, self.log_used, call))),
        }))
    }
}

/// What a ring shares with the others of its session.
struct Around<'s> {
    memory: &'s Arc<super::GuestMemory>,
    event_idx: bool,
    inflight: Option<InflightQueue>,
    log: Option<(Arc<DirtyLog>, Notifier)>,
}

impl Session<'_> {
    fn slot(&mut self, index: u32) -> Result<(QueueIndex, &mut RingSlot), Refusal> {
        let num_queues = self.rings.len() as u16;
        let slot = self.rings.get_mut(index as usize).ok_or(Refusal::NoSuchQueue { index, num_queues })?;
        Ok((QueueIndex(index as u16), slot))
    }

    /// The slot of a ring that must not run while this is changed.
    fn stopped_slot(&mut self, index: u32) -> Result<&mut RingSlot, Refusal> {
        let (QueueIndex(which), slot) = self.slot(index)?;
        if slot.running { Err(Refusal::Running(which)) } else { Ok(slot) }
    }

    /// Refuses what may not change while any ring runs.
    pub(super) fn all_stopped(&self) -> Result<(), Refusal> {
        match self.rings.iter().position(|slot| slot.running) {
            Some(index) => Err(Refusal::Running(index as u16)),
            None => Ok(()),
        }
    }

    /// Takes a ring from the device, which completes what it has fetched.
    fn pause(&mut self, index: QueueIndex, stop: Stop) {
        let slot = &mut self.rings[usize::from(index.0)];
        if !std::mem::take(&mut slot.running) {
            return;
        }
        match self.device.stop_queue(index, stop) {
            Some(vring) => {
                slot.next_avail = vring.ring.next_avail();
                slot.started = vring.started;
                slot.position_known = true;
            }
            None => warn!("{index} was lost by its device"),
        }
    }

    /// Gives a ring to the device, if it may run.
    pub(super) fn resume(&mut self, index: QueueIndex) -> Result<(), Refusal> {
        let event_idx = self.acked_features & virtio::RING_EVENT_IDX != 0;
        let log = self.active_log().map(|log| (log, self.log_call.clone()));
        let slot = &mut self.rings[usize::from(index.0)];
        if slot.running {
            return Ok(());
        }
        let inflight = self.inflight.as_ref().and_then(|area| area.queue(index));
        let around = Around { memory: &self.memory, event_idx, inflight, log };
        if let Some(vring) = slot.take_vring(index, around)? {
            let (size, again) = (slot.size, vring.resubmit.len());
            debug!("{index} runs: {size} entries from {}, {again} heads again", vring.ring.next_avail());
            self.device.start_queue(vring).map_err(Refusal::Device)?;
            slot.running = true;
        }
        Ok(())
    }

    pub(super) fn indices(&self) -> impl Iterator<Item = QueueIndex> + use<> {
        (0..self.rings.len() as u16).map(QueueIndex)
    }

    pub(super) fn pause_rings(&mut self) {
        self.indices().for_each(|index| self.pause(index, Stop::Drain));
    }

    /// The session is over.
    pub(super) fn leave_rings(&mut self) {
        self.indices().for_each(|index| self.pause(index, Stop::SessionOver));
    }

    /// After a change to all of them. A ring that may not run as it is now waits for what it lacks.
    pub(super) fn resume_rings(&mut self) {
        for index in self.indices() {
            if let Err(error) = self.resume(index) {
                warn!("{index} waits: {error}");
            }
        }
    }

    pub(super) fn set_vring_num(&mut self, state: VringState) -> Result<Answer, Refusal> {
        let max = self.device.max_queue_size();
        let slot = self.stopped_slot(state.index)?;
        match u16::try_from(state.num) {
            Ok(size) if size.is_power_of_two() && size <= max => slot.size = size,
            _ => return Err(Refusal::QueueSize { num: state.num, max }),
        }
        Ok(Answer::Done)
    }

    /// The rings are found again at each start: memory may have changed under their addresses by then.
    pub(super) fn set_vring_addr(&mut self, addr: VringAddr) -> Result<Answer, Refusal> {
        let memory = self.memory.clone();
        let (index, slot) = self.slot(addr.index)?;
        let user = [addr.descriptor, addr.available, addr.used];
        if !memory.is_empty() && RingAddresses::translate(&memory, user, slot.size.max(1)).is_none() {
            return Err(Refusal::VringOutsideMemory);
        }
        let log_used = (addr.flags & VRING_F_LOG != 0).then_some(GuestAddress(addr.log));
        // Frontends send the same addresses again under a running ring, to switch its log.
        if (slot.addresses, slot.log_used) != (Some(user), log_used) {
            self.pause(index, Stop::Drain);
            let slot = &mut self.rings[usize::from(index.0)];
            (slot.addresses, slot.log_used) = (Some(user), log_used);
            self.resume(index)?;
        }
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_base(&mut self, state: VringState) -> Result<Answer, Refusal> {
        let slot = self.stopped_slot(state.index)?;
        let value = u64::from(state.num);
        slot.next_avail =
            u16::try_from(state.num).map_err(|_| Malformed::Value { what: "vring base", value })?;
        slot.position_known = false;
        Ok(Answer::Done)
    }

    /// Stops the ring: only a new kick descriptor starts it again.
    pub(super) fn get_vring_base(&mut self, state: VringState) -> Result<Answer, Refusal> {
        let (index, _) = self.slot(state.index)?;
        self.pause(index, Stop::Drain);
        let slot = &mut self.rings[usize::from(index.0)];
        slot.kick = None;
        slot.started = false;
        slot.position_known = false;
        debug!("{index} stopped at {}", slot.next_avail);
        Ok(Answer::of(&VringState { index: state.index, num: u32::from(slot.next_avail) }))
    }

    pub(super) fn set_vring_kick(&mut self, which: VringFd, fd: Option<OwnedFd>) -> Result<Answer, Refusal> {
        let memory = self.memory.clone();
        let (index, slot) = self.slot(which.index.into())?;
        let fd = fd.filter(can_be_waited_for).ok_or(Refusal::NoKick(which.index))?;
        if slot.enabled {
            slot.check_addresses(&memory)?;
        }
        self.pause(index, Stop::Drain);
        // A ring that was started stays so: a kick that came on the old descriptor is not lost.
        self.rings[usize::from(index.0)].kick = Some(Arc::new(fd));
        self.resume(index)?;
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_call(&mut self, which: VringFd, fd: Option<OwnedFd>) -> Result<Answer, Refusal> {
        let (_, slot) = self.slot(which.index.into())?;
        slot.call.set(fd);
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_err(&mut self, which: VringFd, fd: Option<OwnedFd>) -> Result<Answer, Refusal> {
        let (_, slot) = self.slot(which.index.into())?;
        slot.err.set(fd);
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_enable(&mut self, state: VringState) -> Result<Answer, Refusal> {
        let memory = self.memory.clone();
        let (index, slot) = self.slot(state.index)?;
        match state.num {
            0 => {
                slot.enabled = false;
                self.pause(index, Stop::Drain);
            }
            1 => {
                if slot.kick.is_some() {
                    slot.check_addresses(&memory)?;
                }
                slot.enabled = true;
                self.resume(index)?;
            }
            other => return Err(Malformed::Value { what: "vring enable", value: other.into() }.into()),
        }
        Ok(Answer::Done)
    }
}

/// Whether input on `fd` is an event. A regular file always has some: who waited for it would never rest. Only epoll knows
/// the difference, and refuses such files.
fn can_be_waited_for(fd: &OwnedFd) -> bool {
    let data = epoll::EventData::new_u64(0);
    epoll::create(epoll::CreateFlags::CLOEXEC)
        .and_then(|set| epoll::add(set, fd, data, epoll::EventFlags::IN))
        .is_ok()
}
