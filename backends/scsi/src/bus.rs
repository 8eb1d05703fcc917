//! The units there are, each with the image behind it.
//!
//! Invariant: a unit has a medium exactly if its slot has an image. Both change under the bus's lock for writing; a
//! command is looked at, and its image found, under one for reading.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cleave_scsi::{NoSuchLun, Target, Unit};
use cleave_storage::{Admission, Image, Nudges, Throttle};

use crate::address::Address;
use crate::config::{KindConfig, UnitConfig, WhenFull};
use crate::gate::Gate;

/// What the queues share of one unit.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) address: Address,
    pub(crate) gate: Gate,
    pub(crate) admission: Admission,
    /// A write that finds no room waits for some.
    pub(crate) waits_for_room: bool,
}

/// An image in a unit. Each time that one is put into a unit has a number of its own.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    pub(crate) number: u64,
    pub(crate) image: Arc<Image>,
}

impl Loaded {
    pub(crate) fn new(image: Arc<Image>) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        Self { number: NUMBER.fetch_add(1, Ordering::Relaxed), image }
    }
}

/// A unit's place.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) config: UnitConfig,
    pub(crate) backing: Arc<Backing>,
    pub(crate) loaded: Option<Loaded>,
    /// It was added while the device ran.
    pub(crate) is_hot: bool,
}

impl Slot {
    pub(crate) fn new(config: UnitConfig, image: Option<Arc<Image>>, nudges: &Arc<Nudges>) -> Self {
        let (throttle, waits_for_room) = match &config.kind {
            KindConfig::Disk(disk) => (Throttle::new(&disk.throttle), disk.on_full == WhenFull::Pause),
            KindConfig::Cdrom(_) => (None, false),
        };
        let name = format!("the disk of unit {}", config.address);
        let backing = Backing {
            address: config.address,
            gate: Gate::default(),
            admission: Admission::new(name, throttle, nudges.clone()),
            waits_for_room,
        };
        Self { config, backing: Arc::new(backing), loaded: image.map(Loaded::new), is_hot: false }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Bus {
    targets: BTreeMap<u8, Target>,
    slots: BTreeMap<Address, Slot>,
}

impl Bus {
    pub(crate) fn target(&self, number: u8) -> Option<&Target> {
        self.targets.get(&number)
    }

    pub(crate) fn slot(&self, address: Address) -> Option<&Slot> {
        self.slots.get(&address)
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = (Address, &Slot)> {
        self.slots.iter().map(|(address, slot)| (*address, slot))
    }

    pub(crate) fn has(&self, address: Address) -> bool {
        self.slots.contains_key(&address)
    }

    /// A unit in a place that is free.
    pub(crate) fn add(&mut self, slot: Slot, unit: Unit) {
        let address = slot.config.address;
        let target = self.targets.entry(address.target).or_default();
        if target.add(address.lun, unit).is_ok() {
            self.slots.insert(address, slot);
        }
    }

    /// The unit was added while a predecessor ran.
    pub(crate) fn mark_hot(&mut self, address: Address) {
        if let Some(slot) = self.slots.get_mut(&address) {
            slot.is_hot = true;
        }
    }

    pub(crate) fn remove(&mut self, address: Address) -> Option<Slot> {
        let slot = self.slots.remove(&address)?;
        if let Some(target) = self.targets.get_mut(&address.target) {
            target.remove(address.lun);
            if target.luns().next().is_none() {
                self.targets.remove(&address.target);
            }
        }
        Some(slot)
    }

    /// Looks at, or changes, one unit.
    pub(crate) fn unit<T>(&self, address: Address, act: impl FnOnce(&mut Unit) -> T) -> Result<T, NoSuchLun> {
        match self.targets.get(&address.target) {
            Some(target) => target.with(address.lun, act),
            None => Err(NoSuchLun(address.lun)),
        }
    }

    /// Changes a unit together with the image in it.
    pub(crate) fn unit_and_image<T>(
        &mut self,
        address: Address,
        act: impl FnOnce(&mut Unit, &mut Option<Loaded>) -> T,
    ) -> Result<T, NoSuchLun> {
        let slot = self.slots.get_mut(&address).ok_or(NoSuchLun(address.lun))?;
        let target = self.targets.get(&address.target).ok_or(NoSuchLun(address.lun))?;
        target.with(address.lun, |unit| act(unit, &mut slot.loaded))
    }

    /// Each unit in turn.
    pub(crate) fn each_unit(&self, mut act: impl FnMut(Address, &mut Unit)) {
        for address in self.slots.keys() {
            let _ = self.unit(*address, |unit| act(*address, unit));
        }
    }
}
