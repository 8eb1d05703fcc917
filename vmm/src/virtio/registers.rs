//! The common configuration structure (virtio 1.2, 4.1.4.3) as a state machine. It does nothing itself: a write says
//! what the device has to do.
//!
//! ```text
//!                DRIVER_OK, with FEATURES_OK            status 0
//!   Configuring ─────────────────────────────> Running ──────────> Stopping
//!    │  ^   ^                  refuse() <────────┘                  │
//!    └──┘   └───────────────────── stopped() ───────────────────────┘
//!   status 0
//! ```
//!
//! Invariants: features are frozen once FEATURES_OK is accepted, a queue once it is enabled, all but the interrupt
//! vectors while Running; while Stopping, writes are lost and the status reads as before, which is never 0; the
//! features a driver has are a subset of those offered.

use cleave_common::vhost_user::features;

use crate::vhost::RingAddresses;

/// Bytes of the structure, without the fields of features that are never offered.
pub(super) const COMMON_LEN: usize = 0x38;
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Device status bits (virtio 1.2, 2.1).
pub(super) mod status {
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
}

mod at {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
}

/// What the device has to do after a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// A reset of what did not run: complete, but for what the driver may have written to config space.
    Cleared,
    /// Give the enabled queues to the daemon.
    Start,
    /// Take them back, then call [`Registers::stopped`].
    Stop,
    /// This queue of a running device has another vector.
    Vector(u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Configuring,
    Running,
    Stopping,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Queue {
    pub(super) size: u16,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) addresses: RingAddresses,
}

/// What a driver may change.
#[derive(Debug, Clone)]
struct Driver {
    device_feature_select: u32,
    driver_feature_select: u32,
    /// By 32-bit word; the last one collects bits beyond those that exist.
    features: [u32; 3],
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl Driver {
    fn new(queues: u16, max_queue_size: u16) -> Self {
        let queue = Queue {
            size: max_queue_size,
            vector: NO_VECTOR,
            enabled: false,
            addresses: RingAddresses::default(),
        };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            features: [0; 3],
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: vec![queue; usize::from(queues)],
        }
    }
}

/// The registers of one device.
#[derive(Debug)]
pub(super) struct Registers {
    offered: u64,
    max_queue_size: u16,
    /// config_generation (virtio 1.2, 4.1.4.3.1).
    generation: u8,
    phase: Phase,
    driver: Driver,
}

impl Registers {
    /// For a device that offers `offered` and has `queues` queues of at most `max_queue_size`, a power of two.
    pub(super) fn new(offered: u64, queues: u16, max_queue_size: u16) -> Self {
        let driver = Driver::new(queues, max_queue_size);
        Self { offered, max_queue_size, generation: 0, phase: Phase::Configuring, driver }
    }

    /// Features the driver acknowledged.
    pub(super) fn features(&self) -> u64 {
        u64::from(self.driver.features[0]) | u64::from(self.driver.features[1]) << 32
    }

    /// The queues that the driver enabled, by index.
    pub(super) fn enabled_queues(&self) -> impl Iterator<Item = (u16, &Queue)> {
        (0..).zip(&self.driver.queues).filter(|(_, queue)| queue.enabled)
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.driver.queues.get(usize::from(queue)).map_or(NO_VECTOR, |queue| queue.vector)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.driver.config_vector
    }

    pub(super) fn driver_ok(&self) -> bool {
        self.driver.status & status::DRIVER_OK != 0
    }

    /// Config space is no longer what the driver may have read of it.
    pub(super) fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// What the driver asked for with DRIVER_OK cannot be: only a reset helps.
    pub(super) fn refuse(&mut self) {
        self.driver.status |= status::NEEDS_RESET;
        self.phase = Phase::Configuring;
    }

    /// What runs has come to harm that only a reset mends. Whether the driver is to be told.
    pub(super) fn fail(&mut self) -> bool {
        let runs = self.phase == Phase::Running;
        if runs {
            self.driver.status |= status::NEEDS_RESET;
        }
        runs
    }

    /// The daemon has given the queues back: the reset is complete.
    pub(super) fn stopped(&mut self) {
        if self.phase == Phase::Stopping {
            self.clear();
        }
    }

    /// A reset, by the driver or of the whole machine.
    pub(super) fn reset(&mut self) -> Effect {
        match self.phase {
            Phase::Configuring => {
                self.clear();
                Effect::Cleared
            }
            Phase::Running => {
                self.phase = Phase::Stopping;
                Effect::Stop
            }
            Phase::Stopping => Effect::None,
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.phase == Phase::Stopping
    }

    fn clear(&mut self) {
        self.driver = Driver::new(self.driver.queues.len() as u16, self.max_queue_size);
        self.phase = Phase::Configuring;
    }

    /// Reads `data` at `offset` bytes into the structure; zeroes past its end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(at).and_then(|at| image.get(at)).copied().unwrap_or(0);
        }
    }

    fn image(&self) -> [u8; COMMON_LEN] {
        let driver = &self.driver;
        let mut image = [0; COMMON_LEN];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let offered = match driver.device_feature_select {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        };
        put(0x00, &driver.device_feature_select.to_le_bytes());
        put(0x04, &offered.to_le_bytes());
        put(0x08, &driver.driver_feature_select.to_le_bytes());
        put(0x0c, &driver.features[word(driver.driver_feature_select)].to_le_bytes());
        put(0x10, &driver.config_vector.to_le_bytes());
        put(0x12, &(driver.queues.len() as u16).to_le_bytes());
        put(0x14, &[driver.status, self.generation]);
        put(0x16, &driver.queue_select.to_le_bytes());
        let Some(queue) = driver.queues.get(usize::from(driver.queue_select)) else {
            // A size of 0 says that there is no such queue.
            put(0x1a, &NO_VECTOR.to_le_bytes());
            return image;
        };
        put(0x18, &queue.size.to_le_bytes());
        put(0x1a, &queue.vector.to_le_bytes());
        put(0x1c, &u16::from(queue.enabled).to_le_bytes());
        // queue_notify_off: each queue has its own doorbell.
        put(0x1e, &driver.queue_select.to_le_bytes());
        put(0x20, &queue.addresses.descriptor.to_le_bytes());
        put(0x28, &queue.addresses.available.to_le_bytes());
        put(0x30, &queue.addresses.used.to_le_bytes());
        image
    }

    /// Takes a write of a whole field, or of half a 64-bit one; anything else is lost. `vectors` is how many MSI-X
    /// vectors there are.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], vectors: u16) -> Effect {
        if self.phase == Phase::Stopping {
            return Effect::None;
        }
        match *data {
            [value] if offset == at::STATUS => return self.write_status(value),
            [a, b] => return self.write_u16(offset, u16::from_le_bytes([a, b]), vectors),
            [a, b, c, d] => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.write_address(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_address(offset.saturating_add(4), u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return self.reset();
        }
        let driver = &mut self.driver;
        // A driver sets bits; it clears them only by a reset (virtio 1.2, 2.1.1). NEEDS_RESET is ours.
        let mut added = value & !driver.status & !status::NEEDS_RESET;
        if added & status::FEATURES_OK != 0 && !acceptable(driver.features, self.offered) {
            added &= !status::FEATURES_OK;
        }
        let features_ok = (driver.status | added) & status::FEATURES_OK != 0;
        if !features_ok || driver.status & status::NEEDS_RESET != 0 {
            added &= !status::DRIVER_OK;
        }
        driver.status |= added;
        if added & status::DRIVER_OK == 0 {
            return Effect::None;
        }
        self.phase = Phase::Running;
        Effect::Start
    }

    fn write_u16(&mut self, offset: u64, value: u16, vectors: u16) -> Effect {
        let known = if value < vectors { value } else { NO_VECTOR };
        let (running, select) = (self.phase == Phase::Running, self.driver.queue_select);
        match offset {
            at::CONFIG_VECTOR => self.driver.config_vector = known,
            at::QUEUE_SELECT => self.driver.queue_select = value,
            _ => {}
        }
        let max_queue_size = self.max_queue_size;
        let features_ok = self.driver.status & status::FEATURES_OK != 0;
        let Some(queue) = self.driver.queues.get_mut(usize::from(select)) else { return Effect::None };
        let open = !running && !queue.enabled;
        match offset {
            at::QUEUE_VECTOR if queue.vector != known => {
                queue.vector = known;
                if running && queue.enabled {
                    return Effect::Vector(select);
                }
            }
            at::QUEUE_SIZE if open && value.is_power_of_two() && value <= max_queue_size => {
                queue.size = value;
            }
            at::QUEUE_ENABLE if open && features_ok && value == 1 => queue.enabled = true,
            _ => {}
        }
        Effect::None
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        let driver = &mut self.driver;
        match offset {
            at::DEVICE_FEATURE_SELECT => driver.device_feature_select = value,
            at::DRIVER_FEATURE_SELECT => driver.driver_feature_select = value,
            at::DRIVER_FEATURE if driver.status & status::FEATURES_OK == 0 => {
                driver.features[word(driver.driver_feature_select)] = value;
            }
            _ => self.write_address(offset, value),
        }
    }

    fn write_address(&mut self, offset: u64, value: u32) {
        let running = self.phase == Phase::Running;
        let Some(queue) = self.driver.queues.get_mut(usize::from(self.driver.queue_select)) else { return };
        if running || queue.enabled {
            return;
        }
        let high = offset & 4 != 0;
        let address = match offset & !4 {
            at::QUEUE_DESC => &mut queue.addresses.descriptor,
            at::QUEUE_DRIVER => &mut queue.addresses.available,
            at::QUEUE_DEVICE => &mut queue.addresses.used,
            _ => return,
        };
        *address = if high {
            *address & 0xffff_ffff | u64::from(value) << 32
        } else {
            *address & !0xffff_ffff | u64::from(value)
        };
    }
}

/// Index of a feature word; words that do not exist share the last.
fn word(select: u32) -> usize {
    select.min(2) as usize
}

fn acceptable(driver: [u32; 3], offered: u64) -> bool {
    let features = u64::from(driver[0]) | u64::from(driver[1]) << 32;
    driver[2] == 0 && features & !offered == 0 && features & features::virtio::VERSION_1 != 0
}

#[cfg(test)]
mod tests;
