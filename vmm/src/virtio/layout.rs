//! Where things are in the one BAR, and the capabilities that say so (virtio 1.2, 4.1.4).

use cleave_common::virtio::DeviceType;

use super::registers::COMMON_LEN;
use crate::pci::{ConfigSpace, Identity, msix};

pub(super) const BAR: u8 = 0;
pub(super) const BAR_LEN: u64 = 0x8000;
/// Bytes between two queues' notify addresses: one doorbell a queue.
pub(super) const NOTIFY_STRIDE: u64 = 4;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x7000;

const VENDOR_CAPABILITY: u8 = 0x09;
const VIRTIO_VENDOR: u16 = 0x1af4;
/// PCI device ids of modern devices are this plus the virtio id (virtio 1.2, 4.1.2.1).
const FIRST_DEVICE_ID: u16 = 0x1040;

/// A place in the BAR, with the offset into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Common(u64),
    Isr,
    Device(u64),
    Notify(u64),
    Table(u64),
    Pending(u64),
}

impl Place {
    /// Accesses never span two places: each starts at a page, and is shorter than it.
    pub(super) fn of(offset: u64) -> Self {
        match offset {
            COMMON..ISR => Self::Common(offset - COMMON),
            ISR..DEVICE => Self::Isr,
            DEVICE..NOTIFY => Self::Device(offset - DEVICE),
            NOTIFY..TABLE => Self::Notify(offset - NOTIFY),
            TABLE..PENDING => Self::Table(offset - TABLE),
            _ => Self::Pending(offset - PENDING),
        }
    }
}

/// Offset in the BAR of a queue's doorbell.
pub(super) fn doorbell(queue: usize) -> u64 {
    NOTIFY + NOTIFY_STRIDE * queue as u64
}

/// Offsets in configuration space of the capabilities that the device listens to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capabilities {
    pub(super) msix: usize,
    /// The window through which software without access to the BAR reaches it (virtio 1.2, 4.1.4.9).
    pub(super) window: usize,
}

impl Capabilities {
    /// Fields of the window capability, from its start.
    pub(super) const WINDOW_BAR: usize = 4;
    pub(super) const WINDOW_OFFSET: usize = 8;
    pub(super) const WINDOW_LEN: usize = 12;
    pub(super) const WINDOW_DATA: usize = 16;
}

/// The function's configuration space.
pub(super) fn config_space(
    device_type: DeviceType,
    queues: u16,
    config_len: usize,
) -> (ConfigSpace, Capabilities) {
    let device = FIRST_DEVICE_ID + u16::from(device_type.id());
    let mut space = ConfigSpace::new(Identity {
        vendor: VIRTIO_VENDOR,
        device,
        revision: 1,
        class: device_type.pci_class(),
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: device,
    });
    space.add_bar(BAR, BAR_LEN);
    let vectors = queues + 1;
    let msix = space
        .add_capability(msix::CAPABILITY_ID, &msix::capability(vectors, BAR, TABLE as u32, PENDING as u32));
    space.allow(msix + msix::CONTROL_OFFSET, &msix::CONTROL_WRITABLE.to_le_bytes());

    let notify_len = NOTIFY_STRIDE as u32 * u32::from(queues);
    vendor(&mut space, Kind::Common, COMMON, COMMON_LEN as u32, &[]);
    vendor(&mut space, Kind::Notify, NOTIFY, notify_len, &(NOTIFY_STRIDE as u32).to_le_bytes());
    vendor(&mut space, Kind::Isr, ISR, 1, &[]);
    if config_len != 0 {
        vendor(&mut space, Kind::Device, DEVICE, config_len as u32, &[]);
    }
    let window = vendor(&mut space, Kind::Window, 0, 0, &[0; 4]);
    space.allow(window + Capabilities::WINDOW_BAR, &[0xff]);
    space.allow(window + Capabilities::WINDOW_OFFSET, &[0xff; 12]);
    (space, Capabilities { msix, window })
}

/// `cfg_type` of a vendor capability.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Kind {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    Window = 5,
}

/// Adds a `struct virtio_pci_cap`, with what its kind has after it.
fn vendor(space: &mut ConfigSpace, kind: Kind, offset: u64, len: u32, extra: &[u8]) -> usize {
    let cap_len = (16 + extra.len()) as u8;
    let mut body = vec![cap_len, kind as u8, BAR, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(extra);
    space.add_capability(VENDOR_CAPABILITY, &body)
}

const _: () = {
    use crate::vhost::MAX_QUEUES;
    assert!(NOTIFY + NOTIFY_STRIDE * MAX_QUEUES as u64 <= TABLE);
    assert!(TABLE + msix::ENTRY_LEN * (MAX_QUEUES as u64 + 1) <= PENDING);
    assert!(crate::vhost::MAX_CONFIG_LEN as u64 <= NOTIFY - DEVICE);
};
