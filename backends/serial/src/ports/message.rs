//! Control messages (virtio 1.2, 5.3.6.2).

/// Bytes of `struct virtio_console_control`.
pub(crate) const HEADER_LEN: usize = 8;

/// What a message is about, as the driver and the device number it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Event {
    DeviceReady = 0,
    DeviceAdd = 1,
    DeviceRemove = 2,
    PortReady = 3,
    ConsolePort = 4,
    Resize = 5,
    PortOpen = 6,
    PortName = 7,
}

/// Columns and rows of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Size {
    pub(crate) columns: u16,
    pub(crate) rows: u16,
}

/// In which order a driver takes the fields of a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum SizeOrder {
    /// As the specification has it: columns, rows
    #[default]
    Spec,
    /// As Linux had it from 2.6.35 to 6.14: rows, columns
    Linux,
}

/// What the device tells the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    Add(u32),
    Remove(u32),
    Console(u32),
    Name(u32, String),
    Open(u32, bool),
    Resize(u32, Size),
}

impl Message {
    pub(crate) fn encode(&self, order: SizeOrder) -> Vec<u8> {
        let (id, event, value, rest) = match self {
            Self::Add(id) => (*id, Event::DeviceAdd, 1, Vec::new()),
            Self::Remove(id) => (*id, Event::DeviceRemove, 1, Vec::new()),
            Self::Console(id) => (*id, Event::ConsolePort, 1, Vec::new()),
            // The zero at the end is for drivers that copy it as text.
            Self::Name(id, name) => (*id, Event::PortName, 1, [name.as_bytes(), &[0]].concat()),
            Self::Open(id, open) => (*id, Event::PortOpen, u16::from(*open), Vec::new()),
            Self::Resize(id, Size { columns, rows }) => {
                let fields = match order {
                    SizeOrder::Spec => [columns, rows],
                    SizeOrder::Linux => [rows, columns],
                };
                (*id, Event::Resize, 1, fields.map(|field| field.to_le_bytes()).concat())
            }
        };
        let event = event as u16;
        [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes(), &rest].concat()
    }
}

/// What the driver tells the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// Whether the driver has come up.
    DeviceReady(bool),
    /// Whether the driver has taken the port.
    PortReady(u32, bool),
    /// Whether somebody in the guest has the port open.
    PortOpen(u32, bool),
}

/// Why bytes are no message of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAMessage {
    #[error("a control message of {0} bytes: it has {HEADER_LEN} at least")]
    Short(usize),
    #[error("a control message with event {0}, which is not for a driver to send")]
    Event(u16),
}

impl Told {
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, NotAMessage> {
        let &[a, b, c, d, e, f, g, h, ..] = bytes else { return Err(NotAMessage::Short(bytes.len())) };
        let id = u32::from_le_bytes([a, b, c, d]);
        let yes = u16::from_le_bytes([g, h]) != 0;
        match u16::from_le_bytes([e, f]) {
            event if event == Event::DeviceReady as u16 => Ok(Self::DeviceReady(yes)),
            event if event == Event::PortReady as u16 => Ok(Self::PortReady(id, yes)),
            event if event == Event::PortOpen as u16 => Ok(Self::PortOpen(id, yes)),
            event => Err(NotAMessage::Event(event)),
        }
    }
}
