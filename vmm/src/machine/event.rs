//! Everything that can happen to a machine, and the one queue through which its thread hears of it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::bus;
use crate::kvm::vcpu::VcpuEvent;
use crate::legacy::power::PowerRequest;
use crate::vhost::{ConnectError, Negotiated};
use crate::virtio::DeviceEvent;

/// A device's place in the plan's list of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotIndex(pub usize);

/// The closed list of what the machine thread reacts to.
pub enum Event {
    Vcpu {
        index: usize,
        event: VcpuEvent,
    },
    /// A daemon has been reached and understood, or not.
    Connected {
        slot: SlotIndex,
        result: Result<Negotiated, ConnectError>,
    },
    Device {
        slot: SlotIndex,
        event: DeviceEvent,
    },
    /// What the guest asked for at a power or reset port.
    Power(PowerRequest),
    /// Every device is back in the state after power-on.
    DevicesReset,
}

/// The machine thread's end of the queue.
pub struct EventQueue {
    receiver: Receiver<Event>,
    sender: EventSender,
}

/// For everybody else: sends events and wakes the machine thread. Never waits.
#[derive(Clone)]
pub struct EventSender {
    sender: Sender<Event>,
    wake: Arc<bus::Event>,
}

impl EventQueue {
    pub fn new() -> io::Result<Self> {
        let (sender, receiver) = channel();
        let wake = Arc::new(bus::Event::new()?);
        Ok(Self { receiver, sender: EventSender { sender, wake } })
    }

    pub fn sender(&self) -> EventSender {
        self.sender.clone()
    }

    /// Signalled when there is something to do; [`EventQueue::take`] makes it quiet again.
    pub fn wake(&self) -> &Arc<bus::Event> {
        &self.sender.wake
    }

    /// All events up to now.
    pub fn take(&self) -> Vec<Event> {
        // First quiet, then empty: an event that comes between the two wakes us again.
        self.sender.wake.clear();
        self.receiver.try_iter().collect()
    }
}

impl EventSender {
    pub fn send(&self, event: Event) {
        // The queue is gone only when the machine is, and then nobody minds.
        if self.sender.send(event).is_ok() {
            self.wake.signal();
        }
    }
}
