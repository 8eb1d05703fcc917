//! The ports as driver and device talk of them (virtio 1.2, 5.3.6.2). Nothing here knows of a queue or a socket.
//!
//! ```text
//!   driver absent --DEVICE_READY 1--> present          (and back by DEVICE_READY 0, or a reset)
//!
//!   a port:  unknown --DEVICE_ADD--> added --PORT_READY 1--> ready    --DEVICE_REMOVE--> unknown
//!            ready: CONSOLE_PORT, PORT_NAME, PORT_OPEN, RESIZE follow, and again whenever what they say changes
//! ```
//!
//! There is no list of messages to send that a driver could make grow: for each port is known what is so, and what the
//! driver has been told of it. [`Ports::next_message`] is the first difference.
//!
//! Invariants: all that a driver says is taken, in any order and number, and changes a few flags; a message that is sent
//! twice, by a successor of a device that was killed, says nothing new.

mod message;

pub(crate) use message::{HEADER_LEN, Message, Size, SizeOrder, Told};

/// What a driver has said and been told of one port, as bits that outlive this process.
mod bit {
    pub(super) const ADDED: u32 = 1 << 0;
    pub(super) const READY: u32 = 1 << 1;
    pub(super) const TOLD_CONSOLE: u32 = 1 << 2;
    pub(super) const TOLD_NAME: u32 = 1 << 3;
    pub(super) const TOLD_OPEN: u32 = 1 << 4;
    pub(super) const TOLD_SIZE: u32 = 1 << 5;
    pub(super) const GUEST_OPEN: u32 = 1 << 6;
    /// The host's end was closed since the driver was told that it is open.
    pub(super) const CLOSED_SINCE: u32 = 1 << 7;
    /// Of a driver.
    pub(super) const PRESENT: u32 = 1 << 0;

    /// What a driver that takes a port anew is to be told again.
    pub(super) const TOLD: u32 = TOLD_CONSOLE | TOLD_NAME | TOLD_OPEN | TOLD_SIZE | CLOSED_SINCE;
}

/// What a port is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nature {
    pub(crate) name: Option<String>,
    pub(crate) is_console: bool,
}

#[derive(Debug)]
struct Port {
    nature: Nature,
    host_open: bool,
    size: Option<Size>,
}

/// All ports of a device.
#[derive(Debug)]
pub(crate) struct Ports {
    ports: Vec<Option<Port>>,
    /// By port; those that are no more have some until the driver has been told.
    bits: Vec<u32>,
    driver: u32,
}

/// Why there is no place for a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoPlace {
    #[error("all {0} ports of this device are taken: --max-ports= says how many there are")]
    Full(usize),
    #[error("there is a port of the name '{0}' already")]
    Name(String),
}

impl Ports {
    /// For up to `max` ports, 1 to 31.
    pub(crate) fn new(max: u32) -> Self {
        let max = max as usize;
        Self { ports: (0..max).map(|_| None).collect(), bits: vec![0; max], driver: 0 }
    }

    pub(crate) fn max(&self) -> u32 {
        self.ports.len() as u32
    }

    /// A place for a port: 0 is a console's, if it is free, and nobody else's while there is another.
    pub(crate) fn add(&mut self, nature: Nature) -> Result<u32, NoPlace> {
        let of_name = |port: &Port| port.nature.name.is_some() && port.nature.name == nature.name;
        if self.ports.iter().flatten().any(of_name) {
            return Err(NoPlace::Name(nature.name.unwrap_or_default()));
        }
        // One whose removal the driver does not know of is not free.
        let is_free = |at: &usize| self.ports[*at].is_none() && self.bits[*at] & bit::ADDED == 0;
        let mut free = (0..self.ports.len()).filter(is_free);
        let at =
            if nature.is_console { free.next() } else { free.max_by_key(|at| (*at != 0, usize::MAX - *at)) };
        let at = at.ok_or(NoPlace::Full(self.ports.len()))?;
        self.ports[at] = Some(Port { nature, host_open: false, size: None });
        Ok(at as u32)
    }

    /// The driver is told when it reads the next messages.
    pub(crate) fn remove(&mut self, id: u32) {
        self.ports[id as usize] = None;
    }

    /// There may be another driver, which knows of nothing.
    pub(crate) fn reset(&mut self) {
        self.driver = 0;
        self.bits.fill(0);
    }

    pub(crate) fn nature(&self, id: u32) -> Option<&Nature> {
        self.ports.get(id as usize)?.as_ref().map(|port| &port.nature)
    }

    pub(crate) fn size(&self, id: u32) -> Option<Size> {
        self.ports.get(id as usize)?.as_ref()?.size
    }

    /// Whether somebody in the guest has the port open: what is sent to one that is not is lost.
    pub(crate) fn is_guest_open(&self, id: u32) -> bool {
        self.bits[id as usize] & bit::GUEST_OPEN != 0
    }

    /// What the driver was told last, unless it is to hear that this is over.
    pub(crate) fn is_told_open(&self, id: u32) -> bool {
        self.bits[id as usize] & bit::TOLD_OPEN != 0
    }

    pub(crate) fn set_host_open(&mut self, id: u32, open: bool) {
        let Some(Some(port)) = self.ports.get_mut(id as usize) else { return };
        if std::mem::replace(&mut port.host_open, open)
            && !open
            && self.bits[id as usize] & bit::TOLD_OPEN != 0
        {
            self.bits[id as usize] |= bit::CLOSED_SINCE;
        }
    }

    pub(crate) fn set_size(&mut self, id: u32, size: Size) {
        let Some(Some(port)) = self.ports.get_mut(id as usize) else { return };
        if port.size.replace(size) != Some(size) {
            self.bits[id as usize] &= !bit::TOLD_SIZE;
        }
    }

    /// What is to be kept of port `id`, and of the driver after the last one.
    pub(crate) fn bits(&self) -> impl Iterator<Item = u32> + '_ {
        self.bits.iter().copied().chain([self.driver])
    }

    /// Goes on where a predecessor ended. Which ports it had may be other ones.
    pub(crate) fn restore(&mut self, bits: impl IntoIterator<Item = u32>) {
        let mut bits = bits.into_iter();
        // A size is told again: what the predecessor's was, nobody knows.
        self.bits.iter_mut().zip(&mut bits).for_each(|(ours, kept)| *ours = kept & !bit::TOLD_SIZE);
        self.driver = bits.next().unwrap_or(0);
    }

    /// Takes what the driver says. `false`: it is about a port that there is not.
    pub(crate) fn hear(&mut self, told: Told) -> bool {
        let (id, flag, yes) = match told {
            Told::DeviceReady(present) => {
                // It begins from the start, or is not there.
                self.reset();
                self.driver = if present { bit::PRESENT } else { 0 };
                return true;
            }
            Told::PortReady(id, yes) => (id, bit::READY, yes),
            Told::PortOpen(id, yes) => (id, bit::GUEST_OPEN, yes),
        };
        let Some(bits) = self.bits.get_mut(id as usize).filter(|bits| **bits & bit::ADDED != 0) else {
            return false;
        };
        if flag == bit::READY {
            *bits &= !bit::TOLD;
        }
        *bits = if yes { *bits | flag } else { *bits & !flag };
        true
    }

    /// What the driver does not know yet. It is to be sent; from now on it counts as known.
    pub(crate) fn next_message(&mut self) -> Option<Message> {
        if self.driver & bit::PRESENT == 0 {
            return None;
        }
        let all = self.ports.iter().zip(&mut self.bits);
        all.zip(0..).find_map(|((port, bits), id)| difference(port.as_ref(), bits, id))
    }
}

fn difference(port: Option<&Port>, bits: &mut u32, id: u32) -> Option<Message> {
    let Some(port) = port else {
        let was_added = *bits & bit::ADDED != 0;
        *bits = 0;
        return was_added.then_some(Message::Remove(id));
    };
    let is = |bits: u32, flag: u32| bits & flag != 0;
    if !is(*bits, bit::ADDED) {
        *bits = bit::ADDED;
        return Some(Message::Add(id));
    }
    if !is(*bits, bit::READY) {
        return None;
    }
    if port.nature.is_console && !is(*bits, bit::TOLD_CONSOLE) {
        *bits |= bit::TOLD_CONSOLE;
        return Some(Message::Console(id));
    }
    if let Some(name) = port.nature.name.as_ref().filter(|_| !is(*bits, bit::TOLD_NAME)) {
        *bits |= bit::TOLD_NAME;
        return Some(Message::Name(id, name.clone()));
    }
    if is(*bits, bit::CLOSED_SINCE) {
        *bits &= !(bit::CLOSED_SINCE | bit::TOLD_OPEN);
        return Some(Message::Open(id, false));
    }
    if is(*bits, bit::TOLD_OPEN) != port.host_open {
        *bits ^= bit::TOLD_OPEN;
        return Some(Message::Open(id, port.host_open));
    }
    if let Some(size) = port.size.filter(|_| port.nature.is_console && !is(*bits, bit::TOLD_SIZE)) {
        *bits |= bit::TOLD_SIZE;
        return Some(Message::Resize(id, size));
    }
    None
}

#[cfg(test)]
mod tests;
