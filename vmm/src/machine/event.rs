//! Everything that can happen to a machine, and the one queue through which its thread hears of it.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::bus;
use crate::control::Asked;
use crate::daemon::{Daemon, DaemonError};
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
        result: Result<Box<Negotiated>, ConnectError>,
    },
    Device {
        slot: SlotIndex,
        event: DeviceEvent,
    },
    /// The daemon that was to be started in place of one that ended, and our end of its socket.
    Spawned {
        slot: SlotIndex,
        result: Result<Box<(Daemon, UnixStream)>, DaemonError>,
    },
    /// What the guest asked for at a power or reset port.
    Power(PowerRequest),
    /// What whoever controls the machine wants of it.
    Asked(Asked),
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
    /// A power request is in the queue. A guest can ask as fast as it can write to a port; it is heard once.
    power: Arc<AtomicBool>,
}

/// Handled before the machine thread looks at its other work again.
const BATCH: usize = 64;

impl EventQueue {
    pub fn new() -> io::Result<Self> {
        let (sender, receiver) = channel();
        let wake = Arc::new(bus::Event::new()?);
        Ok(Self { receiver, sender: EventSender { sender, wake, power: Arc::default() } })
    }

    pub fn sender(&self) -> EventSender {
        self.sender.clone()
    }

    /// Signalled when there is something to do; [`EventQueue::take`] makes it quiet again.
    pub fn wake(&self) -> &Arc<bus::Event> {
        &self.sender.wake
    }

    /// The next events, in order.
    pub fn take(&self) -> Vec<Event> {
        // First quiet, then empty: an event that comes between the two wakes us again.
        self.sender.wake.clear();
        let events: Vec<_> = self.receiver.try_iter().take(BATCH).collect();
        if events.len() == BATCH {
            self.sender.wake.signal();
        }
        if events.iter().any(|event| matches!(event, Event::Power(_))) {
            self.sender.power.store(false, Ordering::Release);
        }
        events
    }
}

impl EventSender {
    pub fn send(&self, event: Event) {
        // The queue is gone only when the machine is, and then nobody minds.
        if self.sender.send(event).is_ok() {
            self.wake.signal();
        }
    }

    /// Sends what the guest asks for, unless the machine has not heard its last request yet.
    pub fn send_power(&self, request: PowerRequest) {
        if !self.power.swap(true, Ordering::AcqRel) {
            self.send(Event::Power(request));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_asks_without_end_is_heard_once() {
        let queue = EventQueue::new().unwrap();
        for _ in 0..1000 {
            queue.sender().send_power(PowerRequest::Reset);
        }
        assert!(matches!(queue.take()[..], [Event::Power(PowerRequest::Reset)]));
        assert!(!queue.wake().is_signalled());
        queue.sender().send_power(PowerRequest::PowerOff);
        assert!(matches!(queue.take()[..], [Event::Power(PowerRequest::PowerOff)]));
    }

    #[test]
    fn what_is_left_wakes_again() {
        let queue = EventQueue::new().unwrap();
        for _ in 0..=BATCH {
            queue.sender().send(Event::DevicesReset);
        }
        assert_eq!(queue.take().len(), BATCH);
        assert!(queue.wake().is_signalled());
        assert_eq!(queue.take().len(), 1);
        assert!(!queue.wake().is_signalled());
    }
}
