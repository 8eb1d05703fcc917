//! One virtio-pci function: the registers, MSI-X and doorbells on this side, a vhost-user session on the other.
//!
//! ```text
//!   vCPU ──BAR access──> Registers ──Effect──> Mailbox ──> session thread ──> daemon
//!                            ^                                   │
//!                            └────────── Observer ───────────────┘
//! ```
//!
//! Invariants: a vCPU only changes registers and leaves notes, it never waits; a queue's doorbell and its vector's
//! event are the daemon's kick and call, so the data path does not come here; a device whose daemon is lost answers
//! from what is cached, its resets complete, and what its driver starts runs once a daemon is back.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use cleave_common::exit::one_line;
use cleave_common::virtio::DeviceType;

use super::layout::{self, BAR, BAR_LEN, Capabilities, NOTIFY_STRIDE, Place};
use super::registers::{Effect, Registers};
use crate::bus::Event;
use crate::pci::msix::{self, MsiX};
use crate::pci::{ConfigSpace, Doorbells, Interrupts, PciDevice, ResetToken};
use crate::vhost::{
    CannotResume, Mailbox, MemoryTable, Negotiated, Observer, Ring, RingError, SessionError, SessionThread,
    Start, Successor,
};

/// ISR status bit (virtio 1.2, 4.1.4.5): config space changed. Queue interrupts do not come this way.
const ISR_CONFIG: u8 = 1 << 1;

/// What the machine should know of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The daemon has the driver's queues.
    Running,
    /// The daemon of this [`Successor::serial`] is gone, hangs or makes no sense; the guest goes on without it until there
    /// is another.
    Lost { serial: u32, reason: String },
    /// A daemon is back `after` this long; it does so many requests again.
    Reconnected { after: Duration, replayed: u64 },
    /// There is no other daemon yet, or one that will not do; `absent` is the former.
    AttemptFailed { serial: u32, reason: String, absent: bool },
    /// What the lost daemon had cannot be done again safely: the device waits for a reset by its driver.
    NeedsReset { reason: String },
    /// That reset is complete, whether or not a driver starts the device again.
    Reset,
    /// The guest's driver asked for what cannot be; the device waits for a reset. Said once until the device runs or
    /// the machine is reset, however often the driver tries.
    Refused { reason: String },
}

/// Called on the session's or a vCPU's thread: it must not wait.
pub type EventSink = Arc<dyn Fn(DeviceEvent) + Send + Sync>;

/// What a device is made of.
pub struct Parts {
    /// For messages: "disk0".
    pub name: String,
    pub device_type: DeviceType,
    /// Most descriptors of a queue, a power of two up to 32768 (virtio 1.2, 2.7).
    pub queue_size: u16,
    pub memory: Arc<MemoryTable>,
    pub interrupts: Arc<dyn Interrupts>,
    pub doorbells: Arc<dyn Doorbells>,
    pub events: EventSink,
}

struct State {
    registers: Registers,
    /// Config space as the driver sees it.
    config: Vec<u8>,
    /// The driver wrote to it since the last reset.
    config_written: bool,
    isr: u8,
    /// Where the BAR is, and how many doorbells ring there.
    doorbells: Option<(u64, usize)>,
    /// Machine resets that wait for the session to stop.
    resets: Vec<ResetToken>,
    /// A refusal has been said, and nothing has run since.
    refusal_said: bool,
    /// [`DeviceEvent::NeedsReset`] was said, and no reset since.
    failure_said: bool,
}

/// A virtio device behind a vhost-user session.
pub struct Device {
    name: String,
    memory: Arc<MemoryTable>,
    doorbells: Arc<dyn Doorbells>,
    events: EventSink,
    initial: ConfigSpace,
    capabilities: Capabilities,
    vectors: u16,
    msix: MsiX,
    kicks: Vec<Arc<Event>>,
    mailbox: Arc<Mailbox>,
    session: OnceLock<SessionThread>,
    state: Mutex<State>,
}

impl Device {
    /// Makes the device and starts its session's thread.
    ///
    /// # Errors
    /// When file descriptors, GSIs or threads run out.
    ///
    /// # Panics
    /// If the queue size is none: the plan has checked it.
    pub fn new(parts: Parts, session: Negotiated) -> io::Result<Arc<Self>> {
        let Parts { name, device_type, queue_size, memory, interrupts, doorbells, events } = parts;
        assert!(queue_size.is_power_of_two());
        let offer = session.offer().clone();
        let queues = offer.num_queues;
        let (initial, capabilities) = layout::config_space(device_type, queues, offer.config.len());
        let vectors = queues + 1;
        let device = Arc::new(Self {
            name,
            memory: Arc::clone(&memory),
            doorbells,
            events,
            initial,
            capabilities,
            vectors,
            msix: MsiX::new(vectors, interrupts)?,
            kicks: (0..queues).map(|_| Event::new().map(Arc::new)).collect::<io::Result<_>>()?,
            mailbox: Mailbox::new()?,
            session: OnceLock::new(),
            state: Mutex::new(State {
                registers: Registers::new(offer.features, queues, queue_size),
                config: offer.config,
                config_written: false,
                isr: 0,
                doorbells: None,
                resets: Vec::new(),
                refusal_said: false,
                failure_said: false,
            }),
        });
        let observer: Weak<dyn Observer> = Arc::downgrade(&(Arc::clone(&device) as Arc<dyn Observer>));
        let _ = device.session.set(session.spawn(Arc::clone(&device.mailbox), memory, observer)?);
        Ok(device)
    }

    /// Brings a daemon that was started in place of the one that ended.
    pub fn reconnect(&self, successor: Successor) {
        self.mailbox.reconnect(successor);
    }

    fn act(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Start => match self.rings(&state.registers) {
                Ok(rings) => self.mailbox.start(Start { features: state.registers.features(), rings }),
                Err(error) => {
                    state.registers.refuse();
                    self.config_interrupt(state);
                    if !std::mem::replace(&mut state.refusal_said, true) {
                        (self.events)(DeviceEvent::Refused { reason: error.to_string() });
                    }
                }
            },
            Effect::Cleared => {
                if std::mem::take(&mut state.config_written) {
                    self.mailbox.refresh();
                }
            }
            Effect::Stop => {
                state.config_written = false;
                self.mailbox.stop();
            }
            Effect::Vector(queue) => {
                let call = self.msix.event(state.registers.queue_vector(queue));
                self.mailbox.set_call(queue as u8, call);
            }
        }
    }

    fn rings(&self, registers: &Registers) -> Result<Vec<Ring>, RingError> {
        let ring = |(index, queue): (u16, &super::registers::Queue)| {
            let kick = Arc::clone(&self.kicks[usize::from(index)]);
            let call = self.msix.event(queue.vector);
            Ring::new(&self.memory, index as u8, queue.size, queue.addresses, kick, call)
        };
        registers.enabled_queues().map(ring).collect()
    }

    /// Before DRIVER_OK a driver wants none (virtio 1.2, 3.1.1), nor while it resets the device.
    fn config_interrupt(&self, state: &mut State) {
        if !state.registers.driver_ok() || state.registers.is_stopping() {
            return;
        }
        state.isr |= ISR_CONFIG;
        if let Some(event) = self.msix.event(state.registers.config_vector()) {
            event.signal();
        }
    }

    fn write_config(&self, state: &mut State, offset: u64, data: &[u8]) {
        let Ok(start) = usize::try_from(offset) else { return };
        let Some(bytes) = start.checked_add(data.len()).and_then(|end| state.config.get_mut(start..end))
        else {
            return;
        };
        bytes.copy_from_slice(data);
        state.config_written = true;
        if !self.mailbox.write_config(start as u32, data) {
            tracing::debug!("device {}: too many config writes at once, one is lost", self.name);
        }
    }

    /// Runs an access through the window capability against the BAR.
    fn through_window(&self, config: &mut ConfigSpace, write: bool) {
        let at = self.capabilities.window;
        let bar = config.dword(at + Capabilities::WINDOW_BAR) as u8;
        let offset = u64::from(config.dword(at + Capabilities::WINDOW_OFFSET));
        let len = config.dword(at + Capabilities::WINDOW_LEN) as usize;
        if bar != BAR || !matches!(len, 1 | 2 | 4) || offset > BAR_LEN - len as u64 {
            return;
        }
        let mut data = [0; 4];
        if write {
            config.read(at + Capabilities::WINDOW_DATA, &mut data);
            self.write_bar(BAR, offset, &data[..len]);
        } else {
            self.read_bar(BAR, offset, &mut data[..len]);
            config.set(at + Capabilities::WINDOW_DATA, &data);
        }
    }

    fn touches_window(&self, offset: usize, len: usize) -> bool {
        overlaps(offset, len, self.capabilities.window + Capabilities::WINDOW_DATA, 4)
    }

    /// Takes the doorbells from where they were and puts them where the BAR is.
    fn hang_doorbells(&self, state: &mut State, bar: Option<u64>) {
        if let Some((old, count)) = state.doorbells.take() {
            for (queue, kick) in self.kicks.iter().enumerate().take(count) {
                if let Err(error) = self.doorbells.silence(old + layout::doorbell(queue), kick) {
                    tracing::warn!("device {}: doorbell of queue {queue}: {error}", self.name);
                }
            }
        }
        let Some(base) = bar else { return };
        let rings = |(queue, kick): (usize, &Arc<Event>)| {
            self.doorbells.ring_at(base + layout::doorbell(queue), kick).map_err(|error| {
                tracing::warn!("device {}: queue {queue} is kicked the slow way: {error}", self.name);
            })
        };
        let count = self.kicks.iter().enumerate().map(rings).take_while(Result::is_ok).count();
        state.doorbells = Some((base, count));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn overlaps(a: usize, a_len: usize, b: usize, b_len: usize) -> bool {
    a < b + b_len && b < a.saturating_add(a_len)
}

impl PciDevice for Device {
    fn config_space(&self) -> ConfigSpace {
        self.initial.clone()
    }

    fn before_config_read(&self, config: &mut ConfigSpace, offset: usize, len: usize) {
        if self.touches_window(offset, len) {
            self.through_window(config, false);
        }
    }

    fn after_config_write(&self, config: &mut ConfigSpace, offset: usize, len: usize) {
        let control = self.capabilities.msix + msix::CONTROL_OFFSET;
        if overlaps(offset, len, control, 2) {
            self.msix.set_control(config.word(control));
        }
        if self.touches_window(offset, len) {
            self.through_window(config, true);
        }
    }

    fn read_bar(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match Place::of(offset) {
            Place::Common(offset) => self.lock().registers.read(offset, data),
            // Reading takes what it says (virtio 1.2, 4.1.4.5.1).
            Place::Isr => data[0] = std::mem::take(&mut self.lock().isr),
            Place::Device(offset) => {
                let state = self.lock();
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(state.config.len());
                data.iter_mut().zip(&state.config[start..]).for_each(|(to, from)| *to = *from);
            }
            Place::Notify(_) => {}
            Place::Table(offset) => self.msix.read_table(offset, data),
            Place::Pending(offset) => self.msix.read_pending(offset, data),
        }
    }

    fn write_bar(&self, _bar: u8, offset: u64, data: &[u8]) {
        match Place::of(offset) {
            Place::Common(offset) => {
                let mut state = self.lock();
                let effect = state.registers.write(offset, data, self.vectors);
                self.act(&mut state, effect);
            }
            Place::Device(offset) => self.write_config(&mut self.lock(), offset, data),
            // Only while no ioeventfd is there to take it.
            Place::Notify(offset) => {
                let queue = usize::try_from(offset / NOTIFY_STRIDE).unwrap_or(usize::MAX);
                if let Some(kick) = self.kicks.get(queue) {
                    kick.signal();
                }
            }
            Place::Table(offset) => self.msix.write_table(offset, data),
            Place::Isr | Place::Pending(_) => {}
        }
    }

    fn bar_moved(&self, _bar: u8, address: Option<u64>) {
        self.hang_doorbells(&mut self.lock(), address);
    }

    fn reset(&self, token: ResetToken) {
        self.msix.reset();
        let mut state = self.lock();
        state.isr = 0;
        state.refusal_said = false;
        let effect = state.registers.reset();
        self.act(&mut state, effect);
        if state.registers.is_stopping() {
            state.resets.push(token);
        }
    }
}

impl Observer for Device {
    fn started(&self) {
        self.lock().refusal_said = false;
        (self.events)(DeviceEvent::Running);
    }

    fn stopped(&self) {
        let mut state = self.lock();
        state.registers.stopped();
        let complete = std::mem::take(&mut state.resets);
        if !complete.is_empty() {
            self.msix.forget_pending();
        }
        let mended = std::mem::take(&mut state.failure_said);
        drop(state);
        drop(complete);
        if mended {
            (self.events)(DeviceEvent::Reset);
        }
    }

    /// The driver knows how long config space is; one of another length is cut or filled up with zeroes.
    fn config(&self, config: &[u8]) {
        let mut state = self.lock();
        if self.mailbox.has_config_writes() {
            // It is older than what the driver has written since, and is read again once that is passed on.
            return;
        }
        let mut config = config.to_vec();
        config.resize(state.config.len(), 0);
        if state.config != config {
            state.config = config;
            state.registers.config_changed();
            self.config_interrupt(&mut state);
        }
    }

    fn lost(&self, serial: u32, reason: &SessionError) {
        (self.events)(DeviceEvent::Lost { serial, reason: one_line(reason) });
    }

    fn reconnected(&self, after: Duration, replayed: u64) {
        (self.events)(DeviceEvent::Reconnected { after, replayed });
    }

    fn attempt_failed(&self, serial: u32, reason: &SessionError) {
        let absent = reason.is_absence();
        (self.events)(DeviceEvent::AttemptFailed { serial, reason: one_line(reason), absent });
    }

    fn needs_reset(&self, reason: CannotResume) {
        let mut state = self.lock();
        if state.registers.fail() {
            state.failure_said = true;
            self.config_interrupt(&mut state);
            drop(state);
            (self.events)(DeviceEvent::NeedsReset { reason: reason.to_string() });
        }
    }
}

#[cfg(test)]
mod tests;
