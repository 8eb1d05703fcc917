//! The virtio-pci transport (virtio 1.2, 4.1) for a device that lives in a vhost-user daemon. It knows registers,
//! queues and interrupts, and of the device no more than its virtio id.

mod device;
mod layout;
mod registers;

pub use device::{Device, DeviceEvent, Parts};
