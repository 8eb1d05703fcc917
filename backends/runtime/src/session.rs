//! One frontend's session: what it has negotiated, its memory, its rings.
//!
//! ```text
//!   a ring:   Idle --all is set, and it is enabled--> Running --GET_VRING_BASE, disable, memory change--> Idle
//! ```
//!
//! *Running* here means that the device has the vring. Whether the ring is *started* in the specification's sense is
//! [`crate::Vring::is_started`]: the device touches nothing before the first kick. Whatever changes under a running ring takes it
//! from the device (which drains it), changes, and hands it back.
//!
//! What a driver makes available in a ring that is started and disabled waits until the ring is enabled. Of a network
//! device's the specification would have frames to send taken and discarded ("Ring states"); a frontend that enables a ring
//! after its first kick would lose them, where waiting loses nothing.
//!
//! Invariants: a message is checked whole before anything is changed; a refusal changes nothing (but a ring that its device
//! fails to start stays stopped); when the session is dropped the device has no vring.

mod error;
mod rings;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cleave_common::vhost_user::features::{protocol, virtio};
use cleave_common::vhost_user::{
    Channel, Config, Flags, FrontendRequest, Inflight, LogBase, MAX_MEM_SLOTS, Malformed, MemoryTable,
    Message, Payload, SingleRegion, VringAddr, VringFd, VringState,
};
use tracing::{debug, info, trace, warn};

use crate::backend_channel::BackendChannel;
use crate::device::Device;
use crate::dirty_log::DirtyLog;
use crate::memory::{GuestMemory, MemoryError};
use crate::shared::cannot_shrink;
use crate::vring::{InflightArea, Kept, Notifier};
pub(crate) use error::{Refusal, SessionError};
use rings::RingSlot;

/// Longest config space a frontend may ask about, in bytes.
const MAX_CONFIG: usize = 4096;

/// A frontend that does not take its answer by then is gone.
const REPLY_DEADLINE: Duration = Duration::from_secs(5);

/// Ring features the runtime implements for every device.
const RING_FEATURES: u64 = virtio::VERSION_1 | virtio::RING_INDIRECT_DESC | virtio::RING_EVENT_IDX;

/// Features of vhost, of which no guest knows. LOG_ALL comes and goes while rings run.
const VHOST_FEATURES: u64 = virtio::PROTOCOL_FEATURES | virtio::LOG_ALL;

const PROTOCOL_FEATURES: u64 = protocol::MQ
    | protocol::LOG_SHMFD
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

/// What goes back when a request is done.
enum Answer {
    /// Nothing but the acknowledgement, if asked for.
    Done,
    Payload(Vec<u8>),
    /// With a descriptor.
    File(Vec<u8>, OwnedFd),
}

impl Answer {
    fn of(payload: &impl Payload) -> Self {
        Self::Payload(payload.encode())
    }
}

/// Everything one connection has set up. Dropping it stops all rings; what the device itself knows, it keeps.
pub(crate) struct Session<'d> {
    device: &'d mut dyn Device,
    acked_features: u64,
    protocol_features: u64,
    memory: Arc<GuestMemory>,
    rings: Vec<RingSlot>,
    /// Where the frontend keeps the requests in flight.
    inflight: Option<InflightArea>,
    backend_channel: BackendChannel,
    /// Where it wants to read what is written to guest memory, and by what it wants to be told of new bits.
    log: Option<Arc<DirtyLog>>,
    log_call: Notifier,
}

impl<'d> Session<'d> {
    pub(crate) fn new(device: &'d mut dyn Device) -> Self {
        let rings = (0..device.num_queues()).map(|_| RingSlot::default()).collect();
        Self {
            device,
            acked_features: 0,
            protocol_features: 0,
            memory: Arc::default(),
            rings,
            inflight: None,
            backend_channel: BackendChannel::default(),
            log: None,
            log_call: Notifier::default(),
        }
    }

    /// Does what `message` asks and answers it.
    ///
    /// # Errors
    /// The session cannot go on: the request could not be done and the frontend has no other way to learn of it.
    pub(crate) fn handle(&mut self, channel: &mut Channel, mut message: Message) -> Result<(), SessionError> {
        let request = FrontendRequest::try_from(message.request)?;
        let wants_ack = message.flags.needs_reply() && self.protocol_features & protocol::REPLY_ACK != 0;
        trace!("{request}, {} bytes, {} descriptors", message.body.len(), message.fds.len());
        let deadline = Some(Instant::now() + REPLY_DEADLINE);
        match self.dispatch(request, &mut message) {
            Ok(Answer::Payload(body)) => {
                channel.send(request, Flags::REPLY, &body, &[], deadline)?;
            }
            Ok(Answer::File(body, fd)) => {
                channel.send(request, Flags::REPLY, &body, &[fd.as_fd()], deadline)?;
            }
            Ok(Answer::Done) if wants_ack => channel.reply(request, &0u64, &[], deadline)?,
            Ok(Answer::Done) => {}
            Err(source) if wants_ack && !has_own_reply(request) => {
                warn!("refused {request}: {source}");
                channel.reply(request, &1u64, &[], deadline)?;
            }
            Err(source) => return Err(SessionError::Refused { request, source }),
        }
        Ok(())
    }

    /// SIGHUP: the device looks at what it serves, and the frontend learns of what has changed.
    pub(crate) fn reload(&mut self) {
        if reload(self.device) {
            self.config_changed();
        }
    }

    /// Readable when the device may have changed by itself.
    pub(crate) fn change_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.change_fd()
    }

    /// The device may have changed by itself.
    pub(crate) fn take_change(&mut self) {
        if self.device.take_change() {
            self.config_changed();
        }
    }

    fn config_changed(&mut self) {
        if self.protocol_features & protocol::CONFIG != 0 {
            self.backend_channel.config_changed();
        }
    }

    /// SIGUSR1.
    pub(crate) fn report(&self) -> String {
        let running = self.rings.iter().filter(|ring| ring.is_running()).count();
        format!(
            "a frontend is connected, {running} of {} queues run; {}",
            self.rings.len(),
            self.device.report()
        )
    }

    fn dispatch(&mut self, request: FrontendRequest, message: &mut Message) -> Result<Answer, Refusal> {
        use FrontendRequest as R;
        match request {
            R::GetFeatures => Ok(Answer::of(&self.features())),
            R::SetFeatures => self.set_features(message.payload()?),
            R::GetProtocolFeatures => Ok(Answer::of(&PROTOCOL_FEATURES)),
            R::SetProtocolFeatures => self.set_protocol_features(message.payload()?),
            // RESET_OWNER is deprecated, and the specification recommends to ignore it.
            R::SetOwner | R::ResetOwner => Ok(Answer::Done),
            R::GetQueueNum => Ok(Answer::of(&u64::from(self.device.num_queues()))),
            R::GetMaxMemSlots => Ok(Answer::of(&(MAX_MEM_SLOTS as u64))),
            R::SetMemTable => {
                let table: MemoryTable = message.payload()?;
                self.check_files(message)?;
                let memory = GuestMemory::from_table(&table.regions, std::mem::take(&mut message.fds))?;
                Ok(self.set_memory(memory))
            }
            R::AddMemReg => {
                let SingleRegion(region) = message.payload()?;
                self.check_files(message)?;
                let memory = self.memory.with_region(region, message.single_fd()?)?;
                Ok(self.set_memory(memory))
            }
            // Some frontends send the region's descriptor here too; it is closed with the message.
            R::RemMemReg => {
                let SingleRegion(region) = message.payload()?;
                let memory = self.memory.without_region(region)?;
                Ok(self.set_memory(memory))
            }
            R::SetVringNum => self.set_vring_num(message.payload()?),
            R::SetVringAddr => self.set_vring_addr(message.payload::<VringAddr>()?),
            R::SetVringBase => self.set_vring_base(message.payload()?),
            R::GetVringBase => self.get_vring_base(message.payload::<VringState>()?),
            R::SetVringKick => {
                let which: VringFd = message.payload()?;
                self.set_vring_kick(which, vring_fd(which, message)?)
            }
            R::SetVringCall => {
                let which: VringFd = message.payload()?;
                self.set_vring_call(which, vring_fd(which, message)?)
            }
            R::SetVringErr => {
                let which: VringFd = message.payload()?;
                self.set_vring_err(which, vring_fd(which, message)?)
            }
            R::SetVringEnable => self.set_vring_enable(message.payload()?),
            R::GetConfig => self.get_config(message.payload()?),
            R::SetConfig => self.set_config(message.payload()?),
            R::ResetDevice => self.reset_device(),
            R::GetInflightFd => {
                let (num_queues, kept) = (self.device.num_queues(), self.device.kept_len());
                let (made, fd) = InflightArea::create(message.payload()?, num_queues, kept)?;
                Ok(Answer::File(made.encode(), fd))
            }
            R::SetLogBase => self.set_log_base(message.payload()?, message.single_fd()?),
            R::SetLogFd => {
                self.log_call.set(Some(message.single_fd()?));
                Ok(Answer::Done)
            }
            R::SetBackendReqFd => {
                let channel = BackendChannel::over(message.single_fd()?).ok_or(Refusal::NoSocket)?;
                self.backend_channel = channel;
                Ok(Answer::Done)
            }
            R::SetInflightFd => self.set_inflight(message.payload()?, message.single_fd()?),
            _ => Err(Refusal::NotOffered),
        }
    }

    fn features(&self) -> u64 {
        self.device.features() | RING_FEATURES | VHOST_FEATURES
    }

    fn set_features(&mut self, features: u64) -> Result<Answer, Refusal> {
        let unknown = features & !self.features();
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        debug!("acked features {features:#x}");
        // Rings that run are those of the driver that has set these features: it is the log that comes or goes.
        let same_driver =
            self.all_stopped().is_err() && (features ^ self.acked_features) & !VHOST_FEATURES == 0;
        self.pause_rings();
        self.acked_features = features;
        if !same_driver {
            // VERSION_1 is of the ring's layout and of the requests' too.
            let of_runtime = RING_FEATURES & !virtio::VERSION_1 | VHOST_FEATURES;
            self.device.ack_features(features & !of_runtime);
        }
        if features & virtio::PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(RingSlot::enable);
        }
        self.resume_rings();
        Ok(Answer::Done)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<Answer, Refusal> {
        let unknown = features & !PROTOCOL_FEATURES;
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        debug!("protocol features {features:#x}");
        self.protocol_features = features;
        Ok(Answer::Done)
    }

    /// Refuses guest memory of a kind that the device cannot have.
    fn check_files(&self, message: &Message) -> Result<(), Refusal> {
        let can_be = |fd| !self.device.needs_sealed_memory() || cannot_shrink(fd);
        if message.fds.iter().all(can_be) { Ok(()) } else { Err(MemoryError::NotSealed.into()) }
    }

    /// Swaps guest memory under the rings. One that is not in the new memory waits for its new addresses.
    fn set_memory(&mut self, memory: GuestMemory) -> Answer {
        self.pause_rings();
        self.memory = Arc::new(memory);
        self.resume_rings();
        Answer::Done
    }

    fn get_config(&self, wanted: Config) -> Result<Answer, Refusal> {
        let config = self.device.config();
        let (start, end) = config_range(&wanted, MAX_CONFIG)?;
        let data = (start..end).map(|at| config.get(at).copied().unwrap_or(0)).collect();
        Ok(Answer::of(&Config { data, ..wanted }))
    }

    fn set_config(&mut self, write: Config) -> Result<Answer, Refusal> {
        let (start, _) = config_range(&write, self.device.config().len())?;
        self.device.write_config(start, &write.data).map_err(Refusal::Device)?;
        Ok(Answer::Done)
    }

    /// A ring that runs has its heads in the old area.
    fn set_inflight(&mut self, given: Inflight, fd: OwnedFd) -> Result<Answer, Refusal> {
        self.all_stopped()?;
        let kept = Kept::find(given, &fd, self.device.kept_len());
        self.inflight = Some(InflightArea::map(given, fd, self.device.num_queues())?);
        if let Some(Err(error)) = kept.map(|kept| self.device.set_kept(kept)) {
            warn!("what the last one to serve these queues left is not used: {error}");
        }
        self.rings.iter_mut().for_each(RingSlot::forget_position);
        debug!("requests in flight are kept for {} queues", given.num_queues);
        Ok(Answer::Done)
    }

    /// The answer is a number that says nothing: frontends wait for one without REPLY_ACK too.
    fn set_log_base(&mut self, base: LogBase, fd: OwnedFd) -> Result<Answer, Refusal> {
        let log = DirtyLog::map(base, fd)?;
        self.pause_rings();
        self.log = Some(Arc::new(log));
        self.resume_rings();
        Ok(Answer::of(&0u64))
    }

    /// The log as long as the frontend wants it.
    fn active_log(&self) -> Option<Arc<DirtyLog>> {
        self.log.clone().filter(|_| self.acked_features & virtio::LOG_ALL != 0)
    }

    fn reset_device(&mut self) -> Result<Answer, Refusal> {
        self.pause_rings();
        self.rings.iter_mut().for_each(|ring| *ring = RingSlot::default());
        self.inflight = None;
        self.acked_features = 0;
        self.device.reset();
        Ok(Answer::Done)
    }
}

/// Has the device look at what it serves again. `true`: its config space has changed.
pub(crate) fn reload(device: &mut dyn Device) -> bool {
    match device.reload() {
        Ok(changed) => {
            info!("reloaded: {}", if changed { "config space has changed" } else { "nothing has changed" });
            changed
        }
        Err(error) => {
            warn!("nothing is reloaded: {error}");
            false
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.leave_rings();
    }
}

/// Requests whose answer is a payload of their own: a refusal cannot be told from it.
fn has_own_reply(request: FrontendRequest) -> bool {
    use FrontendRequest as R;
    matches!(
        request,
        R::GetFeatures
            | R::GetProtocolFeatures
            | R::GetQueueNum
            | R::GetMaxMemSlots
            | R::GetVringBase
            | R::GetConfig
            | R::GetInflightFd
            | R::GetStatus
            | R::SetLogBase
    )
}

fn vring_fd(which: VringFd, message: &mut Message) -> Result<Option<OwnedFd>, Malformed> {
    if which.no_fd { Ok(None) } else { message.single_fd().map(Some) }
}

fn config_range(access: &Config, len: usize) -> Result<(usize, usize), Refusal> {
    let offset = u64::from(access.offset);
    let end = offset + access.data.len() as u64;
    if end > len as u64 {
        return Err(Refusal::ConfigRange { offset, end });
    }
    Ok((offset as usize, end as usize))
}

#[cfg(test)]
mod tests;
